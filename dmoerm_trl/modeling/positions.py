"""How long a text may be for a backbone, and from what length on it reads all positions of a text in another way."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LEARNED = re.compile(r"(^|\.)(wpe|\w*position\w*)$")
"""Names of the embeddings of positions."""

TABLES = ("embed_positions", "pos_encoding")
"""Attributes that are tables of positions, computed once (GPT-J, CodeGen, CTRL)."""


def longest_text(backbone: PreTrainedModel) -> int | None:
    """
    How many tokens a text may have; None where every position can be computed.

    It is the number of the backbone's learned positions. With "dynamic" rotary positions it is their original range: beyond,
    they depend on the texts that were read before.
    """
    limit = _declared(backbone)
    dynamic = any(rope.get("rope_type") == "dynamic" and not rope.get("alpha") for rope in _ropes(backbone))
    limits = [limit] if dynamic else []
    for name, module in backbone.named_modules():
        weight = getattr(module, "weight", None)
        if LEARNED.search(name) and isinstance(weight, Tensor) and not isinstance(module, nn.Linear):
            padding = getattr(module, "padding_idx", None)
            used = 0 if padding is None else padding + 1  # RoBERTa counts from after its padding
            found = len(weight) - getattr(module, "offset", used)
            limits.append(found if limit is None else min(found, limit))
        tables = [getattr(module, table, None) for table in TABLES]
        limits += [len(table) for table in tables if isinstance(table, Tensor)]
    return min(limits, default=None)


def check_positions(backbone: PreTrainedModel, name: str, max_length: int) -> None:
    """
    Args:
        name (`str`): what the backbone is called in the message.

    Raises:
        ValueError: if texts of `max_length` tokens may have more than the backbone has positions for.
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
    Within it a backbone reads texts.

    Raises:
        ValueError: if the longest text has more tokens than the backbone has positions for.
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
    """The number of positions that its configuration names; a backbone may compute more."""
    limits = (getattr(backbone.config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if limit is not None), None)


def long_from(backbone: PreTrainedModel) -> int | None:
    """
    The number of tokens up to which a text has the short ones of two sets of rotary frequencies ("longrope", as in Phi-3), None
    where there is one. All texts that a backbone reads at once have the set of the longest.
    """
    ropes = [rope for rope in _ropes(backbone) if rope.get("rope_type") == "longrope"]
    return min((rope["original_max_position_embeddings"] for rope in ropes), default=None)


def _ropes(backbone: PreTrainedModel) -> list[dict[str, Any]]:
    """The settings of its rotary positions: one for all layers, or one for each kind of layer."""
    parameters = getattr(backbone.config, "rope_parameters", None) or {}
    nested = [rope for rope in parameters.values() if isinstance(rope, dict)]
    return nested or [parameters]
