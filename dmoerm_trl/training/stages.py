"""Records of the stages of a run: the settings and inputs of each, and the manifest of the finished ones."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..files import as_json, changed_keys, file_digest, write_json

History = list[dict[str, Any]]
StageRecord = dict[str, Any]
"""
Settings and inputs of a stage. `settings` are those of the recipe on which it depends. `rows` is a digest of the rows that it
reads, or one digest per point for a stage of experts. `needs` are the [`identities`] of the trainings that it builds on.
"""


class Stage(NamedTuple):
    """Step of a run that writes the folder `output_dir/<name>`. It runs after the stages that it needs."""

    run: Callable[[Path], History]
    needs: tuple[str, ...] = ()
    trainings: tuple[str, ...] | None = None  # folders in it with a history each; None for the stage itself
    # settings of the recipe on which it depends, besides those of its needs
    settings: Mapping[str, Any] = MappingProxyType({})
    rows: tuple[str, ...] = ()  # keys to the digest of its rows in `RunData.digests`


def stage_records(stages: Mapping[str, Stage], digests: Mapping[str, Any]) -> dict[str, StageRecord]:
    """
    Return the current record of each stage.

    Args:
        digests (`Mapping`): Digests of the rows. The `rows` of a stage without a digest are None.
    """
    found: dict[str, StageRecord] = {}
    for name, stage in stages.items():
        rows: Any = digests if stage.rows else None
        for key in stage.rows:
            rows = None if rows is None else rows.get(key)
        needs = [identities(need, found[need]) for need in stage.needs if need != "data"]
        record = {
            "settings": dict(stage.settings),
            "rows": rows,
            "needs": {k: v for need in needs for k, v in need.items()},
        }
        found[name] = as_json(record)
    return found


def identities(name: str, record: StageRecord) -> dict[str, str]:
    """
    Return the identity of each training of a stage. It changes with the record of the stage and of all that it builds on.
    """
    if isinstance(record["rows"], dict):
        return {f"{name}/{point}": identity({**record, "rows": rows}) for point, rows in record["rows"].items()}
    return {name: identity(record)}


def identity(record: StageRecord) -> str:
    """Return a digest of a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: StageRecord, now: StageRecord, data: Iterable[str]) -> list[str]:
    """
    Return the keys of the recipe in which two records differ, ignoring the trainings that they build on.

    Args:
        data (`Iterable[str]`): The changed keys on which the rows depend.
    """
    own, other = before["settings"], now["settings"]
    keys = set(changed_keys(own, other))
    rows, others = before["rows"], now["rows"]
    if isinstance(rows, dict) and isinstance(others, dict):
        keys.update(["tasks"] if rows.keys() != others.keys() else [])
        rows, others = ([of[point] for point in rows.keys() & others.keys()] for of in (rows, others))
    if rows != others:
        keys.update(data)
    return sorted(keys)


class Manifest:
    """
    File `manifest.json` of a run:

    - `recipe`: The settings with which the run was last started.
    - `stages`: Finished stage -> its record.
    - `files`: Stage -> the sizes of its files, or their digests for the data.
    - `begun`: Stage -> the folders in `work/` in which it was started.
    - `seconds`: Stage -> its duration.
    - `extends`: The folder of the run that this one extends.

    Args:
        root (`Path`): The folder of the run.

    Raises:
        ValueError: If the file is broken.
    """

    def __init__(self, root: Path):
        self.root, self.path = root, root / "manifest.json"
        self.content: dict[str, Any] = {}
        if self.path.exists():
            try:
                self.content = json.loads(self.path.read_text(encoding="utf-8"))
                if not all(isinstance(self.content[key], dict) for key in ("recipe", "seconds", "stages", "files")):
                    raise TypeError("it is another file")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: got a file that is not the manifest of a run ({error!r}), need one because it records "
                    "the settings and inputs of the stages in the folder: put it back, or name another `output_dir`."
                ) from error
        for key in ("recipe", "stages", "files", "begun", "seconds"):
            self.content.setdefault(key, {})

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def save(self) -> None:
        """Write the file if its content has changed."""
        if not self.path.exists() or json.loads(self.path.read_text(encoding="utf-8")) != self.content:
            write_json(self.path, self.content)

    def has(self, name: str) -> bool:
        """Return whether a stage, or one of its trainings, is finished."""
        return (self.root / name / "history.json").is_file()

    def record(self, name: str) -> StageRecord:
        """
        Return the record of a finished stage.

        Raises:
            ValueError: If the folder has a stage that is not in the manifest.
        """
        try:
            return self["stages"][name]
        except KeyError:
            raise ValueError(
                f"{self.root / name}: got a finished stage that is not in {self.path.name}, need it there because its settings "
                "and inputs are unknown otherwise: put the manifest back, delete the stage's folder to train it again, or name "
                "another `output_dir`."
            ) from None

    def note_files(self, name: str) -> None:
        """Record the files of a finished stage."""
        self["files"][name] = {
            path: _state(self.root / name / path, name == "data") for path in _files(self.root / name)
        }

    def check_files(self, name: str) -> None:
        """
        Check that the files of a finished stage are unchanged.

        Raises:
            ValueError: If a file is missing or incomplete, or if a data file was edited.
        """
        for path, before in self["files"].get(name, {}).items():
            file = self.root / name / path
            now = _state(file, name == "data") if file.is_file() else None
            if now != before:
                what = "no file" if now is None else "an edited file" if name == "data" else f"{now} bytes"
                need = "the one" if name == "data" else f"the {before} bytes"
                raise ValueError(
                    f"{file}: got {what}, need {need} that the run wrote, because later stages are built on it: put the file "
                    f"back, or delete {self.root / name}, which the next start writes again."
                )


def _files(folder: Path) -> list[str]:
    """List all files except model cards, which people edit."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md")
    return [path.relative_to(folder).as_posix() for path in paths]


def _state(path: Path, exact: bool) -> int | str:
    """Return the digest of a file, or its size, which suffices for weights."""
    return file_digest([path]) if exact else path.stat().st_size
