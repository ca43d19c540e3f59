"""Files that appear whole or not at all, and folders that one run at a time writes."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

LOCK = ".dmoerm.lock"


@contextmanager
def writing(path: str | os.PathLike, *, binary: bool = False, private: bool = False) -> Iterator[IO[Any]]:
    """
    Open a file that appears at `path` when the block ends without an error, and takes the place of what stood there. Until
    then it is `.NAME.partial` beside it, which an error removes. Text is UTF-8. Missing folders are made.

    Args:
        binary (`bool`): whether bytes are written rather than text.
        private (`bool`): whether only its owner may read the file.

    Raises:
        RuntimeError: if another process writes the same file meanwhile.
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
    """Write a text, in UTF-8, see [`writing`]."""
    with writing(path, private=private) as file:
        file.write(text)


def write_json(path: str | os.PathLike, content: Any, *, private: bool = False) -> None:
    """
    Write JSON, see [`writing`].

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not have.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: got a number that is NaN or infinite, need one that JSON has: {error}.") from error
    write_text(path, text + "\n", private=private)


def read_json(path: str | os.PathLike, way_out: str = "put it back as it was written") -> Any:
    """
    Read JSON that this package wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no JSON; the message ends with the way out.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: got a file that is no JSON ({error}), need what was written there: {way_out}."
        ) from error


def save_figure(figure: Any, path: str | os.PathLike) -> Path:
    """Write a figure of matplotlib's by way of [`writing`], in the format of the path's suffix, and return the path."""
    path = Path(path)
    with writing(path, binary=True) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png")
    return path


def file_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of what stands in the files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def partial_path(path: str | os.PathLike) -> Path:
    """Where a file stands while it is written."""
    path = Path(path)
    return path.with_name(f".{path.name}.partial")


def check_writable(path: str | os.PathLike, *, inputs: Iterable[str | os.PathLike | None] = ()) -> None:
    """
    Check, before any work is done for it, that a file can be written: makes its folder and opens its partial file.

    Args:
        inputs: what is read for it, of which it may be none.

    Raises:
        ValueError: if it cannot, or is a folder or an input.
    """
    path = Path(path)
    for read in inputs:
        if read is not None and path.exists() and Path(read).exists() and path.samefile(read):
            raise ValueError(
                f"{path}: got a file to write that is read too, need another one, because it would be lost: name another place."
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
            "there: name another place, or fix its folder's permissions."
        ) from error


@contextmanager
def locked_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Make a folder, and hold it until the block ends: while a process is in it, another cannot hold the same folder. The lock
    is the operating system's, so that it ends with a process that is killed; the file `.dmoerm.lock` names the process, and
    goes when the block ends. Of the processes that a launcher started the first alone holds the folder, and the others pass.

    Raises:
        ValueError: naming the process that holds the folder and its host, or why the folder cannot be written.

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
            f"{folder}: got a folder that {_owner(folder)} is writing, need one run at a time, because each would overwrite "
            "what the other does: wait for it, end it, or name another folder."
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
        with suppress(OSError):  # Windows lets no open file go
            (folder / LOCK).unlink()
        lock.release()


def _is_at(file: os.stat_result, path: Path) -> bool:
    """Whether a file still stands at a path."""
    try:
        return os.path.samestat(file, os.lstat(path))
    except FileNotFoundError:
        return False


def _owner(folder: Path) -> str:
    """What the holder wrote, if it has by now, and may be read while it is locked."""
    with suppress(OSError):
        return (folder / LOCK).read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    return "another process"
