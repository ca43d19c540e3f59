"""Which questions a row needs: at which capability points, and which of its responses are compared."""

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from ..data.preference_row import PreferenceRow, short
from ..tasks import TaskTable
from .judges import Question

Pair = tuple[int, int]
"""The indices of two responses of a row."""

Comparisons = Generator[list[Pair], list[int | None], None]
"""Yields pairs to compare, and is sent of each the index of the better response, or `None` where the judge did not agree
with itself."""


def every_pair(responses: Sequence[int], rng: random.Random, limit: int | None = None) -> Comparisons:
    """All pairs at once, or `limit` of them, drawn at random: those of a lower limit are among those of a higher one."""
    pairs = list(combinations(responses, 2))
    if limit is not None and limit < len(pairs):
        rng.shuffle(pairs)
        pairs = sorted(pairs[:limit])
    yield pairs


def insertion_sort(responses: Sequence[int], rng: random.Random) -> Comparisons:
    """
    Sorts by binary insertion, in random order, one comparison at a time: at most [`insertion_bound`] of them.

    Where a comparison has no winner, the response that was being placed is left out of the sorted ones: its place is not
    known, and what was found out about it before stays.
    """
    order = rng.sample(responses, len(responses))
    ranked = order[:1]  # the best first
    for response in order[1:]:
        low, high = 0, len(ranked)
        while low < high:
            middle = (low + high) // 2
            (better,) = yield [(min(response, ranked[middle]), max(response, ranked[middle]))]
            if better is None:
                break
            low, high = (low, middle) if better == response else (middle + 1, high)
        else:
            ranked.insert(low, response)


def insertion_bound(count: int) -> int:
    """The most comparisons that [`insertion_sort`] makes of so many responses: `ceil(log2(i + 1))` to place one among i."""
    return sum(placed.bit_length() for placed in range(1, count))


@dataclass(frozen=True)
class Plan:
    """
    Which questions rows need.

    Args:
        tasks (`TaskTable`):
            A row is asked about at the points of its task, one of `others` at the overall points.
        points (`Sequence[str]`, *optional*):
            These points alone.
        overall_points (`bool`, *optional*, defaults to `False`):
            Rows of a task are asked about at the overall points too, from which DMoERM-w/o-Outer learns.
        order (`str`, *optional*, defaults to `"all"`):
            `"all"` compares every pair of a row's responses, `"sort"` as many as it takes to sort them.
        max_pairs (`int`, *optional*):
            The most pairs of a prompt at a point, with `"all"`. Of rows with the same prompt the first ones take them.
        seed (`int`, *optional*, defaults to 0):
            Draws the pairs, and the order of sorting.
        without_task (`str`, *optional*, defaults to `"raise"`):
            What to do with a row without a task: `"raise"`, or ask at the `"overall"` points.

    Raises:
        ValueError: for a setting that makes no sense.
    """

    tasks: TaskTable
    points: Sequence[str] | None = None
    overall_points: bool = False
    order: Literal["all", "sort"] = "all"
    max_pairs: int | None = None
    seed: int = 0
    without_task: Literal["raise", "overall"] = "raise"

    def __post_init__(self):
        known = list(
            dict.fromkeys([*(p for points in self.tasks.tasks.values() for p in points), *self.tasks.overall])
        )
        if self.points is not None and (unknown := [point for point in self.points if point not in known]):
            raise ValueError(f"`points`: got {unknown}, which no task has, need some of {known}.")
        if self.order not in ("all", "sort"):
            raise ValueError(f"`order`: got {self.order!r}, need 'all' (every pair) or 'sort' (fewer comparisons).")
        if self.without_task not in ("raise", "overall"):
            raise ValueError(f"`without_task`: got {self.without_task!r}, need 'raise' or 'overall'.")
        if self.max_pairs is not None and (self.max_pairs < 1 or self.order == "sort"):
            raise ValueError(
                f"`max_pairs`: got {self.max_pairs} with `order: {self.order}`, need at least 1 and `order: all` because a "
                "sort has no choice of its pairs: leave one of them out."
            )

    def wanted_points(self, row: PreferenceRow) -> list[str]:
        """
        The points at which a row should have labels.

        Raises:
            ValueError: if the row has no task, and `without_task` says so.
        """
        if row.task is None and self.without_task == "raise":
            raise ValueError(
                f"got a row without a task (its prompt ends {short(row.prompt[-1]['content'])}), need one because the points "
                "are those of the task: name the task in the rows, or set `without_task: overall` to ask at the overall points."
            )
        of_task = self.tasks.tasks.get(row.task, ())
        points = [*of_task, *(self.tasks.overall if self.overall_points or not of_task else ())]
        return [point for point in dict.fromkeys(points) if self.points is None or point in self.points]

    def points_of(self, row: PreferenceRow) -> list[str]:
        """The points at which a row is asked about: the wanted ones of which it has no labels yet."""
        labelled = row.labelled_points
        return [point for point in self.wanted_points(row) if point not in labelled]

    def comparisons(self, row: PreferenceRow, point: str, taken: int = 0) -> Comparisons:
        """
        The comparisons of a row at a point. They depend on the row, the point, the seed and `taken` alone: how many of the
        `max_pairs` of the prompt the rows before it take.
        """
        rng = random.Random(f"{self.seed} {row.prompt_id} {point}")
        distinct = distinct_responses(row)
        return insertion_sort(distinct, rng) if self.order == "sort" else every_pair(distinct, rng, self._left(taken))

    def most_comparisons(self, row: PreferenceRow, taken: int = 0) -> int:
        """How many comparisons a point takes: exactly with `"all"`, at most with `"sort"`."""
        count = len(distinct_responses(row))
        if self.order == "sort":
            return insertion_bound(count)
        pairs = count * (count - 1) // 2
        return pairs if self.max_pairs is None else min(pairs, self._left(taken))

    def _left(self, taken: int) -> int | None:
        return None if self.max_pairs is None else max(0, self.max_pairs - taken)


def distinct_responses(row: PreferenceRow) -> list[int]:
    """The indices of the responses whose text no earlier one has: a text is not compared with itself."""
    return sorted({text: index for index, text in reversed([*enumerate(row.responses)])}.values())


def both_orders(row: PreferenceRow, pair: Pair, point: str) -> tuple[Question, Question]:
    """The two questions about a pair: in its own order, and with the positions swapped."""
    first, second = (row.responses[index] for index in pair)
    return (
        Question(row.prompt, first, second, point, row.task),
        Question(row.prompt, second, first, point, row.task),
    )


def agreed(pair: Pair, choice: int | None, swapped: int | None) -> int | None:
    """The index of the response that both answers call the better one, or `None`."""
    return {(1, 2): pair[0], (2, 1): pair[1]}.get((choice, swapped))
