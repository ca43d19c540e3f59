"""
Output of the programs: one line per error or warning, one progress bar, and no noise of libraries. Some libraries print when
they are imported, so import this module before them.
"""

import errno
import functools
import logging
import os
import select
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from .messages import printable, raised_here, reason


def run(program: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """
    Run a program, and report an error in one or two lines on stderr. With `--debug` among the arguments the traceback and the
    warnings of the libraries are shown too. A process of a launcher leaves the others when the program has ended.

    Args:
        program (`Callable`): A function of the arguments without `--debug` that returns the exit status, or None for 0.
        argv (`Sequence[str]`, *optional*): The arguments; `sys.argv[1:]` by default.

    Raises:
        SystemExit: If the status is not 0: 1 after an error, 130 after Ctrl-C, 141 if the reader of the output has gone.

    Example:

    ```python
    from dmoerm_trl import run

    def main(argv):
        print("hello", *argv)

    run(main, ["world"])  # an error of `main` is a line on stderr, and the exit status
    ```
    """
    if argv is None:
        _in_utf8()
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    shown: BaseException | None = None
    try:
        with _speaking(debug):
            status = program(argv)
            _leave_the_others()
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        shown = error
        _say("stopped by Ctrl-C. To resume training, labelling or best of n, run the same command again.")
        status = 130
    except BrokenPipeError as error:
        shown = error
        if _is_read(sys.stdout):  # another pipe broke
            _say(f"error: {_text_of(error)}")
            status = 1
        else:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains at exit
            status = 141
    except Exception as error:
        shown = error
        _say(f"error: {_text_of(error)}")
        status = 1
    if debug and shown is not None:
        print("".join(traceback.format_exception(shown)), file=sys.stderr)
    if status:
        sys.exit(status)


def _leave_the_others() -> None:
    """Close the connections of a launcher's processes, whose threads may otherwise abort the process when Python ends."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _in_utf8() -> None:
    """
    Restart the process in Python's UTF-8 mode if the locale cannot encode Chinese file names (`LC_ALL=C`), because tasks and
    points name folders.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# --------------------------------------------------------------------------------------------------- errors


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    who = "dmoerm" if rank == "0" else f"dmoerm (process {rank})"
    print(printable(f"{who}: {text}"), file=sys.stderr)


def _text_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        way_out = "free some space" if error.errno == errno.ENOSPC else "fix the path, or its permissions"
        return f"{error.filename}: {error.strerror}: {way_out}."
    if raised_here(error) and str(error):
        return str(error)
    text = reason(error)
    if not isinstance(error, (ValueError, OSError)) and text != type(error).__name__:
        text = f"{type(error).__name__}: {text}"
    return f"{text}\nRun the same command with --debug for the traceback."


def _is_read(stream: IO[str]) -> bool:
    """Return whether the other end of an output still reads."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or no file
        return False


# --------------------------------------------------------------------------------------------------- libraries' messages

NOISE = {
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "DeepSpeed": ("Setting accelerator to CPU",),
    "transformers.trainer_utils": ("The tokenizer has new PAD/BOS/EOS tokens",),
    "transformers.configuration_utils": ("You are using a model of type",),  # an error of ours follows
    "transformers.generation.utils": ("Passing `generation_config` together with generation-related arguments",),
    "transformers.utils.generic": ("`use_cache=True` is incompatible with gradient checkpointing",),
}
"""Logger -> beginnings of messages that are irrelevant to the user of a command."""

WARNINGS = ("'pin_memory' argument is set as true but no accelerator is found",)
"""Beginnings of irrelevant warnings; deprecation warnings are for programmers too."""


@contextmanager
def _speaking(debug: bool) -> Iterator[None]:
    """Context manager that prints warnings on one line each, silences libraries, and shows one progress bar at a time."""
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # in every locale, as in the files
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.stdout, sys.stderr = (_Plain(stream) if stream.isatty() else stream for stream in streams)
    try:
        with warnings.catch_warnings():
            if debug:
                for name in NOISE:
                    logging.getLogger(name).removeFilter(_says_something)
            else:
                warnings.simplefilter("default", UserWarning)
                for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                    warnings.simplefilter("ignore", category)
                for start in WARNINGS:
                    warnings.filterwarnings("ignore", start)
                warnings.showwarning = _show_warning
            with _one_bar():
                yield
    finally:
        sys.stdout, sys.stderr = streams
        _silence()


def _says_something(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(NOISE[record.name])


def _silence() -> None:
    for name in NOISE:
        logging.getLogger(name).addFilter(_says_something)


_silence()
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {' '.join(str(message).split())}")


class _Plain:
    """A stream that escapes control sequences of the terminal."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# --------------------------------------------------------------------------------------------------- progress bars


DELAY = 3
"""Default number of seconds after which a progress bar appears."""


@contextmanager
def _one_bar() -> Iterator[None]:
    """
    Context manager in which progress bars appear after [`DELAY`] seconds, and a nested progress bar is shown as text at the end
    of the outer one's line.
    """
    from tqdm.std import tqdm

    create, refresh = tqdm.__init__, tqdm.refresh

    @functools.wraps(create)
    def create_within(bar: Any, *args: Any, **options: Any) -> None:
        outer = next((other for other in list(tqdm._instances) if getattr(other, "is_outer", False)), None)
        if outer is not None and not options.get("disable"):
            options |= {"file": _EndOfLine(outer), "bar_format": "{desc} {n_fmt}/{total_fmt}", "position": 0}
        create(bar, *args, **{"delay": DELAY, **options})
        bar.is_outer = outer is None and not bar.disable

    @functools.wraps(refresh)
    def refresh_late(bar: Any, *args: Any, **options: Any) -> Any:
        if bar.disable or bar.delay > 0 and time.time() < bar.start_t + bar.delay:
            return None
        bar.delay = 0  # so that it ends its line when it is closed
        return refresh(bar, *args, **options)

    tqdm.__init__, tqdm.refresh = create_within, refresh_late
    try:
        yield
    finally:
        tqdm.__init__, tqdm.refresh = create, refresh


class _EndOfLine:
    """File-like object that shows a nested progress bar at the end of the outer one's line."""

    def __init__(self, outer: Any):
        self._outer, self._own = outer, outer.postfix

    def write(self, text: str) -> None:
        if not self._outer.disable:  # closed before this one
            self._outer.set_postfix_str(", ".join(part for part in (self._own, text.strip()) if part))

    def flush(self) -> None:
        pass
