"""Processes that a test kills. They are forked from a server that has imported everything, which saves seconds each."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Process
from typing import Any

import pytest
from tqdm import tqdm

PRELOAD = ["dmoerm_trl.training.pipeline", "dmoerm_trl.commands.label", "trl.trainer.reward_trainer"]


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Calls a function of a module with arguments in a process of its own, whose output is not shown."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    started = []

    def start(function: Callable[..., Any], *arguments: Any) -> Process:
        started.append(context.Process(target=_call, args=(function, arguments)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def _call(function: Callable[..., Any], arguments: tuple) -> None:
    # tqdm's own lock is shared by all that are forked from one process: killed with it, one would block those that follow.
    tqdm.set_lock(threading.RLock())
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    function(*arguments)
