"""Tasks and their capability points: the paper's table 12 or a YAML file."""

import re
import reprlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .yaml_file import read_yaml

OTHERS = "others"
"""Label of rows that belong to none of the tasks. It has no inner model; the router sends the rows to one of the tasks."""

OVERALL = "overall"
"""Name of the only task of DMoERM-w/o-Outer."""

PAPER = {"en": "paper.yaml", "zh": "paper-zh.yaml"}
"""Language -> file of the paper's table 12 in that language."""


@dataclass(frozen=True)
class TaskTable:
    """
    The tasks of the outer layer and the capability points of each inner model.

    Args:
        tasks (`dict[str, tuple[str, ...]]`):
            Task name -> names of its capability points, in the order of the experts.
        overall (`tuple[str, ...]`):
            The capability points of DMoERM-w/o-Outer, the one inner model for everything.

    Raises:
        ValueError: If a name is not text, is not printable, or does not give a folder name of its own; see [`slug`].

    Example:

    ```python
    from dmoerm_trl import TaskTable

    table = TaskTable({"chitchat": ("empathy ability", "logic")}, overall=("logic",))
    assert "roleplay" in TaskTable.load("paper").tasks  # table 12
    ```
    """

    tasks: dict[str, tuple[str, ...]]
    overall: tuple[str, ...]

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("got no task, need at least one: list them under `tasks`.")
        for name in (*self.tasks, *self.overall, *(point for points in self.tasks.values() for point in points)):
            check_name(name)
        for reserved in {OTHERS, OVERALL} & set(self.tasks):
            raise ValueError(f"got a task named {reserved!r}, which is reserved: rename it.")
        folders: dict[str, str] = {}
        for task in self.tasks:
            if (folder := slug(task)) in folders:
                raise ValueError(
                    f"got the tasks {folders[folder]!r} and {task!r}, need distinct words because both would "
                    f"have the folder {folder!r}: rename one."
                )
            folders[folder] = task
        for task, points in {**self.tasks, OVERALL: self.overall}.items():
            slugs = [slug(point) for point in points]
            if not points or len(set(slugs)) != len(slugs):
                raise ValueError(f"task {task!r}: got points {list(points)}, need at least one, all distinct words.")

    @classmethod
    @cache
    def paper(cls, language: str = "en") -> "TaskTable":
        """Return the paper's table 12, in English (`"en"`) or Chinese (`"zh"`)."""
        if language not in PAPER:
            raise ValueError(f"got language {language!r}, need one of {sorted(PAPER)}.")
        return cls.load(str(Path(__file__).parent / "tables" / PAPER[language]))

    @classmethod
    def load(cls, source: str) -> "TaskTable":
        """
        Read a table: `"paper"`, `"paper-zh"`, or the path of a YAML file with `tasks` (name -> list of points) and
        `overall` (list of points).

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a table; the message names the file.
        """
        if source == "paper" or source.startswith("paper-"):
            return cls.paper(source.removeprefix("paper").removeprefix("-") or "en")
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"got tasks {source!r}, need 'paper', 'paper-zh' or the path of a YAML file.")
        content = read_yaml(path).content
        if set(content) != {"tasks", "overall"} or not isinstance(content["tasks"], dict):
            raise ValueError(f"{path}: need exactly the keys `tasks` (name -> points) and `overall` (points).")
        for name, points in {**content["tasks"], OVERALL: content["overall"]}.items():
            if not isinstance(points, list) or not all(isinstance(point, str) for point in points):
                raise ValueError(
                    f"{path}: `{name}` has {reprlib.repr(points)}, need a list of capability points, each of them text: write "
                    "words such as `yes`, numbers and dates in quotes."
                )
        tasks = {task: tuple(points) for task, points in content["tasks"].items()}
        try:
            return cls(tasks, tuple(content["overall"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


LONGEST_NAME = 120
"""Maximum bytes of a [`slug`]: the name of a file has two of them and a few more characters, and at most 255 bytes."""


def check_name(name: Any, what: str = "a task or a point") -> None:
    """
    Check the name of a task, a capability point, or anything else that names a folder or a file.

    Raises:
        ValueError: If it is not text, is not printable, is too long for the name of a folder, or has no letter or digit.
    """
    if not isinstance(name, str):
        raise ValueError(f"got the name {name!r} of {what}, need text: write it in quotes.")
    if not name.replace("\u200c", "").replace("\u200d", "").isprintable():  # they join letters in some languages
        raise ValueError(
            f"got the name {name!a} of {what}, need printable characters, because it is shown to users: rename it."
        )
    if not (length := len(slug(name).encode())) or length > LONGEST_NAME:
        raise ValueError(
            f"got the name {reprlib.repr(name)} of {what}, need one with letters or digits, and with no more than "
            f"{LONGEST_NAME} bytes of them ({length}) because it names folders: rename it."
        )


def slug(name: str) -> str:
    """Convert a name to the form that names a module, an adapter or a folder: `"empathy ability"` -> `"empathy_ability"`."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")
