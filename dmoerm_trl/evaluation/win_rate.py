"""How often one policy's responses beat another's (the paper's appendix D.2 and D.3, figures 6 and 7)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from torch import Tensor

Judge = Callable[[Sequence[list[dict]], Sequence[str], Sequence[str]], Sequence[float] | Tensor]
"""`judge(prompts, firsts, seconds)` -> a number a prompt: above 0 where the first is better, below where the second is."""


@dataclass(frozen=True)
class WinRate:
    """
    The outcome of one comparison a prompt, in which both responses answer the same prompt.

    `rate` counts a tie as half a win. `interval` is Wilson's score interval. Where no prompt tied it is the ordinary one of
    a share; ties make the outcomes vary less than wins and losses of the same mean would, so with them it is wider than
    it need be, never too narrow. It takes prompts as independent: give one comparison a prompt.
    """

    wins: int
    ties: int
    losses: int

    @property
    def prompts(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        return (self.wins + self.ties / 2) / self.prompts

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The bounds of `rate`, from 0 to 1."""
        return wilson_interval(self.rate, self.prompts, confidence)

    def shares(self, confidence: float = 0.95) -> dict[str, tuple[float, float, float]]:
        """`"wins"`, `"ties"`, `"losses"` -> the share of prompts and the bounds of its Wilson interval."""
        shares = {name: count / self.prompts for name, count in asdict(self).items()}
        return {name: (share, *wilson_interval(share, self.prompts, confidence)) for name, share in shares.items()}

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"{self.rate:.1%} [{low:.1%}, {high:.1%}] ({self.wins} wins, {self.ties} ties, {self.losses} losses on "
            f"{self.prompts} prompts)"
        )


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's score interval of a share among `count` trials (Wilson 1927): with z the normal quantile and n the count,
    `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, scale = share + z**2 / (2 * count), 1 + z**2 / count
    margin = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = (centre - margin) / scale, (centre + margin) / scale
    return max(0.0, min(share, low)), min(1.0, max(share, high))  # within rounding it holds p and is in [0, 1]


def win_rate(
    judge: Judge,
    prompts: Sequence[list[dict]],
    responses_a: Sequence[str],
    responses_b: Sequence[str],
    *,
    both_orders: bool = True,
) -> WinRate:
    """
    How often the responses a are better than the responses b to the same prompts.

    Args:
        judge ([`Judge`]): a callable, such as [`reward_judge`] or one that asks a language model.
        prompts (`Sequence[list[dict]]`): one for each pair of responses.
        both_orders (`bool`): asks a second time with the responses swapped; a judge that then changes its mind has called a
            tie. Leave it out only for a judge that cannot prefer a position, such as [`reward_judge`].

    Raises:
        ValueError: if there are no prompts, the lengths differ, or a verdict is missing or NaN.
    """
    if not prompts or not len(prompts) == len(responses_a) == len(responses_b):
        raise ValueError(
            f"got {len(prompts)} prompts, {len(responses_a)} responses a and {len(responses_b)} responses b, need as many of "
            "each and at least one, because the pairs of one prompt are compared."
        )
    verdicts = _signs(judge, prompts, responses_a, responses_b)
    if both_orders:
        swapped = _signs(judge, prompts, responses_b, responses_a)
        verdicts = [first if first == -second else 0 for first, second in zip(verdicts, swapped, strict=True)]
    return WinRate(verdicts.count(1), verdicts.count(0), verdicts.count(-1))


def reward_judge(scorer: Any, tie: float = 0.0) -> Judge:
    """
    A judge that prefers the higher reward.

    Args:
        scorer (`Callable`): `scorer(prompts, responses)` -> rewards, such as
            [`~dmoerm_trl.rl.reward_functions.TextRewards`] or a gold reward.
        tie (`float`): the greatest difference that is still a tie.
    """

    def judge(prompts: Sequence[list[dict]], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        rewards = zip(scorer(prompts, firsts), scorer(prompts, seconds), strict=True)
        differences = [float(first) - float(second) for first, second in rewards]
        return [0.0 if abs(difference) <= tie else difference for difference in differences]

    return judge


def _signs(judge: Judge, prompts: Sequence[list[dict]], firsts: Sequence[str], seconds: Sequence[str]) -> list[int]:
    verdicts = [float(verdict) for verdict in judge(prompts, firsts, seconds)]
    if len(verdicts) != len(prompts) or any(math.isnan(verdict) for verdict in verdicts):
        raise ValueError(
            f"got {len(verdicts)} verdicts on {len(prompts)} pairs, {sum(map(math.isnan, verdicts))} of them NaN, need a "
            "number for each, 0 for a tie: have the judge ask again where its answer cannot be read."
        )
    return [(verdict > 0) - (verdict < 0) for verdict in verdicts]
