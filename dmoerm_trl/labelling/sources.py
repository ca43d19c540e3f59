"""
A weak label from who wrote a response: some systems, or people, write better than others whatever they are asked.

Public sets often say which system gave a response. Where some responses are ranked, the ranks tell how strong each system is,
and that labels every other response of these systems without a judge: far more texts than were ranked, and without the noise
of a single comparison. What it cannot tell is where a strong system failed.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import log1p

import numpy as np

from .weak import ranks_of


def source_strength(ranked: Iterable[tuple[Sequence[int], Sequence[str]]]) -> dict[str, float]:
    """
    The share of its comparisons that each source wins.

    Args:
        ranked (`Iterable`): for each prompt the overall ranks of K responses, 1 is best, and their K sources. Take training
            prompts alone.

    Returns:
        `dict`: source -> share, between 0 and 1, of the comparisons with responses of other sources to the same prompt; a tie
        is half a win. A source that is compared with no other is absent.
    """
    wins: dict[str, float] = defaultdict(float)
    comparisons: dict[str, int] = defaultdict(int)
    for ranks, sources in ranked:
        for rank, source in zip(ranks, sources, strict=True):
            for other_rank, other in zip(ranks, sources, strict=True):
                if other != source:
                    wins[source] += (rank < other_rank) + 0.5 * (rank == other_rank)
                    comparisons[source] += 1
    return {source: wins[source] / count for source, count in comparisons.items()}


def length_controlled_strength(
    ranked: Iterable[tuple[Sequence[int], Sequence[str], Sequence[int]]], ridge: float = 1e-3
) -> dict[str, float]:
    """
    How strong each source is at equal length: the Bradley-Terry model with a term for length, as that of length-controlled
    AlpacaEval (Dubois et al. 2024). A response x of the source X comes before y of Y with the probability

        sigmoid(s_X - s_Y + b (log(1 + |x|) - log(1 + |y|)))

    and s and b are those of least mean cross-entropy plus `ridge` times their sum of squares.

    Args:
        ranked (`Iterable`): as of [`source_strength`], with a third member: the lengths of the K responses.

    Returns:
        `dict`: source -> s, in log-odds. A source that is compared with no other is absent.
    """
    places: dict[str, int] = defaultdict(lambda: len(places))
    compared = [
        (
            places[sources[i]],
            places[sources[j]],
            log1p(lengths[i]) - log1p(lengths[j]),
            (1 + np.sign(ranks[j] - ranks[i])) / 2,
        )
        for ranks, sources, lengths in ranked
        for i, j in combinations(range(len(ranks)), 2)
        if sources[i] != sources[j]
    ]
    if not compared:
        return {}
    first, second, longer, won = (np.array(column) for column in zip(*compared, strict=True))
    w = np.zeros(len(places) + 1)  # of the sources, then of length
    for _ in range(100):  # Newton's method
        odds = w[first] - w[second] + w[-1] * longer
        predicted = 1 / (1 + np.exp(-odds))
        gradient, curvature = 2 * ridge * w, 2 * ridge * np.eye(len(w))
        signs = ((first, 1.0), (second, -1.0), (np.full(len(first), len(w) - 1), longer))
        for place, sign in signs:
            np.add.at(gradient, place, sign * (predicted - won) / len(won))
            for other, other_sign in signs:
                np.add.at(curvature, (place, other), sign * other_sign * predicted * (1 - predicted) / len(won))
        step = np.linalg.solve(curvature, gradient)
        w -= step
        if np.abs(step).max() < 1e-9:
            break
    return {source: float(w[place]) for source, place in places.items()}


def source_ranks(strength: Mapping[str, float], sources: Sequence[str], tolerance: float = 0.1) -> list[int]:
    """
    Ranks the responses to a prompt by the strength of their sources, as a preference row takes them in `capability_ranks`.

    Args:
        strength (`Mapping[str, float]`): source -> a number, higher is better, such as [`source_strength`] or
            [`length_controlled_strength`] gives.
        sources (`Sequence[str]`): the sources of K responses.
        tolerance (`float`): as of [`ranks_of`].

    Raises:
        ValueError: for a source of unknown strength.
    """
    if unknown := [source for source in sources if source not in strength]:
        raise ValueError(
            f"got the source {unknown[0]!r}, need one of known strength because its response could not be ranked: rank a "
            "response of it against others, or leave the label out of this row."
        )
    return ranks_of([strength[source] for source in sources], tolerance)
