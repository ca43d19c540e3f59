"""
A weak label from who wrote a response: some systems, or people, write better than others whatever they are asked.

Public sets often say which system gave a response. Where some responses are ranked, the ranks tell how strong each system is,
and that labels every other response of these systems without a judge: far more texts than were ranked, and without the noise
of a single comparison. What it cannot tell is where a strong system failed.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

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


def source_ranks(strength: Mapping[str, float], sources: Sequence[str], tolerance: float = 0.1) -> list[int]:
    """
    Ranks the responses to a prompt by the strength of their sources, as a preference row takes them in `capability_ranks`.

    Args:
        strength (`Mapping[str, float]`): source -> a number, higher is better, such as [`source_strength`] gives.
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
