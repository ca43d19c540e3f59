import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from dmoerm_trl import __version__
from dmoerm_trl.cli import COMMANDS, main


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(argv, capsys):
    assert main(argv) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert dict(lines) == COMMANDS


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option):
    program = (
        "import sys; from dmoerm_trl.cli import main; main(sys.argv[1:]);"
        "print({'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, option], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dmoerm {__version__}\n"


def test_unknown_command_exits_2_and_lists_the_commands(capsys):
    assert main(["trian", "--help"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"got command 'trian', need one of {', '.join(COMMANDS)}." in printed.err
    assert all(what in printed.err for what in COMMANDS.values())


def test_a_command_gets_the_arguments_after_its_name(monkeypatch):
    received = []
    monkeypatch.setitem(sys.modules, "dmoerm_trl.scripts.world", SimpleNamespace(main=received.append))
    assert main(["world", "--seed", "3", "--help"]) == 0
    assert received == [["--seed", "3", "--help"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_script(command):
    assert find_spec(f"dmoerm_trl.scripts.{command}") is not None
