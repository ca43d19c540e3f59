"""Real processes that start at once: each is forked from one that has imported everything, with its output in a file."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

# Read by the libraries when they are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # threads would not be there after a fork

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "labelling")]


def preload(modules: list[str]) -> None:
    for module in modules:
        import_module(module)


class Fork:
    """
    A process that calls a function, in a session of its own.

    Args:
        log (`Path`): file to which its output is added.
        folder (`Path`, *optional*): where it works.
        memory (`int`, *optional*): bytes that it may take beside what it starts with.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        log: Path,
        folder: Path | None = None,
        memory: int | None = None,
    ):
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_call, args=(function, arguments, log, folder, memory))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds: float) -> int | None:
        """Its exit status, negative for a signal; `None` if it still runs after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def send(self, number: int) -> None:
        """Sends a signal to it alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it and all that it started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.kill()  # if it has no session of its own yet
        self._process.join()


def _call(function: Callable[..., Any], arguments: tuple, log: Path, folder: Path | None, memory: int | None) -> None:
    os.setsid()
    if folder is not None:
        os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    from tqdm import tqdm

    # tqdm's own lock is shared by all that are forked from one process: killed with it, one would block those that follow.
    tqdm.set_lock(threading.RLock())
    function(*arguments)
