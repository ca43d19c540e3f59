"""The judge's server, in a thread of the test or as a process that a test can kill."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from raw_server import RawServer
from server import Server


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts a [`Server`] with the settings given; it stops with the test."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(Server(*args, **kwargs))


@pytest.fixture
def serve_process() -> Iterator[Callable[..., tuple[subprocess.Popen, str]]]:
    """Starts a server as a process, `serve_process(port=, answer=, latency=, fault_share=)` -> (process, its URL)."""
    started: list[subprocess.Popen] = []

    def start(**settings: object) -> tuple[subprocess.Popen, str]:
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(Path(__file__).with_name("server.py")), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def serve_raw() -> Iterator[Callable[..., RawServer]]:
    """Starts a [`RawServer`] that replies in turn as the handlers given; it stops with the test."""
    with ExitStack() as stack:
        yield lambda *handlers: stack.enter_context(RawServer(handlers))
