"""Processes that share the work: those that this package starts, and those that a launcher started."""

import os
import threading
import time
from datetime import timedelta
from multiprocessing.synchronize import Event

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers.utils import logging


def launched_processes() -> PartialState:
    """The processes that `accelerate launch` or `torchrun` started, each with its device; this one alone without a launcher."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # they wait for the slowest; of a process that dies the launcher ends the others
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def start_worker(parent: int, threads: int, stop: Event | None = None) -> None:
    """
    Gives a process its share of the threads and no progress bars, and ends it when its parent is gone or `stop` is set: an
    orphan would write into the folders of a run that was started again.
    """
    torch.set_num_threads(threads)
    logging.disable_progress_bar()

    def watch() -> None:
        while os.getppid() == parent and not (stop is not None and stop.is_set()):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
