"""
Weak labels from the system that wrote a response: some systems, or people, write better than others whatever the prompt.

Public datasets often name the system that wrote each response. If some responses are ranked, the ranks give an estimate of how
strong each system is, which labels all other responses of these systems without a judge: far more texts than were ranked, and
without the noise of a single comparison. Such labels cannot show where a strong system failed.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import log1p

import numpy as np

from .heuristics import tied_ranks


def system_strength(ranked: Iterable[tuple[Sequence[int], Sequence[str]]]) -> dict[str, float]:
    """
    Compute the share of its comparisons that each system wins.

    Args:
        ranked (`Iterable`): For each prompt, the overall ranks of K responses, 1 is best, and the K systems that wrote them.
            Use only training prompts.

    Returns:
        `dict`: System -> share, from 0 to 1, of the comparisons with other systems' responses to the same prompt that it wins;
        a tie is half a win. A system that is compared with no other is absent.
    """
    wins: dict[str, float] = defaultdict(float)
    comparisons: dict[str, int] = defaultdict(int)
    for ranks, systems in ranked:
        for rank, system in zip(ranks, systems, strict=True):
            for other_rank, other in zip(ranks, systems, strict=True):
                if other != system:
                    wins[system] += (rank < other_rank) + 0.5 * (rank == other_rank)
                    comparisons[system] += 1
    return {system: wins[system] / count for system, count in comparisons.items()}


def length_controlled_strength(
    ranked: Iterable[tuple[Sequence[int], Sequence[str], Sequence[int]]], ridge: float = 1e-5
) -> dict[str, float]:
    """
    Estimate how strong each system is at equal length, by a Bradley-Terry model with a length term, following the idea of
    length-controlled AlpacaEval (Dubois et al. 2024). A response x of system X is ranked above y of Y with probability

        sigmoid(s_X - s_Y + b (log(1 + |x|) - log(1 + |y|)))

    where s and b minimise the mean cross-entropy plus `ridge` times their sum of squares.

    Args:
        ranked (`Iterable`): See [`system_strength`], with the lengths of the K responses as a third member.
        ridge (`float`, *optional*, defaults to 1e-5): Regularisation, which keeps the strength of a system that always wins
            finite. The more systems there are, the more it shrinks s.

    Returns:
        `dict`: System -> s in log-odds, with mean 0 over the systems. A system that is compared with no other is absent.

    Raises:
        ValueError: For a ridge that is not positive, or a prompt with different numbers of ranks, systems and lengths.
    """
    if ridge <= 0:
        raise ValueError(
            f"got ridge={ridge}, need a positive number because one added to every s changes no probability."
        )
    places: dict[str, int] = defaultdict(lambda: len(places))
    compared = [
        (places[system], places[other], log1p(length) - log1p(other_length), (1 + np.sign(other_rank - rank)) / 2)
        for prompt in ranked
        for (rank, system, length), (other_rank, other, other_length) in combinations(zip(*prompt, strict=True), 2)
        if system != other
    ]
    if not compared:
        return {}
    first, second, longer, won = (np.array(column) for column in zip(*compared, strict=True))

    def odds(w: np.ndarray) -> np.ndarray:
        return w[first] - w[second] + w[-1] * longer

    def loss(w: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, odds(w)) - won * odds(w)) + ridge * w @ w)

    w = np.zeros(len(places) + 1)  # weights of the systems, then of length
    columns = ((first, 1.0), (second, -1.0), (np.full(len(first), len(w) - 1), longer))  # entries of the design matrix
    while True:  # Newton's method, halving a step that increases the loss
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
            return {system: float(w[place]) for system, place in places.items()}
        w -= step


def system_ranks(strength: Mapping[str, float], sources: Sequence[str], tolerance: float = 0.1) -> list[int]:
    """
    Rank the responses to a prompt by the strength of their systems, in the format of a preference row's `capability_ranks`.

    Args:
        strength (`Mapping[str, float]`): System -> strength, higher is better, such as the result of [`system_strength`] or
            [`length_controlled_strength`].
        sources (`Sequence[str]`): The systems that wrote the K responses.
        tolerance (`float`, *optional*, defaults to 0.1): Spread of a tie, see [`tied_ranks`].

    Raises:
        ValueError: For a system of unknown strength.
    """
    if unknown := [system for system in sources if system not in strength]:
        raise ValueError(
            f"got the system {unknown[0]!r}, need one of known strength because its response could not be ranked: rank a "
            "response of it against others, or leave the label out of this row."
        )
    return tied_ranks([strength[system] for system in sources], tolerance)
