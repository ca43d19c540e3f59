"""Conversion of scores and ratings to ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .preference_row import RowError, short


def number(value: Any) -> float | None:
    """Convert a score to a finite number, or to None if it is missing, NaN, infinite, or a text such as `"N/A"`."""
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return score if math.isfinite(score) else None


def ranks_of(scores: Sequence[float], tie_margin: float = 0.0, *, gaps: bool = False) -> list[int]:
    """
    Return one rank per score, 1 for the greatest.

    From the greatest score down, the first score of a rank opens it. Scores at most `tie_margin` below the first share its
    rank. A rank therefore never spans more than the margin, even in a long chain of close scores.

    Args:
        gaps (`bool`): Whether the rank after a tie of two is two more, as in a competition, or one more.
    """
    ranks, rank, opened = [0] * len(scores), 0, math.inf
    for place, index in enumerate(sorted(range(len(scores)), key=lambda index: -scores[index]), start=1):
        if rank == 0 or opened - scores[index] > tie_margin:
            rank, opened = place if gaps else rank + 1, scores[index]
        ranks[index] = rank
    return ranks


def overall_ranks(values: Sequence[Any], tie_margin: float) -> list[int]:
    """
    Return the ranks of a row's responses, one per score.

    Raises:
        [`RowError`]: If a response has no score, because its rank is then unknown.
    """
    scores = [number(value) for value in values]
    if None in scores:
        value = values[scores.index(None)]
        raise RowError("response without a score", f"got the score {short(value)}, need a number for each response.")
    return ranks_of(scores, tie_margin)


def capability_labels(ratings: Mapping[str, Sequence[Any]], tie_margin: float) -> dict[str, dict[str, list]]:
    """
    Return the capability labels of a row as arguments of [`PreferenceRow`].

    Args:
        ratings (`Mapping[str, Sequence]`): Capability point -> one value per response. Greater is better.

    Returns:
        `capability_ranks` for the points on which every response is rated. The other points have `capability_pairs` of the
        rated responses, or are left out if there is no such pair.
    """
    ranks, pairs = {}, {}
    for point, values in ratings.items():
        scores = [number(value) for value in values]
        rated = [index for index, score in enumerate(scores) if score is not None]
        found = ranks_of([scores[index] for index in rated], tie_margin)
        if len(rated) == len(scores):
            ranks[point] = found
            continue
        decided = [
            [better, worse]
            for better, high in zip(rated, found, strict=True)
            for worse, low in zip(rated, found, strict=True)
            if high < low
        ]
        if decided:
            pairs[point] = decided
    return {"capability_ranks": ranks, "capability_pairs": pairs}
