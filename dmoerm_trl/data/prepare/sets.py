"""The table of the known public sets."""

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
    Converter and columns of a set.

    Args:
        convert (`Callable`):
            Function from one example, or with `group_by` from the examples of one prompt, to a [`PreferenceRow`]. It raises a
            [`RowError`] if there is no row. Its keyword arguments are the options of the set.
        columns (`tuple[str, ...]`):
            Columns that it reads.
        group_by (`tuple[str, ...]`):
            If an example is one response: the columns that identify a prompt, of which the first one that exists is used.
        consecutive (`bool`):
            Whether the examples of a prompt are consecutive, so that they can be streamed.
        points (`tuple[str, ...]`):
            Names of the capability points in the set.
    """

    convert: Callable[..., PreferenceRow]
    columns: tuple[str, ...]
    group_by: tuple[str, ...] = ()
    consecutive: bool = True
    points: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(inspect.signature(self.convert).parameters)[1:]

    def with_options(self, options: Mapping[str, Any]) -> "PreferenceSet":
        """
        Return the set with some options bound. `aspects` are columns and points too.

        Raises:
            ValueError: If the set does not have an option.
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
    Convert a row in any format that training accepts (recipes/DATA.md), with the task table `tasks`, by default the paper's.
    `report` counts ignored fields, and how prompts were found.
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
"""Name -> set. The entries from `trl` on are formats of many sets."""
