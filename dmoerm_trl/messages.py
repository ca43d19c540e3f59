"""Quote foreign text in messages: errors of libraries, and text with control sequences of the terminal."""

import json
import sys
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent

SHOWN = 600
"""Maximum number of characters of a foreign error that are shown."""


def raised_here(error: BaseException) -> bool:
    """Return whether this package or the calling program raised an error on purpose, so that its message is for the user."""
    if not isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):  # others are bugs
        return False
    frames = traceback.extract_tb(error.__traceback__)
    places = PACKAGE, getattr(sys.modules.get("__main__"), "__file__", None) or PACKAGE
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(place) for place in places)


def reason(error: BaseException) -> str:
    """Return the message of a foreign error on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()} …"


def printable(text: str) -> str:
    """
    Escape the characters of a text that are not printable, except line breaks and tabs, as JSON does, so that it cannot control
    the terminal.
    """
    return "".join(c if c.isprintable() or c in "\n\r\t" else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """Return a text on one line, with unprintable characters escaped."""
    return printable(" ".join(text.split()))


def quoted(text: str) -> str:
    """Return untrusted text on one line, with unprintable characters and HTML escaped."""
    return one_line(text).translate({ord("<"): "‹", ord(">"): "›"})


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if character < "\U00010000" else json.dumps(character)[1:-1]
