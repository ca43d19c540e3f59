"""Atomic writes, locked folders and digests."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

LOCK = ".dmoerm.lock"


@contextmanager
def writing(path: str | os.PathLike, *, binary: bool = False, private: bool = False) -> Iterator[IO[Any]]:
    """
    Open a file for writing that replaces `path` atomically when the block ends without an error. Until then the file is
    `.NAME.partial` beside it, which is removed after an error. Text is UTF-8. Missing folders are created.

    Args:
        binary (`bool`): Whether bytes are written instead of text.
        private (`bool`): Whether only the owner may read the file.

    Raises:
        RuntimeError: If another process writes the same file meanwhile.
    """
    path = Path(path)
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)  # of a run that was killed; a link is removed, not followed
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    mine = os.fstat(handle)
    try:
        with open(handle, "wb") if binary else open(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(handle)
            if not _is_at(mine, partial):
                raise RuntimeError(
                    f"{path}: got another process that writes the same file, need one at a time, because one would overwrite "
                    "the other: wait for it, or name another file."
                )
            os.replace(partial, path)
    except BaseException:
        if _is_at(mine, partial):
            partial.unlink()
        raise


def write_text(path: str | os.PathLike, text: str, *, private: bool = False) -> None:
    """Write text atomically in UTF-8; see [`writing`]."""
    with writing(path, private=private) as file:
        file.write(text)


def write_json(path: str | os.PathLike, content: Any, *, private: bool = False) -> None:
    """
    Write JSON atomically; see [`writing`].

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot express.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"{path}: got a number that is NaN or infinite, need finite numbers, because JSON has no others: {error}."
        ) from error
    write_text(path, text + "\n", private=private)


def read_json(path: str | os.PathLike, way_out: str = "put it back as it was written") -> Any:
    """
    Read JSON that this package wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not JSON; the message names the file and ends with `way_out`.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: got a file that is not JSON ({error}), need its original content: {way_out}."
        ) from error


def as_json(content: Any) -> Any:
    """Return content as it is read back from JSON: tuples as lists, and keys as text."""
    return json.loads(json.dumps(content))


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the keys of two records of settings whose values differ, in alphabetical order; a missing value is None."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def save_figure(figure: Any, path: str | os.PathLike) -> Path:
    """Write a matplotlib figure atomically in the format of the path's suffix, and return the path; see [`writing`]."""
    path = Path(path)
    with writing(path, binary=True) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png")
    return path


def file_digest(paths: Iterable[Path]) -> str:
    """Compute the SHA-256 of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def partial_path(path: str | os.PathLike) -> Path:
    """Return the path of a file while it is being written."""
    path = Path(path)
    return path.with_name(f".{path.name}.partial")


def check_writable(path: str | os.PathLike, *, inputs: Iterable[str | os.PathLike | None] = ()) -> None:
    """
    Check that a file can be written, before the work for it begins. This creates its folder.

    Args:
        inputs (`Iterable`, *optional*): Files that are read, which must not be overwritten.

    Raises:
        ValueError: If the file cannot be written, is a folder, or is one of the inputs.
    """
    path = Path(path)
    for read in inputs:
        if read is not None and path.exists() and Path(read).exists() and path.samefile(read):
            raise ValueError(
                f"{path}: got an output file that is an input too, need another one, because the input would be lost: name "
                "another file."
            )
    try:
        if not path.name or path.is_dir():
            raise IsADirectoryError("it is a folder")
        partial = partial_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        partial.unlink()
    except OSError as error:
        raise ValueError(
            f"{path}: got a file that cannot be written ({error.strerror or error}), need one that can, because the results go "
            "there: name another file, or fix its folder's permissions."
        ) from error


@contextmanager
def locked_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Create a folder and lock it until the block ends, so that one run at a time writes to it. The operating system releases the
    lock when a process is killed. The file `.dmoerm.lock` names the process and is deleted when the block ends. Of several
    launched processes only the first locks the folder.

    Raises:
        ValueError: If another process has locked the folder, which the message names with its host, or if the folder cannot be
            written.

    Example:

    ```python
    from dmoerm_trl import locked_folder

    with locked_folder("runs/mine") as folder:
        (folder / "mine.txt").write_text("no other process writes here meanwhile")
    ```
    """
    folder = Path(folder)
    if int(os.environ.get("RANK", 0)) > 0:
        yield folder
        return
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder}: got a folder that {_owner(folder)} is writing, need one run at a time, because two would "
            "overwrite each other's files: wait for it, stop it, or name another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"{folder}: got a folder that cannot be written ({error.strerror or error}), need one that can, because the "
            "results go there: name another folder, or fix its permissions."
        ) from error
    try:
        (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield folder
    finally:
        with suppress(OSError):  # Windows does not delete an open file
            (folder / LOCK).unlink()
        lock.release()


def _is_at(file: os.stat_result, path: Path) -> bool:
    """Return whether a path still names the file."""
    try:
        return os.path.samestat(file, os.lstat(path))
    except FileNotFoundError:
        return False


def _owner(folder: Path) -> str:
    """Return the name of the process that holds the lock, as far as it can be read."""
    with suppress(OSError):
        return (folder / LOCK).read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    return "another process"
