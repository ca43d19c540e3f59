"""Processes that share the work: the workers that this package starts, and the processes of a launcher."""

import os
import threading
import time
from datetime import timedelta
from multiprocessing.synchronize import Event

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers.utils import logging


def is_main() -> bool:
    """Return whether this is the process that writes files: the first one of a launcher, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def processes() -> int:
    """Return how many processes a launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def wait_for_all() -> None:
    """Block until all processes have reached this call."""
    if dist.is_initialized():
        dist.barrier()


def check_joined(workers: int) -> None:
    """
    Check that the processes of a launcher train together.

    Raises:
        ValueError: If a launcher started several processes and they are not connected, so that each would train the
            same alone, or each would start workers of its own.
    """
    if processes() > 1 and workers > 1:
        raise ValueError(
            f"got workers={workers} in each of {processes()} processes, need 1, because the processes of a launcher train each "
            "stage together: leave `workers` out, or start without the launcher."
        )
    if processes() > 1 and not dist.is_initialized():
        raise ValueError(
            f"got {processes()} processes that are not joined, need them to be, because each would train alone: without GPUs set "
            "`use_cpu: true` in each stage's settings."
        )


def launched_processes() -> PartialState:
    """
    Connect the processes that `accelerate launch` or `torchrun` started, and assign their devices; without a launcher
    there is only this one.

    Example:

    ```python
    from dmoerm_trl import launched_processes

    processes = launched_processes()
    processes.is_main_process, processes.device
    ```
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # long, because all wait for the slowest; if a process dies, the launcher ends the others
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def start_worker(parent: int, threads: int, stop: Event | None = None) -> None:
    """
    Set up a worker process: its number of threads, no progress bars, and a watcher that ends it when its parent is
    gone or `stop` is set, because an orphan would write into the folders of a restarted run.
    """
    torch.set_num_threads(threads)
    logging.disable_progress_bar()

    def watch() -> None:
        while os.getppid() == parent and not (stop is not None and stop.is_set()):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
