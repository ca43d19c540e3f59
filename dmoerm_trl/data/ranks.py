"""Scores and ratings as ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .preference_row import RowError, short


def number(value: Any) -> float | None:
    """Convert a score to a number; None for an absence, NaN, infinity, or a text that is no number, such as `"N/A"`."""
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return score if math.isfinite(score) else None


def ranks_of(scores: Sequence[float], tie_margin: float = 0.0, *, gaps: bool = False) -> list[int]:
    """
    One rank a score, 1 for the greatest.

    From the greatest score down, a score shares the rank of the one that opened it if it is at most `tie_margin` below. So
    a rank spans no more than the margin, however many scores stand close to each other in a chain.

    Args:
        gaps (`bool`): whether the rank after a tie of two is two more, as in a competition, or one more.
    """
    ranks, rank, opened = [0] * len(scores), 0, math.inf
    for place, index in enumerate(sorted(range(len(scores)), key=lambda index: -scores[index]), start=1):
        if rank == 0 or opened - scores[index] > tie_margin:
            rank, opened = place if gaps else rank + 1, scores[index]
        ranks[index] = rank
    return ranks


def overall_ranks(values: Sequence[Any], tie_margin: float) -> list[int]:
    """
    The ranks of a row.

    Raises:
        [`RowError`]: If a response has no score: where it stands among the others is not known.
    """
    scores = [number(value) for value in values]
    if None in scores:
        value = values[scores.index(None)]
        raise RowError("response without a score", f"got the score {short(value)}, need a number a response.")
    return ranks_of(scores, tie_margin)


def capability_labels(ratings: Mapping[str, Sequence[Any]], tie_margin: float) -> dict[str, dict[str, list]]:
    """
    The capability labels of a row, as arguments of [`PreferenceRow`].

    Args:
        ratings (`Mapping[str, Sequence]`): capability point -> one value a response, the greater the better.

    Returns:
        `capability_ranks` of the points on which every response is rated; of the others, `capability_pairs` among the
        rated responses. A point is absent where that leaves no pair.
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
