"""Processes that share the work: what each does when it starts."""

import os
import threading
import time
from multiprocessing.synchronize import Event

import torch
from transformers.utils import logging


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
