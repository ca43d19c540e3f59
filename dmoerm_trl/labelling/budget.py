"""
What asking may cost: a question is not asked unless its dearest answer fits. What it may take is the judge's estimate, so a limit
is passed only by as much as the estimates of the questions under way are too low.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """
    Args:
        prompt (`float`): of a million tokens of questions.
        completion (`float`): of a million tokens of answers.
    """

    prompt: float
    completion: float

    def __post_init__(self):
        if not all(0 <= price < math.inf for price in (self.prompt, self.completion)):
            raise ValueError(
                f"got the prices {self.prompt} and {self.completion}, need 0 or more for a million tokens."
            )

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Budget:
    """
    Limits on the answers of one judge, those of earlier runs included.

    Args:
        max_calls (`int`, *optional*): questions.
        max_tokens (`int`, *optional*): tokens of questions and answers.
        max_cost (`float`, *optional*): in the unit of the prices.
        prices ([`Prices`], *optional*): needed for `max_cost`.

    Raises:
        ValueError: for a limit below 0, or one in money without prices.
    """

    def __init__(
        self,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
    ):
        self.limits = {"max_calls": max_calls, "max_tokens": max_tokens, "max_cost": max_cost}
        self.limits = {name: limit for name, limit in self.limits.items() if limit is not None}
        for name, limit in self.limits.items():
            if not limit >= 0:  # NaN is not
                raise ValueError(f"`{name}`: got {limit}, need 0 or more.")
        if max_cost is not None and prices is None:
            raise ValueError(
                f"`max_cost`: got {max_cost} without prices, need `price_per_million_prompt_tokens` and "
                "`price_per_million_completion_tokens` to know what an answer costs: add them."
            )
        self.prices = prices
        self.calls = self.prompt_tokens = self.completion_tokens = 0  # spent, and what is under way at its dearest

    @property
    def counts_tokens(self) -> bool:
        """Whether [`reserve`] needs to know how many tokens a question may take."""
        return not self.limits.keys() <= {"max_calls"}

    @property
    def cost(self) -> float:
        return 0.0 if self.prices is None else self.prices.cost(self.prompt_tokens, self.completion_tokens)

    def spend(self, *spent: int) -> None:
        """Adds calls, prompt tokens and completion tokens; negative ones give back what was reserved."""
        calls, prompt_tokens, completion_tokens = spent
        self.calls += calls
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> str | None:
        """Sets aside what one question may take; if a limit forbids it, nothing, and returns which and how to go on."""
        self.spend(1, prompt_tokens, completion_tokens)
        would_be = {"max_calls": self.calls, "max_tokens": self.prompt_tokens + self.completion_tokens}
        would_be["max_cost"] = self.cost
        for name, limit in self.limits.items():
            if would_be[name] > limit:
                self.spend(-1, -prompt_tokens, -completion_tokens)
                return f"the next question may take {name} above {limit:,}: raise it to go on"
        return None
