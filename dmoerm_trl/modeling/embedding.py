"""Compute last-token embeddings (equation 3): all experts in one pass if the backbone supports it, else one by one."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .boundaries import span_mask
from .experts import active_expert, lora_layers
from .heads import last_token
from .multi_lora import backbone_lock, in_this_pass, last_hidden_states
from .positions import long_from, longest_text, within_positions
from .prefix_tree import MIN_SHARED, pack, passes
from .quantization import is_quantised

PASS_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Token budget of a pass in inference, by device type; it bounds the memory, and on a CPU fits the caches."""


@torch.compiler.disable
def embeddings(backbone: PreTrainedModel, adapters: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
    """
    Compute the last-token embeddings `z_i` of equation 3 with each expert, or with the base if there are no experts.

    In inference the texts are split into passes of bounded size; in training there is one pass.

    Args:
        adapters (`Sequence[str]`): k adapters of the backbone.
        input_ids (`Tensor` of shape (B, T)): Texts padded on the right.
        lengths (`Tensor` of shape (B,)): Number of tokens of each text.

    Returns:
        `Tensor` of shape (B, max(k, 1), H).

    Raises:
        ValueError: If a text is longer than the backbone can read, or the backbone does not embed texts.
    """
    way, alone = _support_of(backbone)
    rows = _group_by_rope(backbone, lengths.tolist())
    if alone:
        rows = [[row] for row in range(len(lengths))]
    elif not torch.is_grad_enabled():
        texts = [row[:length] for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
        tokens, share = PASS_TOKENS.get(input_ids.device.type, 16_384), way is not None and way.causal
        rows = [
            [group[index] for index in part]
            for group in rows
            for part in passes([texts[row] for row in group], tokens, share=share)
        ]
    z = []
    with within_positions(backbone, int(lengths.max())):
        for part in rows:
            if way is None:
                z.append(_one_by_one(backbone, adapters, input_ids[part], lengths[part]))
            else:
                packed = pack(input_ids[part], lengths[part], share=way.causal)
                z.append(last_hidden_states(backbone, list(adapters), packed, **way._asdict()))
    if len(z) == 1 and rows[0] == list(range(len(lengths))):
        return z[0]
    order = torch.tensor([row for part in rows for row in part], device=lengths.device)
    return torch.cat(z)[order.argsort()]


def _group_by_rope(backbone: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Group the indices of texts that may be batched: the longest may determine the rotary frequencies of all."""
    limit = long_from(backbone)
    groups: dict[bool, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(limit is not None and length > limit, []).append(index)
    return list(groups.values())


def _one_by_one(backbone: PreTrainedModel, adapters: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Compute the embeddings without packing: padded texts, and a pass for each expert."""
    input_ids = input_ids[:, : int(lengths.max())]
    mask = span_mask(lengths, input_ids.shape[1])
    z = []
    for name in adapters or [None]:
        # without experts, leave an adapter that PEFT added to the base active
        expert = active_expert(backbone, name) if name else nullcontext()
        with backbone_lock, expert:
            z.append(last_token(backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state, lengths))
    return torch.stack(z, 1)


class PackingSupport(NamedTuple):
    """The arguments with which [`last_hidden_states`] runs packed sequences through a backbone."""

    causal: bool
    first_position: int


_known_support: WeakKeyDictionary[nn.Module, dict[tuple, tuple[PackingSupport | None, bool]]] = WeakKeyDictionary()


def packing_support(backbone: PreTrainedModel) -> PackingSupport | None:
    """
    Determine how a backbone runs packed sequences; None if it cannot.

    This is tested once per backbone, with and without LoRA and on each type of device: the embeddings of two short
    texts must be the same packed and alone.

    Raises:
        ValueError: If the backbone does not embed texts.
    """
    return _support_of(backbone)[0]


def _support_of(backbone: PreTrainedModel) -> tuple[PackingSupport | None, bool]:
    """Return [`packing_support`], and whether each text must run alone, because padding would change its embedding."""
    lora = next(lora_layers(backbone), None)
    kind = lora is not None, backbone.device.type
    with backbone_lock:
        ways = _known_support.setdefault(backbone, {})
        if kind not in ways:
            way, alone, reason = _test_support(backbone, [] if lora is None else list(lora.lora_A)[:1] * 2)
            if way is None and not reason:
                return None, False  # its embeddings are not finite, so the test is inconclusive
            ways[kind] = way, alone
            if reason:
                warnings.warn(
                    f"{type(backbone).__name__} is run once for each expert and text, because packed texts do not fit it: "
                    f"{reason}. The rewards are right, but slower than they could be.",
                    stacklevel=4,
                )
        return ways[kind]


@torch.no_grad()
def _test_support(backbone: PreTrainedModel, adapters: list[str]) -> tuple[PackingSupport | None, bool, str]:
    """
    Test whether packed sequences give the embeddings of the texts alone.

    Returns:
        The support or None, whether each text must be run alone, and the reason why packing is not supported. There is
        no reason if even the embeddings without packing are not finite; the check of the rewards reports that.
    """
    causal = is_causal(backbone)
    pad = getattr(backbone.config, "pad_token_id", None)
    ids = _test_texts(backbone, 2 * MIN_SHARED + 5)
    longest = ids.shape[1]
    lengths = torch.tensor([longest, longest - 3], device=backbone.device)
    exact = backbone.dtype in (torch.float32, torch.float64) and not is_quantised(backbone)
    tolerance = 1e-3 if exact else 0.1
    reasons = []
    with _evaluation_mode(backbone), torch.autocast(ids.device.type, enabled=False):
        plain, again = (
            torch.cat([_one_by_one(backbone, adapters, ids[[row]], lengths[[row]]) for row in (0, 1)])
            for _ in range(2)
        )
        if not plain.isfinite().all():
            return None, False, ""
        if not _difference(again, plain) < tolerance:
            raise ValueError(_unsupported(backbone, "it draws at random when it reads a text"))
        # RoBERTa's positions start after its pad token's id
        for first_position in (0,) if pad is None else (0, pad + 1):
            way = PackingSupport(causal, first_position)
            try:
                z = last_hidden_states(backbone, adapters, pack(ids, lengths, share=causal), **way._asdict())
            except Exception as error:  # an unknown architecture may fail in any way
                reasons.append(str(error))
                continue
            if (difference := _difference(z, plain)) < tolerance:
                return way, False, ""
            reasons.append(f"its embeddings of packed texts are off by {difference:.1%}")
        alone = not _difference(_one_by_one(backbone, adapters, ids, lengths), plain) < tolerance
    return None, alone, reasons[0]


@torch.no_grad()
def is_causal(backbone: PreTrainedModel) -> bool:
    """
    Test whether a backbone's tokens attend only to the tokens before them.

    Raises:
        ValueError: If it does not compute one embedding per token from token ids alone.
    """
    ids = _test_texts(backbone, MIN_SHARED)
    with (
        backbone_lock,
        _evaluation_mode(backbone),
        active_expert(backbone, None),
        torch.autocast(ids.device.type, enabled=False),
    ):
        try:
            hidden = backbone(input_ids=ids).last_hidden_state
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(_unsupported(backbone, f"it fails on token ids alone ({error})")) from error
    if hidden.shape != (*ids.shape, backbone.config.hidden_size):
        shape = tuple(hidden.shape)
        raise ValueError(
            _unsupported(backbone, f"of tokens of shape {tuple(ids.shape)} it makes embeddings of shape {shape}")
        )
    first, second = hidden[:, : ids.shape[1] // 2].nan_to_num()
    return torch.equal(first, second)


def _unsupported(backbone: PreTrainedModel, reason: str) -> str:
    """Build the message that refuses a backbone."""
    size = getattr(backbone.config, "hidden_size", None)
    return (
        f"got a {type(backbone).__name__}, need a decoder or an encoder that makes one embedding of its hidden size ({size}) of "
        f"each token of a text: {reason}. Take another base."
    )


def _test_texts(backbone: PreTrainedModel, length: int) -> Tensor:
    """Build two texts that share their first half, shape (2, length), or shorter if the backbone needs that."""
    pad = getattr(backbone.config, "pad_token_id", None)
    tokens = [token for token in range(getattr(backbone.config, "vocab_size", None) or 0) if token != pad]
    if not tokens:
        raise ValueError(_unsupported(backbone, "it has no tokens"))
    length = min(length, longest_text(backbone) or length)
    ids = torch.tensor([tokens[(5 + place * 7) % len(tokens)] for place in range(length)], device=backbone.device)
    ids = torch.stack([ids, ids.flip(0)])
    ids[1, : length // 2] = ids[0, : length // 2]
    return ids


def _difference(a: Tensor, b: Tensor) -> float:
    """Compute the relative difference of two tensors."""
    return float((a.float() - b.float()).norm() / b.float().norm())


@contextmanager
def _evaluation_mode(backbone: nn.Module) -> Iterator[None]:
    """Context manager in which the backbone is in evaluation mode."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def checkpoint_as_now(layer: nn.Module) -> None:
    """Make gradient checkpointing rerun a layer as it ran first: in the same pass, with the same expert."""
    checkpoint = layer._gradient_checkpointing_func

    def checkpoint_with_expert(function: Callable, *args: Any) -> Any:
        lora = next(lora_layers(layer), None)
        expert = lora.active_adapters[0] if lora is not None and lora.active_adapters else None
        function = in_this_pass(layer, function)

        def run(*inputs: Any) -> Any:
            with active_expert(layer, expert):
                return function(*inputs)

        return checkpoint(run, *args)

    layer._gradient_checkpointing_func = checkpoint_with_expert
