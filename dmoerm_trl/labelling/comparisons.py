"""Selection of a row's questions: the capability points, and the pairs of responses to compare."""

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
"""Yields lists of pairs to compare; is sent, for each pair, the index of the better response, or `None` if the judge's two
answers disagree."""


def every_pair(responses: Sequence[int], rng: random.Random, limit: int | None = None) -> Comparisons:
    """Compare all pairs at once, or `limit` of them drawn at random. A lower limit draws a subset of a higher one's pairs."""
    pairs = list(combinations(responses, 2))
    if limit is not None and limit < len(pairs):
        rng.shuffle(pairs)
        pairs = sorted(pairs[:limit])
    yield pairs


def insertion_sort(responses: Sequence[int], rng: random.Random) -> Comparisons:
    """
    Sort by binary insertion, in random order, with one comparison at a time and at most [`insertion_bound`] of them.

    If a comparison has no winner, the response being inserted is left out of the sorted list because its position is unknown;
    the labels from its earlier comparisons are kept.
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
    """Maximum number of comparisons of [`insertion_sort`]: `ceil(log2(i + 1))` to insert a response among i others."""
    return sum(placed.bit_length() for placed in range(1, count))


@dataclass(frozen=True)
class Plan:
    """
    Selection of the questions that rows need.

    Args:
        tasks (`TaskTable`):
            Capability points of each task. A row of a task is labelled at the points of the task, a row of `others` at the
            overall points.
        points (`Sequence[str]`, *optional*):
            Restricts labelling to these points.
        overall_points (`bool`, *optional*, defaults to `False`):
            Whether to label the rows of a task at the overall points too, which DMoERM-w/o-Outer is trained on.
        order (`str`, *optional*, defaults to `"all"`):
            `"all"` compares every pair of a row's responses, `"sort"` only the pairs needed to sort them.
        max_pairs (`int`, *optional*):
            Maximum number of pairs per prompt and point, with `"all"`. If several rows have the same prompt, the first rows
            get these pairs.
        seed (`int`, *optional*, defaults to 0):
            Seed for drawing the pairs and the order of sorting.
        without_task (`str`, *optional*, defaults to `"raise"`):
            What to do with a row without a task: `"raise"` an error, or label it at the `"overall"` points.

    Raises:
        ValueError: For an unknown point or value, or a `max_pairs` that is below 1 or combined with `"sort"`.
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
        List the points at which a row should have labels.

        Raises:
            ValueError: If the row has no task and `without_task` is `"raise"`.
        """
        if row.task is None and self.without_task == "raise":
            raise ValueError(
                f"got a row without a task (its prompt ends {short(row.prompt[-1]['content'])}), need one because the points "
                "are those of the task: name the task in the rows, or set `without_task: overall` to ask at the overall points."
            )
        task_points = self.tasks.tasks.get(row.task, ())
        points = [*task_points, *(self.tasks.overall if self.overall_points or not task_points else ())]
        return [point for point in dict.fromkeys(points) if self.points is None or point in self.points]

    def points_of(self, row: PreferenceRow) -> list[str]:
        """List the points to ask about: those of [`wanted_points`] at which the row has no labels yet."""
        labelled = row.labelled_points
        return [point for point in self.wanted_points(row) if point not in labelled]

    def comparisons(self, row: PreferenceRow, point: str, taken: int = 0) -> Comparisons:
        """
        The comparisons of a row at a point. They depend only on the row, the point, the seed and `taken`, the number of the
        prompt's `max_pairs` that earlier rows use.
        """
        rng = random.Random(f"{self.seed} {row.prompt_id} {point}")
        distinct = distinct_responses(row)
        return (
            insertion_sort(distinct, rng)
            if self.order == "sort"
            else every_pair(distinct, rng, self._remaining(taken))
        )

    def most_comparisons(self, row: PreferenceRow, taken: int = 0) -> int:
        """Number of comparisons at a point: exact with `"all"`, an upper bound with `"sort"`."""
        count = len(distinct_responses(row))
        if self.order == "sort":
            return insertion_bound(count)
        pairs = count * (count - 1) // 2
        return pairs if self.max_pairs is None else min(pairs, self._remaining(taken))

    def _remaining(self, taken: int) -> int | None:
        return None if self.max_pairs is None else max(0, self.max_pairs - taken)


def distinct_responses(row: PreferenceRow) -> list[int]:
    """Indices of the responses without an earlier duplicate, because a text is not compared with itself."""
    return sorted({text: index for index, text in reversed([*enumerate(row.responses)])}.values())


def both_orders(row: PreferenceRow, pair: Pair, point: str) -> tuple[Question, Question]:
    """Build the two questions about a pair: in the pair's order, and with the positions swapped."""
    first, second = (row.responses[index] for index in pair)
    return (
        Question(row.prompt, first, second, point, row.task),
        Question(row.prompt, second, first, point, row.task),
    )


def agreed(pair: Pair, choice: int | None, swapped: int | None) -> int | None:
    """Index of the response that both answers prefer, or `None`."""
    return {(1, 2): pair[0], (2, 1): pair[1]}.get((choice, swapped))
