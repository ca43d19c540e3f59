"""
Limits on what labelling may cost. A question is asked only if the most expensive answer that the judge estimates for it fits
the limits, so a limit is exceeded only by as much as the estimates of the pending questions are too low.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """
    Prices of a judge's tokens.

    Args:
        prompt (`float`): Price of a million prompt tokens.
        completion (`float`): Price of a million completion tokens.
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
    Limits on the answers of one judge, including those of earlier runs.

    Args:
        max_calls (`int`, *optional*): Maximum number of questions.
        max_tokens (`int`, *optional*): Maximum number of prompt and completion tokens together.
        max_cost (`float`, *optional*): Maximum cost, in the unit of the prices.
        prices ([`Prices`], *optional*): Prices of the tokens, required by `max_cost`.

    Raises:
        ValueError: For a limit below 0, or `max_cost` without prices.
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
        self.calls = self.prompt_tokens = self.completion_tokens = (
            0  # what was spent, and the estimates of pending questions
        )

    @property
    def counts_tokens(self) -> bool:
        """Whether [`reserve`] needs estimates of the tokens of a question."""
        return not self.limits.keys() <= {"max_calls"}

    @property
    def cost(self) -> float:
        return 0.0 if self.prices is None else self.prices.cost(self.prompt_tokens, self.completion_tokens)

    def spend(self, *spent: int) -> None:
        """Add calls, prompt tokens and completion tokens; negative numbers release a reservation."""
        calls, prompt_tokens, completion_tokens = spent
        self.calls += calls
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> str | None:
        """Reserve the estimated cost of one question. If that exceeds a limit, reserve nothing and return the reason."""
        self.spend(1, prompt_tokens, completion_tokens)
        would_be = {"max_calls": self.calls, "max_tokens": self.prompt_tokens + self.completion_tokens}
        would_be["max_cost"] = self.cost
        for name, limit in self.limits.items():
            if would_be[name] > limit:
                self.spend(-1, -prompt_tokens, -completion_tokens)
                return f"the next question may take {name} above {limit:,}: raise it to go on"
        return None
