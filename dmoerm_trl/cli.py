"""The console command: `dmoerm <command> ...` runs `dmoerm_trl.scripts.<command>.main`."""

import sys
from difflib import get_close_matches
from importlib import import_module

from dmoerm_trl import __version__
from dmoerm_trl.console import run

COMMANDS = {
    "prepare": "turn a public preference set into rows, with a report of what is in them",
    "label": "buy capability labels from a judge: a server, a local model, a function",
    "train": "train a DMoERM from preference rows: router, three phases, baselines",
    "eval": "print and save the consistency table",
    "score": "score responses and explain them",
    "best-of-n": "compare reward models by the best of n responses",
    "ppo": "optimise a policy with PPO",
    "grpo": "optimise a policy with GRPO or RLOO",
    "export": "write a base, its experts or an inner model as ordinary files",
    "world": "write the simulated preference world to a JSONL file",
    "demo": "run the whole method on a simulated world: data, base, training, table, PPO",
}
"""Command -> its description. The script of the same name is imported only when its command runs."""


def usage() -> str:
    """Return the text of `dmoerm --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dmoerm <command> ...",
            "",
            "commands:",
            *lines,
            "",
            "dmoerm <command> --help lists its options; --debug shows the traceback of an error.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*):
            The command and its arguments. If they are given, errors are raised. By default they are those of the process, and
            an error ends it with a line on stderr; see [`~dmoerm_trl.console.run`].

    Returns:
        The exit status: 0, or 2 for an unknown command.
    """
    if argv is None:
        run(main)
        return 0
    command, *arguments = argv or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(f"dmoerm {__version__}")
    elif command in COMMANDS:
        import_module(f"dmoerm_trl.scripts.{command.replace('-', '_')}").main(arguments)
    else:
        nearest = "".join(f" Did you mean {name}?" for name in get_close_matches(command, COMMANDS, n=1))
        need = f"need one of {', '.join(COMMANDS)}."
        print(f"dmoerm: got command {command!r}, {need}{nearest}\n\n{usage()}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
