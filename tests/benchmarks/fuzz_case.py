"""A case of the fuzz, what comes of one, and the well-formed material that cases are made of."""

import json
import re
import time
from collections.abc import Callable
from ctypes import c_int
from dataclasses import dataclass
from multiprocessing import RawValue
from pathlib import Path
from typing import Any

import yaml
from forks import Fork
from fuzz_server import serve
from fuzz_values import TABLE
from kills import training

LIMIT = 90
"""Seconds."""
MEMORY = 6 << 30
"""Bytes that a case may take."""

OWN = (
    "ValueError",
    "RowError",
    "JudgeError",
    "FileNotFoundError",
    "NotADirectoryError",
    "IsADirectoryError",
    "OSError",
)
"""Exceptions that are no crash, wherever they were raised; `PermissionError`, `RuntimeError` and the like are if not by the package."""

FOREIGN = re.compile(rf"error: (?!(?:{'|'.join(OWN)}):)[A-Z]\w*(?:Error|Exception|Invalid)(?::|$)", re.MULTILINE)
"""In a message that a program makes of a foreign exception."""

WAY_OUT = re.compile(
    r"\bneed\b|\bchoose\b|\buse\b|\bgive\b|\badd\b|\binstall\b|\brename\b|\bdelete\b|\bleave\b|\bmend\b|\bwrite\b|\bset\b|"
    r"\braise\b|\blower\b|\bchange\b|\bselect one of\b|\bunset\b|\bname another\b|the following arguments are required|unrecognized arguments|"
    r"invalid choice|must be|did you mean|\bexpected\b|\bonly\b|please remove|lists the options",
    re.IGNORECASE,
)


@dataclass
class Case:
    """
    One malformed input.

    Args:
        what (`str`): what was changed.
        start (`Callable`), arguments (`tuple`): what is called with it in a process of its own.
        place (`tuple`): what a message has to name: each of the texts, of a tuple one.
        right (`Callable`, *optional*): of what was printed, the outcome where the process ends without an error; without it none
            but an error is right.
        late (`Callable`, *optional*): whether an error came too late.
    """

    what: str
    start: Callable[..., Any]
    arguments: tuple
    place: tuple[str | tuple[str, ...], ...]
    right: Callable[[str], str] | None = None
    late: Callable[[], bool] | None = None


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """Runs a case in a folder. Returns the outcome and what was said of it."""
    log = folder / "said"
    process = Fork(case.start, *case.arguments, log=log, folder=folder, memory=MEMORY)
    status = process.wait(LIMIT)
    process.kill()
    said = log.read_text(errors="replace").replace("\r", "\n") if log.exists() else ""
    if status is None:
        return "hang", said[-500:]
    if status == 0:
        return ("wrong" if case.right is None else case.right(said)), said[-500:]
    message, foreign = error_of(said)
    if status < 0 or foreign or not message:
        return "crash", message or f"ended with {status}: {said[-500:]}"
    places = [place if isinstance(place, tuple) else (place,) for place in case.place]
    named = all(any(text.lower() in message.lower() for text in texts) for texts in places) and WAY_OUT.search(message)
    if case.late is not None and case.late():
        return "unnamed", f"late: {message}"
    return "named" if named else "unnamed", message


def error_of(said: str) -> tuple[str, bool]:
    """The message of the error that ended a process, and whether it is a foreign one's."""
    lines = [line for line in said.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not starts:
        said = said[said.rfind("dmoerm: error:") :] if "dmoerm: error:" in said else "\n".join(lines[-12:])
        return said, FOREIGN.search(said) is not None
    frames = [line for line in lines[starts[-1] :] if line.startswith('  File "')]
    rest = [number for number in range(starts[-1] + 1, len(lines)) if not lines[number].startswith(" ")]
    if not rest:
        return "", True
    kind = lines[rest[0]].split(":")[0].split(".")[-1]
    ours = bool(frames) and re.search(r"/(dmoerm_trl|examples)/", frames[-1]) is not None
    return "\n".join(lines[rest[0] :]), not (kind in OWN or (ours and kind in ("RuntimeError", "ImportError")))


class Material:
    """Rows, models and recipes in a folder, and a judge's server."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.train = training(folder)
        self.table = folder / "table.yaml"
        self.table.write_text(yaml.safe_dump(TABLE))
        port = RawValue(c_int)
        self.server = Fork(serve, folder.parent / "replies", port, log=folder / "server.log")
        while not port.value:
            time.sleep(0.01)
        self.port = port.value

    def __enter__(self) -> "Material":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.kill()

    def result_of(self, name: str, start: Callable[..., Any], *arguments: Any) -> None:
        """Runs what has to end well."""
        log = self.folder / f"{name}.log"
        process = Fork(start, *arguments, log=log)
        if (status := process.wait(300)) != 0:
            raise RuntimeError(f"{name}: ended with {status}: {log.read_text()[-3000:]}")


def lines_of(path: Path) -> list[Any]:
    """What stands in a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
