"""Folders that one run at a time writes."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".dmoerm.lock"


@contextmanager
def held(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Makes a folder, and holds it until the block ends: while a process is in it, another cannot hold the same folder. The lock
    is the operating system's, so that it ends with a process that is killed; the file `.dmoerm.lock` names the process, and
    goes when the block ends. Of the processes that a launcher started the first alone holds the folder, and the others pass.

    Raises:
        ValueError: naming the process that holds the folder and its host, or why the folder cannot be written.
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
            "results go there: name another folder, or mend its permissions."
        ) from error
    try:
        (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield folder
    finally:
        with suppress(OSError):  # Windows lets no open file go
            (folder / LOCK).unlink()
        lock.release()


def _owner(folder: Path) -> str:
    """What the holder wrote, if it has by now, and may be read while it is locked."""
    with suppress(OSError):
        return (folder / LOCK).read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    return "another process"
