"""Find the maximum text length of a backbone, and the length from which its rotary frequencies change."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LEARNED = re.compile(r"(^|\.)(wpe|\w*position\w*)$")
"""Names of learned position embeddings."""

TABLES = ("embed_positions", "pos_encoding")
"""Attributes that are precomputed tables of positions (GPT-J, CodeGen, CTRL)."""


def longest_text(backbone: PreTrainedModel) -> int | None:
    """
    Find the maximum number of tokens of a text; None if the backbone can compute every position.

    The maximum is the number of learned positions. For "dynamic" rotary positions it is their original range, because
    beyond it they depend on the texts that were read before.
    """
    limit = _declared(backbone)
    dynamic = any(rope.get("rope_type") == "dynamic" and not rope.get("alpha") for rope in _ropes(backbone))
    limits = [limit] if dynamic else []
    for name, module in backbone.named_modules():
        weight = getattr(module, "weight", None)
        if LEARNED.search(name) and isinstance(weight, Tensor) and not isinstance(module, nn.Linear):
            padding = getattr(module, "padding_idx", None)
            used = 0 if padding is None else padding + 1  # RoBERTa's positions start after its pad token's id
            found = len(weight) - getattr(module, "offset", used)
            limits.append(found if limit is None else min(found, limit))
        tables = [getattr(module, table, None) for table in TABLES]
        limits += [len(table) for table in tables if isinstance(table, Tensor)]
    return min(limits, default=None)


def check_positions(backbone: PreTrainedModel, name: str, max_length: int) -> None:
    """
    Check that a backbone can read texts of `max_length` tokens.

    Args:
        name (`str`): Name of the backbone in the message.

    Raises:
        ValueError: If `max_length` is more than the backbone has positions for.
    """
    limit = longest_text(backbone)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"got max_length={max_length}, need at most {limit}, because {name} has positions for so many tokens and no others: "
            f"set `max_length: {limit}`, or choose a base that reads longer texts."
        )


@contextmanager
def within_positions(backbone: PreTrainedModel, longest: int) -> Iterator[None]:
    """
    Context manager in which a backbone reads texts of up to `longest` tokens.

    Raises:
        ValueError: If that is more than the backbone has positions for.
    """
    if (limit := longest_text(backbone)) is not None and longest > limit:
        raise ValueError(_too_long(backbone, longest, limit))
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        if (limit := _declared(backbone)) is None or longest <= limit:
            raise
        raise ValueError(_too_long(backbone, longest, limit)) from error


def _too_long(backbone: PreTrainedModel, longest: int, limit: int) -> str:
    return (
        f"got a text of {longest} tokens for a {type(backbone).__name__} with positions for {limit}, need at most as many: set "
        "`max_length` to that, or take a base that reads longer texts."
    )


def _declared(backbone: PreTrainedModel) -> int | None:
    """Return the number of positions in the configuration; a backbone may be able to compute more."""
    limits = (getattr(backbone.config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if limit is not None), None)


def long_from(backbone: PreTrainedModel) -> int | None:
    """
    Find the number of tokens up to which the short of two sets of rotary frequencies is used ("longrope", as in
    Phi-3); None if there is only one set. The longest text of a batch selects the set for all of them.
    """
    ropes = [rope for rope in _ropes(backbone) if rope.get("rope_type") == "longrope"]
    return min((rope["original_max_position_embeddings"] for rope in ropes), default=None)


def _ropes(backbone: PreTrainedModel) -> list[dict[str, Any]]:
    """List the settings of the rotary positions: one for all layers, or one for each type of layer."""
    parameters = getattr(backbone.config, "rope_parameters", None) or {}
    nested = [rope for rope in parameters.values() if isinstance(rope, dict)]
    return nested or [parameters]
