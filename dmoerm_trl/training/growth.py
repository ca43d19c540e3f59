"""What of a run stays when its recipe or its rows change, and what is to be trained again."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .stages import Manifest, Stage, StageRecord, differences, identities


@dataclass
class Growth:
    """
    Which finished trainings of a folder are those of the recipe as it is now.

    Attributes:
        stays (`list[str]`): trainings that are made of the same.
        again (`dict[str, list[str]]`): finished trainings that are made of something else -> the recipe's keys in which, none
            where a training that they build on changes.
        new (`list[str]`): trainings that are not there.
        gone (`list[str]`): finished trainings that the recipe does not have any more, beside some that it has.
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
        Compare what the stages are made of now with what the finished ones were made of.

        Args:
            records (`Mapping`): what each stage is made of now.
            finished (`Manifest`): the folder.
            data (`Iterable[str]`): the recipe's keys in which its rows differ from the folder's.
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
        """The keys of the recipe in which finished trainings differ."""
        return sorted({key for keys in self.again.values() for key in keys} | ({"tasks"} if self.gone else set()))

    def __str__(self) -> str:
        again = [f"{name} ({', '.join(keys) if keys else 'what it builds on'})" for name, keys in self.again.items()]
        lists = {"stay": self.stays, "are trained again": again, "are new": self.new}
        return "\n".join(f"  {what}: {', '.join(names)}" for what, names in lists.items() if names)
