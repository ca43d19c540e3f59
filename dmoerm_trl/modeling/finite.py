"""Refuse rewards that are NaN or infinite: they have no order, and a single one spoils the mean of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_nan_allowed = ContextVar("nan_allowed", default=False)

WAY_OUT = "load the reward model in float32 or bfloat16, or fix its checkpoint"


def check_rewards(
    values: Tensor, of: Sequence[str] | None = None, *, what: str = "reward", way_out: str = WAY_OUT
) -> None:
    """
    Check that rewards or scores are finite.

    Args:
        values (`Tensor` of shape (N,)): One number per text.
        of (`Sequence[str]`, *optional*): The N responses, to be quoted in the message; by default it names their
            indices.
        what (`str`): Name of the numbers in the message.
        way_out (`str`): Advice at the end of the message.

    Raises:
        ValueError: If one of them is NaN or infinite.
    """
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return
    first, others = bad[0], f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    text = f"text {first + 1} of {len(values)}" if of is None else f"the response {of[first][:80]!r}"
    raise ValueError(
        f"got {what} {float(values[first])} for {text}{others}, need a number, because a reward that is not finite spoils "
        f"its whole batch: {way_out}."
    )


@contextmanager
def nan_allowed() -> Iterator[None]:
    """Context manager in which a model may return rewards that are not finite, for callers that check them."""
    token = _nan_allowed.set(True)
    try:
        yield
    finally:
        _nan_allowed.reset(token)


def is_nan_allowed() -> bool:
    """Return whether [`nan_allowed`] is active."""
    return _nan_allowed.get()
