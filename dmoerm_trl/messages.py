"""What others wrote, in messages of ours: errors of libraries, and texts that could steer a terminal."""

import json
import sys
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent

SHOWN = 600
"""Characters of a foreign error that are shown."""


def raised_here(error: BaseException) -> bool:
    """Whether an error was raised on purpose by this package or the program that uses it: its message is for the user."""
    if not isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):  # or a fault of ours
        return False
    frames = traceback.extract_tb(error.__traceback__)
    places = PACKAGE, getattr(sys.modules.get("__main__"), "__file__", None) or PACKAGE
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(place) for place in places)


def reason(error: BaseException) -> str:
    """What a foreign error says, on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()} …"


def printable(text: str) -> str:
    """
    A text that cannot steer a terminal: what is not printable in it, but ends of lines and tabs, is escaped as in JSON.
    """
    return "".join(c if c.isprintable() or c in "\n\r\t" else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """A text on one line that cannot steer a terminal."""
    return printable(" ".join(text.split()))


def quoted(text: str) -> str:
    """What a stranger wrote, on one line: it cannot steer a terminal and is no HTML."""
    return one_line(text).translate({ord("<"): "‹", ord(">"): "›"})


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if character < "\U00010000" else json.dumps(character)[1:-1]
