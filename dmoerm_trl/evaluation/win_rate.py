"""Win rate of one policy's responses against another's (the paper's appendix D.2 and D.3, figures 6 and 7)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from torch import Tensor

PairPreference = Callable[[Sequence[list[dict]], Sequence[str], Sequence[str]], Sequence[float] | Tensor]
"""`judge(prompts, firsts, seconds)` -> one number per prompt: above 0 if the first is better, below 0 if the second is."""


@dataclass(frozen=True)
class WinRate:
    """
    Outcome of comparing two responses on each prompt.

    `rate` counts a tie as half a win. `interval` is Wilson's score interval. Without ties it is the usual interval of a share;
    ties vary less than wins and losses with the same mean, so with ties the interval is wider than necessary, never too narrow.
    It assumes independent prompts, so count only one comparison per prompt.
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
        """Compute the bounds of `rate`, from 0 to 1."""
        return wilson_interval(self.rate, self.prompts, confidence)

    def shares(self, confidence: float = 0.95) -> dict[str, tuple[float, float, float]]:
        """Map `"wins"`, `"ties"` and `"losses"` to their share of the prompts and the bounds of its Wilson interval."""
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
    Compute Wilson's score interval of a share p among n = `count` trials (Wilson 1927),
    `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`, where z is the normal quantile.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, scale = share + z**2 / (2 * count), 1 + z**2 / count
    margin = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = (centre - margin) / scale, (centre + margin) / scale
    return max(0.0, min(share, low)), min(1.0, max(share, high))  # despite rounding, contains p and stays in [0, 1]


def win_rate(
    judge: PairPreference,
    prompts: Sequence[list[dict]],
    responses_a: Sequence[str],
    responses_b: Sequence[str],
    *,
    both_orders: bool = True,
) -> WinRate:
    """
    Count how often the responses a are better than the responses b to the same prompts.

    Args:
        judge ([`PairPreference`]): A callable, such as [`reward_judge`] or one that asks a language model.
        prompts (`Sequence[list[dict]]`): The prompts, one for each pair of responses.
        responses_a (`Sequence[str]`): Responses of one policy.
        responses_b (`Sequence[str]`): Responses of the other policy.
        both_orders (`bool`, *optional*, defaults to `True`): Whether to ask a second time with the responses swapped; if the
            judge changes its mind, the pair is a tie. Disable it only for a judge without position bias, such as
            [`reward_judge`].

    Raises:
        ValueError: If there are no prompts, the lengths differ, or a verdict is missing or NaN.

    Example:

    ```python
    from dmoerm_trl import reward_judge, win_rate

    prompts = [[{"role": "user", "content": "Hello?"}]]
    longer = reward_judge(lambda prompts, responses: [float(len(text)) for text in responses])
    print(win_rate(longer, prompts, ["Hi there!"], ["Hi!"]))
    ```
    """
    if not prompts or not len(prompts) == len(responses_a) == len(responses_b):
        raise ValueError(
            f"got {len(prompts)} prompts, {len(responses_a)} responses a and {len(responses_b)} responses b, need the same "
            "number of each and at least one, because the two responses to each prompt are compared."
        )
    verdicts = _signs(judge, prompts, responses_a, responses_b)
    if both_orders:
        swapped = _signs(judge, prompts, responses_b, responses_a)
        verdicts = [first if first == -second else 0 for first, second in zip(verdicts, swapped, strict=True)]
    return WinRate(verdicts.count(1), verdicts.count(0), verdicts.count(-1))


def reward_judge(scorer: Any, tie: float = 0.0) -> PairPreference:
    """
    Create a judge that prefers the higher reward.

    Args:
        scorer (`Callable`): `scorer(prompts, responses)` -> rewards, such as
            [`~dmoerm_trl.scoring.reward_functions.TextRewards`] or a gold reward.
        tie (`float`, *optional*, defaults to 0): Largest difference in reward that counts as a tie.

    Example:

    ```python
    from dmoerm_trl import reward_judge

    longer = reward_judge(lambda prompts, responses: [float(len(text)) for text in responses])
    longer([[{"role": "user", "content": "Hello?"}]], ["Hi there!"], ["Hi!"])
    ```
    """

    def judge(prompts: Sequence[list[dict]], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        rewards = zip(scorer(prompts, firsts), scorer(prompts, seconds), strict=True)
        differences = [float(first) - float(second) for first, second in rewards]
        return [0.0 if abs(difference) <= tie else difference for difference in differences]

    return judge


def _signs(
    judge: PairPreference, prompts: Sequence[list[dict]], firsts: Sequence[str], seconds: Sequence[str]
) -> list[int]:
    verdicts = [float(verdict) for verdict in judge(prompts, firsts, seconds)]
    if len(verdicts) != len(prompts) or any(math.isnan(verdict) for verdict in verdicts):
        raise ValueError(
            f"got {len(verdicts)} verdicts on {len(prompts)} pairs, {sum(map(math.isnan, verdicts))} of them NaN, need a "
            "number for each, 0 for a tie: have the judge ask again where its answer cannot be read."
        )
    return [(verdict > 0) - (verdict < 0) for verdict in verdicts]
