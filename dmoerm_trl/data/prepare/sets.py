"""The public sets that are known by name."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...tasks import TaskTable
from ..preference_row import PreferenceRow, check_row
from ..prepare import pairwise, scored
from ..rows import LoadReport, parse_row


@dataclass(frozen=True)
class PreferenceSet:
    """
    How the examples of a set become rows.

    Args:
        convert (`Callable`):
            One example -> [`PreferenceRow`], or with `group_by` the examples of one prompt; a [`RowError`] says why there is
            no row. Its keyword arguments are the set's options.
        columns (`tuple[str, ...]`):
            The columns that it reads.
        group_by (`tuple[str, ...]`):
            Where an example is one response: the columns that tell the prompts apart, the first that there is counts.
        consecutive (`bool`):
            Whether the examples of a prompt follow each other, so that they can be read as a stream.
        points (`tuple[str, ...]`):
            The set's own names of the capability points.
    """

    convert: Callable[..., PreferenceRow]
    columns: tuple[str, ...]
    group_by: tuple[str, ...] = ()
    consecutive: bool = True
    points: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(inspect.signature(self.convert).parameters)[1:]

    def with_options(self, options: Mapping[str, Any]) -> "PreferenceSet":
        """
        The set with some options bound. `aspects` are columns and points too.

        Raises:
            ValueError: for an option that the set does not have.
        """
        if unknown := [name for name in options if name not in self.options]:
            raise ValueError(
                f"got `{unknown[0]}`, which this set does not have, need some of {self.options}: leave it out."
            )
        aspects = tuple(options.get("aspects", ()))
        return replace(
            self,
            convert=partial(self.convert, **options),
            columns=self.columns + aspects,
            points=self.points + aspects,
        )


def accepted(
    example: dict[str, Any], *, tasks: TaskTable | None = None, report: LoadReport | None = None
) -> PreferenceRow:
    """
    A row in any format that training accepts, see recipes/DATA.md, under the task table `tasks`, by default the paper's;
    `report` counts what is not read, and how prompts were found.
    """
    tasks = tasks or TaskTable.paper()
    row = parse_row(example, tasks, LoadReport("set") if report is None else report)
    check_row(row, tasks)
    return row


SETS: dict[str, PreferenceSet] = {
    "hh": PreferenceSet(pairwise.hh, ("chosen", "rejected")),
    "shp": PreferenceSet(
        pairwise.shp, ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B", "score_ratio")
    ),
    "ultrafeedback": PreferenceSet(
        scored.ultrafeedback, ("instruction", "completions"), points=scored.ULTRAFEEDBACK_ASPECTS
    ),
    "helpsteer2": PreferenceSet(
        scored.helpsteer2,
        ("prompt", "response", *scored.HELPSTEER2_ATTRIBUTES),
        group_by=("prompt",),
        points=scored.HELPSTEER2_ATTRIBUTES,
    ),
    "helpsteer2-preference": PreferenceSet(
        pairwise.helpsteer2_preference, ("prompt", "response_1", "response_2", "preference_strength")
    ),
    "helpsteer3": PreferenceSet(
        pairwise.helpsteer3, ("context", "response1", "response2", "overall_preference", "individual_preference")
    ),
    "dmoerm": PreferenceSet(accepted, ("src", "response", "rank")),
    "trl": PreferenceSet(accepted, ("chosen", "rejected")),
    "rows": PreferenceSet(accepted, ("responses", "ranks")),
    "pairs": PreferenceSet(pairwise.pairs, ("prompt", "response_1", "response_2", "preferred")),
    "scored": PreferenceSet(scored.scored, ("prompt", "responses", "scores")),
    "table": PreferenceSet(
        scored.table, ("prompt", "response", "score"), group_by=("prompt_id", "prompt"), consecutive=False
    ),
}
"""Name -> set. Those from `trl` on are formats that many sets have."""
