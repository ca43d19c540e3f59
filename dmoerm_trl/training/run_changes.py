"""Find which trainings of a run can stay when its recipe or rows change, and which must be repeated."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .stages import Manifest, Stage, StageRecord, differences, identities


@dataclass
class Growth:
    """
    Comparison of the finished trainings of a folder with the current recipe.

    Attributes:
        stays (`list[str]`): Trainings whose settings, rows and needs are unchanged.
        again (`dict[str, list[str]]`): Finished trainings that must be repeated -> the keys of the recipe that changed; none if
            only a training that they build on changed.
        new (`list[str]`): Trainings that are not finished.
        gone (`list[str]`): Finished trainings that the recipe no longer has, in a stage of which it has others.
    """

    stays: list[str] = field(default_factory=list)
    again: dict[str, list[str]] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, stages: Mapping[str, Stage], records: Mapping[str, StageRecord], finished: Manifest, data: Iterable[str]
    ) -> "Growth":
        """
        Compare the current records of the stages with those of the finished ones.

        Args:
            records (`Mapping`): Current record of each stage.
            finished (`Manifest`): Manifest of the folder.
            data (`Iterable[str]`): Keys of the recipe by which its rows differ from those of the folder.
        """
        growth, data = cls(), list(data)
        for name in stages:
            if name == "data":
                continue
            before = finished.record(name) if finished.has(name) else None
            there = {} if before is None else identities(name, before)
            for training, identity in identities(name, records[name]).items():
                if training not in there:
                    growth.new.append(training)
                elif there[training] == identity:
                    growth.stays.append(training)
                else:
                    growth.again[training] = differences(before, records[name], data)
            for training in there.keys() - identities(name, records[name]).keys():
                growth.gone.append(training)
        return growth

    @property
    def keys(self) -> list[str]:
        """Return the keys of the recipe in which finished trainings differ."""
        return sorted({key for keys in self.again.values() for key in keys} | ({"tasks"} if self.gone else set()))

    def __str__(self) -> str:
        again = [f"{name} ({', '.join(keys) if keys else 'what it builds on'})" for name, keys in self.again.items()]
        lists = {"stay": self.stays, "are trained again": again, "are new": self.new}
        return "\n".join(f"  {what}: {', '.join(names)}" for what, names in lists.items() if names)
