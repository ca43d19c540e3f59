"""Texts to last-token embeddings (equation 3): all experts in one pass where the backbone can, else one by one."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .experts import active_expert, lora_layers
from .forest import MIN_SHARED, passes, plant
from .heads import last_token
from .one_pass import in_this_pass, last_hidden_states, taking_turns
from .positions import long_from, longest_text, within_positions
from .quantised import is_quantised
from .spans import span_mask

PASS_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Packed tokens of one pass in inference, by type of device: it bounds memory, and on a CPU fits the caches."""


@torch.compiler.disable
def embeddings(backbone: PreTrainedModel, adapters: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
    """
    The last-token embeddings `z_i` of equation 3 under each expert; the base's alone where there are no experts.

    In inference the texts go through in passes of bounded size, in training in one.

    Args:
        adapters (`Sequence[str]`): k adapters of the backbone.
        input_ids (`Tensor` of shape (B, T)): texts padded on the right.
        lengths (`Tensor` of shape (B,)): number of tokens of each text.

    Returns:
        `Tensor` of shape (B, max(k, 1), H).

    Raises:
        ValueError: if a text is longer than the backbone can read, or the backbone does not embed texts.
    """
    way, alone = _ways_of(backbone)
    rows = _read_alike(backbone, lengths.tolist())
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
                forest = plant(input_ids[part], lengths[part], share=way.causal)
                z.append(last_hidden_states(backbone, list(adapters), forest, **way._asdict()))
    if len(z) == 1 and rows[0] == list(range(len(lengths))):
        return z[0]
    order = torch.tensor([row for part in rows for row in part], device=lengths.device)
    return torch.cat(z)[order.argsort()]


def _read_alike(backbone: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the texts that a backbone may read at once: their lengths do not change how it reads the others."""
    limit = long_from(backbone)
    groups: dict[bool, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(limit is not None and length > limit, []).append(index)
    return list(groups.values())


def _one_by_one(backbone: PreTrainedModel, adapters: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
    """The plain way: padded texts, a pass for each expert."""
    input_ids = input_ids[:, : int(lengths.max())]
    mask = span_mask(lengths, input_ids.shape[1])
    z = []
    for name in adapters or [None]:
        # without experts an adapter that PEFT put on the base stays as it is
        expert = active_expert(backbone, name) if name else nullcontext()
        with taking_turns, expert:
            z.append(last_token(backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state, lengths))
    return torch.stack(z, 1)


class Way(NamedTuple):
    """What a backbone needs to know of packed texts: arguments of [`last_hidden_states`]."""

    causal: bool
    first_position: int


_ways: WeakKeyDictionary[nn.Module, dict[tuple, tuple[Way | None, bool]]] = WeakKeyDictionary()


def way_of(backbone: PreTrainedModel) -> Way | None:
    """
    How packed texts go through a backbone, None where they cannot. It is found out by trying, once for each backbone with
    and without LoRA on each type of device: the embeddings of two short texts, packed, must be those of the texts alone.

    Raises:
        ValueError: for a backbone that does not embed texts.
    """
    return _ways_of(backbone)[0]


def _ways_of(backbone: PreTrainedModel) -> tuple[Way | None, bool]:
    """[`way_of`], and whether each text has to be read alone, because padding would change its embedding."""
    lora = next(lora_layers(backbone), None)
    kind = lora is not None, backbone.device.type
    with taking_turns:
        ways = _ways.setdefault(backbone, {})
        if kind not in ways:
            way, alone, reason = _try(backbone, [] if lora is None else list(lora.lora_A)[:1] * 2)
            if way is None and not reason:
                return None, False  # its embeddings are no numbers, so nothing was found out
            ways[kind] = way, alone
            if reason:
                warnings.warn(
                    f"{type(backbone).__name__} is run once for each expert and text, because packed texts do not fit it: "
                    f"{reason}. The rewards are right, but slower than they could be.",
                    stacklevel=4,
                )
        return ways[kind]


@torch.no_grad()
def _try(backbone: PreTrainedModel, adapters: list[str]) -> tuple[Way | None, bool, str]:
    """
    The way, or None, whether each text is read alone, and the reason; none where the embeddings of the plain way are no numbers,
    which the rewards will tell.
    """
    causal = is_causal(backbone)
    pad = getattr(backbone.config, "pad_token_id", None)
    ids = _made_up(backbone, 2 * MIN_SHARED + 5)
    longest = ids.shape[1]
    lengths = torch.tensor([longest, longest - 3], device=backbone.device)
    exact = backbone.dtype in (torch.float32, torch.float64) and not is_quantised(backbone)
    tolerance = 1e-3 if exact else 0.1
    reasons = []
    with _quiet(backbone), torch.autocast(ids.device.type, enabled=False):
        plain, again = (
            torch.cat([_one_by_one(backbone, adapters, ids[[row]], lengths[[row]]) for row in (0, 1)])
            for _ in range(2)
        )
        if not plain.isfinite().all():
            return None, False, ""
        if not _difference(again, plain) < tolerance:
            raise ValueError(_cannot(backbone, "it draws at random when it reads a text"))
        for first_position in (0,) if pad is None else (0, pad + 1):  # RoBERTa counts from after its pad token's id
            way = Way(causal, first_position)
            try:
                z = last_hidden_states(backbone, adapters, plant(ids, lengths, share=causal), **way._asdict())
            except Exception as error:  # whatever a foreign architecture makes of packed texts
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
    Whether a backbone's tokens see only what stands before them. It is found out by trying.

    Raises:
        ValueError: if it does not make one embedding of each token, of token ids alone.
    """
    ids = _made_up(backbone, MIN_SHARED)
    with taking_turns, _quiet(backbone), active_expert(backbone, None), torch.autocast(ids.device.type, enabled=False):
        try:
            hidden = backbone(input_ids=ids).last_hidden_state
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(_cannot(backbone, f"it fails on token ids alone ({error})")) from error
    if hidden.shape != (*ids.shape, backbone.config.hidden_size):
        shape = tuple(hidden.shape)
        raise ValueError(
            _cannot(backbone, f"of tokens of shape {tuple(ids.shape)} it makes embeddings of shape {shape}")
        )
    first, second = hidden[:, : ids.shape[1] // 2].nan_to_num()
    return torch.equal(first, second)


def _cannot(backbone: PreTrainedModel, reason: str) -> str:
    size = getattr(backbone.config, "hidden_size", None)
    return (
        f"got a {type(backbone).__name__}, need a decoder or an encoder that makes one embedding of its hidden size ({size}) of "
        f"each token of a text: {reason}. Take another base."
    )


def _made_up(backbone: PreTrainedModel, length: int) -> Tensor:
    """Two texts whose first half is the same, shape (2, length), or as long as texts may be."""
    pad = getattr(backbone.config, "pad_token_id", None)
    tokens = [token for token in range(getattr(backbone.config, "vocab_size", None) or 0) if token != pad]
    if not tokens:
        raise ValueError(_cannot(backbone, "it has no tokens"))
    length = min(length, longest_text(backbone) or length)
    ids = torch.tensor([tokens[(5 + place * 7) % len(tokens)] for place in range(length)], device=backbone.device)
    ids = torch.stack([ids, ids.flip(0)])
    ids[1, : length // 2] = ids[0, : length // 2]
    return ids


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@contextmanager
def _quiet(backbone: nn.Module) -> Iterator[None]:
    """Within it the backbone is in evaluation mode."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def checkpoint_as_now(layer: nn.Module) -> None:
    """Has gradient checkpointing run a layer again as it ran first: in the same pass, under the same expert."""
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
