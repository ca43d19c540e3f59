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
    """
    way = way_of(backbone)
    rows = [list(range(len(lengths)))]
    if not torch.is_grad_enabled():
        texts = [row[:length] for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
        rows = list(
            passes(texts, PASS_TOKENS.get(input_ids.device.type, 16_384), share=way is not None and way.causal)
        )
    if way is None:
        z = [_one_by_one(backbone, adapters, input_ids[part], lengths[part]) for part in rows]
    else:
        z = []
        for part in rows:
            forest = plant(input_ids[part], lengths[part], share=way.causal)
            z.append(last_hidden_states(backbone, list(adapters), forest, **way._asdict()))
    if len(z) == 1 and rows[0] == list(range(len(lengths))):
        return z[0]
    order = torch.tensor([row for part in rows for row in part], device=lengths.device)
    return torch.cat(z)[order.argsort()]


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


_ways: WeakKeyDictionary[nn.Module, dict[tuple, Way | None]] = WeakKeyDictionary()


def way_of(backbone: PreTrainedModel) -> Way | None:
    """
    How packed texts go through a backbone, None where they cannot. It is found out by trying, once for each backbone with
    and without LoRA on each type of device: the embeddings of two short texts, packed, must be those of the texts alone.
    """
    lora = next(lora_layers(backbone), None)
    kind = lora is not None, backbone.device.type
    with taking_turns:
        ways = _ways.setdefault(backbone, {})
        if kind not in ways:
            ways[kind], reason = _try(backbone, [] if lora is None else list(lora.lora_A)[:1] * 2)
            if ways[kind] is None and reason:
                warnings.warn(
                    f"{type(backbone).__name__} is run once for each expert and text, because packed texts do not fit it: "
                    f"{reason}. The rewards are right, but slower than they could be.",
                    stacklevel=3,
                )
        return ways[kind]


@torch.no_grad()
def _try(backbone: PreTrainedModel, adapters: list[str]) -> tuple[Way | None, str]:
    """The way, or None and the reason; none where its embeddings are no numbers, which is an error of the rewards."""
    config = backbone.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    tokens = [token for token in range(config.vocab_size) if token != pad]
    longest = min(2 * MIN_SHARED + 5, getattr(config, "max_position_embeddings", None) or 2**30)
    ids = torch.tensor([tokens[(5 + place * 7) % len(tokens)] for place in range(longest)], device=backbone.device)
    ids = torch.stack([ids, ids.flip(0)])
    ids[1, :MIN_SHARED] = ids[0, :MIN_SHARED]
    lengths = torch.tensor([longest, longest - 3], device=backbone.device)
    exact = backbone.dtype in (torch.float32, torch.float64) and not is_quantised(backbone)
    tolerance = 1e-3 if exact else 0.1
    reasons = []
    with _quiet(backbone), torch.autocast(ids.device.type, enabled=False):
        plain = _one_by_one(backbone, adapters, ids, lengths)
        if not plain.isfinite().all():
            return None, ""
        with active_expert(backbone, None):
            first, second = backbone(input_ids=ids).last_hidden_state[:, :MIN_SHARED]
        causal = torch.equal(first, second)  # a wrong answer would be found out below
        for first_position in (0,) if pad is None else (0, pad + 1):  # RoBERTa counts from after its pad token's id
            way = Way(causal, first_position)
            try:
                z = last_hidden_states(backbone, adapters, plant(ids, lengths, share=causal), **way._asdict())
            except Exception as error:  # whatever a foreign architecture makes of packed texts
                reasons.append(str(error))
                continue
            if (difference := _difference(z, plain)) < tolerance:
                return way, ""
            reasons.append(f"its embeddings of packed texts are off by {difference:.1%}")
    return None, reasons[0]


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
