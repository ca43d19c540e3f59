"""How programs speak: errors and warnings in a line, one progress bar, nothing that steers a terminal."""

import io
import json
import logging
import re
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm.auto import tqdm

from dmoerm_trl.console import DELAY, run
from dmoerm_trl.files import writing
from dmoerm_trl.messages import printable


def fails_with(error: BaseException):
    def program(argv: list[str]) -> None:
        raise error

    return program


def of_a_library(argv: list[str]) -> None:
    json.loads("{")


def a_fault(argv: list[str]) -> None:
    [][3]


def missing_file(argv: list[str]) -> None:
    with open("no/such.jsonl"):
        pass


def ours(argv: list[str]) -> None:
    with writing("no\0name"):
        pass


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        (
            of_a_library,
            "dmoerm: error: Expecting property name.*\nRun the same command with --debug for the traceback.\n",
        ),
        (
            a_fault,
            "dmoerm: error: IndexError: list index out of range\nRun the same command with --debug for the traceback.\n",
        ),
        (
            missing_file,
            "dmoerm: error: no/such.jsonl: No such file or directory: fix the path, or its permissions.\n",
        ),
        (fails_with(KeyError()), "dmoerm: error: KeyError\n"),
        (fails_with(ValueError("a " * 10_000)), "dmoerm: error: (a ){100,400}…\n.*for the traceback.\n"),
        (fails_with(ValueError("\x1b[2Jgone\n\nfar")), r"dmoerm: error: \\u001b\[2Jgone far\n.*for the traceback.\n"),
        (fails_with(KeyboardInterrupt()), "dmoerm: stopped by Ctrl-C.*run the same command again.\n"),
    ],
)
def test_an_error_is_a_line_or_two_on_stderr(program, shown, capsys):
    with pytest.raises(SystemExit) as ended:
        run(program, [])
    assert ended.value.code == (130 if "Ctrl-C" in shown else 1)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match(shown, printed.err), printed.err
    assert printed.err.count("\n") <= 2 and len(printed.err) < 800


@pytest.mark.parametrize("argv", [["--debug", "a"], ["a", "--debug"]])
def test_debug_shows_the_traceback_and_is_not_an_argument(argv, capsys):
    received = []

    def program(arguments):
        received.extend(arguments)
        json.loads("{")

    with pytest.raises(SystemExit):
        run(program, argv)
    assert received == ["a"]
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_what_a_program_returns_is_its_status():
    assert run(lambda argv: None, []) is None
    assert run(lambda argv: 0, []) is None
    with pytest.raises(SystemExit) as ended:
        run(lambda argv: 2, [])
    assert ended.value.code == 2


def test_another_process_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        run(missing_file, [])
    assert capsys.readouterr().err.startswith("dmoerm (process 3): error: no/such.jsonl")


def test_a_reader_that_goes_away_is_no_error():
    program = "from dmoerm_trl.console import run; run(lambda argv: print('x' * 10**7))"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{program}" | head -c 1; echo ${{PIPESTATUS[0]}}'],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert (done.stdout, done.stderr) == ("x141\n", "")


def test_another_broken_pipe_is_an_error(capfd):
    with pytest.raises(SystemExit) as ended:
        run(fails_with(BrokenPipeError(32, "Broken pipe")), [])
    assert ended.value.code in (1, 141)  # what pytest gives as stdout is a file, which always reads


def test_our_warnings_are_a_line_and_those_for_programmers_are_silent(capsys):
    def program(argv):
        warnings.warn("for 3 of 4 responses,\nthe prompt lost its oldest part.", stacklevel=2)
        warnings.warn("`a` is deprecated and will be removed", FutureWarning, stacklevel=2)
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found, then", stacklevel=2)

    run(program, [])
    assert capsys.readouterr().err == "dmoerm: warning: for 3 of 4 responses, the prompt lost its oldest part.\n"


def test_of_what_libraries_log_only_noise_is_silent():
    logger = logging.getLogger("DeepSpeed")
    shown = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.warning(
            "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
        )
        logger.warning("the loss is NaN")
    finally:
        logger.removeHandler(handler)
    assert shown == ["the loss is NaN"]


# Progress.


def test_a_bar_within_a_bar_is_text_at_the_end_of_its_line():
    shown = io.StringIO()

    def program(argv):
        with tqdm(total=2, desc="training", file=shown, delay=0, mininterval=0) as outer:
            outer.set_postfix_str("router")
            with tqdm(total=5, desc="steps", delay=0, mininterval=0) as inner:
                inner.update(3)
                with tqdm(total=7, delay=0, mininterval=0) as innermost:
                    innermost.update(1)
            outer.update()

    run(program, [])
    lines = shown.getvalue()
    assert "router, steps 3/5" in lines and "steps 3/5, 1/7" in lines
    assert "\x1b" not in lines and lines.count("\n") == 1  # one line, which ends with its bar
    assert lines.rstrip("\n").split("\r")[-1].rstrip().endswith("router]")


def test_a_bar_of_something_short_does_not_appear(capsys):
    def program(argv):
        with tqdm(total=2, desc="short") as bar:
            bar.set_postfix_str("at once")
            bar.update(2)

    assert DELAY > 0
    run(program, [])
    assert capsys.readouterr().err == ""


def test_bars_are_as_they_were_afterwards():
    before = tqdm.__mro__[-2].refresh if hasattr(tqdm.__mro__[-2], "refresh") else tqdm.refresh
    run(lambda argv: None, [])
    with tqdm(total=1, file=io.StringIO()) as bar:
        assert bar.delay == 0
    assert (tqdm.__mro__[-2].refresh if hasattr(tqdm.__mro__[-2], "refresh") else tqdm.refresh) is before


# What is shown.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_escapes_and_a_file_gets_all(monkeypatch):
    text = "\x1b]0;title\x07 \x9b2J caf\u00e9 \u5e7d\u9ed8 \u202e"
    for stream, expected in (
        (Terminal(), "\\u001b]0;title\\u0007 \\u009b2J caf\u00e9 \u5e7d\u9ed8 \\u202e\n"),
        (io.StringIO(), text + "\n"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        run(lambda argv: print(text), [])
        assert stream.getvalue() == expected


@given(st.text())
def test_printable_text_reads_back_from_json(text):
    shown = printable(json.dumps(text, ensure_ascii=False))
    assert shown.isprintable()
    assert json.loads(shown) == text
    assert all(c.isprintable() or c in "\n\r\t" for c in printable(text))


def test_a_process_of_a_launcher_leaves_the_others_when_its_program_has_ended(tmp_path):
    """With its connections open, some of PyTorch's threads now and then abort the process when Python ends."""
    script = (
        "import torch.distributed as dist\n"
        "from dmoerm_trl import run\n"
        "def program(argv):\n"
        f"    dist.init_process_group('gloo', init_method='file://{tmp_path / 'store'}', rank=0, world_size=1)\n"
        "    assert dist.is_initialized()\n"
        "run(program, [])\n"
        "print(dist.is_initialized())\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "False\n"), process.stderr
