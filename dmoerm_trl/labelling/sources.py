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
    ranked: Iterable[tuple[Sequence[int], Sequence[str], Sequence[int]]], ridge: float = 1e-5
) -> dict[str, float]:
    """
    How strong each source is at equal length: the Bradley-Terry model with a term for length, after the idea of length-controlled
    AlpacaEval (Dubois et al. 2024). A response x of the source X comes before y of Y with the probability

        sigmoid(s_X - s_Y + b (log(1 + |x|) - log(1 + |y|)))

    and s and b are those of least mean cross-entropy plus `ridge` times their sum of squares.

    Args:
        ranked (`Iterable`): as of [`source_strength`], with a third member: the lengths of the K responses.
        ridge (`float`): keeps a source finite that wins everything. The more sources, the more it shrinks s.

    Returns:
        `dict`: source -> s, in log-odds, 0 in the middle of the sources. A source that is compared with no other is absent.

    Raises:
        ValueError: for a ridge that is not positive, or a prompt that has not as many ranks, sources and lengths.
    """
    if ridge <= 0:
        raise ValueError(
            f"got ridge={ridge}, need a positive number because one added to every s changes no probability."
        )
    places: dict[str, int] = defaultdict(lambda: len(places))
    compared = [
        (places[source], places[other], log1p(length) - log1p(other_length), (1 + np.sign(other_rank - rank)) / 2)
        for of_prompt in ranked
        for (rank, source, length), (other_rank, other, other_length) in combinations(zip(*of_prompt, strict=True), 2)
        if source != other
    ]
    if not compared:
        return {}
    first, second, longer, won = (np.array(column) for column in zip(*compared, strict=True))

    def odds(w: np.ndarray) -> np.ndarray:
        return w[first] - w[second] + w[-1] * longer

    def loss(w: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, odds(w)) - won * odds(w)) + ridge * w @ w)

    w = np.zeros(len(places) + 1)  # of the sources, then of length
    columns = ((first, 1.0), (second, -1.0), (np.full(len(first), len(w) - 1), longer))  # of the odds
    while True:  # Newton's method, with half a step where a whole one is too far
        predicted = (1 + np.tanh(odds(w) / 2)) / 2
        gradient, curvature = 2 * ridge * w, 2 * ridge * np.eye(len(w))
        for place, value in columns:
            np.add.at(gradient, place, value * (predicted - won) / len(won))
            for other, other_value in columns:
                np.add.at(curvature, (place, other), value * other_value * predicted * (1 - predicted) / len(won))
        step = np.linalg.solve(curvature, gradient)
        while np.abs(step).max() > 1e-9 and loss(w - step) >= loss(w):
            step /= 2
        if np.abs(step).max() <= 1e-9:
            return {source: float(w[place]) for source, place in places.items()}
        w -= step


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
