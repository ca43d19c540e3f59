"""Rewards that are numbers, or an error: NaN and infinity have no order, and one of them spoils a batch's mean."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_nan_allowed = ContextVar("nan_allowed", default=False)

WAY_OUT = "load the reward model in float32 or bfloat16, or mend its checkpoint"


def check_rewards(
    values: Tensor, of: Sequence[str] | None = None, *, what: str = "reward", way_out: str = WAY_OUT
) -> None:
    """
    Checks what is about to be given out as rewards or scores.

    Args:
        values (`Tensor` of shape (N,)): one number a text.
        of (`Sequence[str]`, *optional*): the N responses, which a message quotes; their places if absent.
        what (`str`): what the numbers are.
        way_out (`str`): what the message says to do.

    Raises:
        ValueError: if one of them is NaN or infinite.
    """
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return
    first, others = bad[0], f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    text = f"text {first + 1} of {len(values)}" if of is None else f"the response {of[first][:80]!r}"
    raise ValueError(
        f"got {what} {float(values[first])} for {text}{others}, need a number, because a reward that is none spoils its whole "
        f"batch: {way_out}."
    )


@contextmanager
def nan_allowed() -> Iterator[None]:
    """Within it a model gives out whatever rewards come: to a trainer, which sees that it diverges, or to one who checks them."""
    token = _nan_allowed.set(True)
    try:
        yield
    finally:
        _nan_allowed.reset(token)


def is_nan_allowed() -> bool:
    """Whether this is within [`nan_allowed`]."""
    return _nan_allowed.get()
