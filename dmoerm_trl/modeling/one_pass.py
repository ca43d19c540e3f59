"""
All experts of a backbone in one pass over packed texts, by hooks on its modules: no model's code is copied or changed.

Within a pass
- the texts are a [`Forest`]: there is no padding, but in the attention of encoders on a GPU, and a prompt that several texts
  share is there once;
- the backbone runs once, with a batch of one, up to the first module with LoRA. There the hidden states are repeated for
  each expert, linear layers that still get the same input run once, and from then on row i of the batch is expert i. On a
  CPU a layer with LoRA takes the experts group by group;
- in the last layer only each text's last token asks; of the others just keys and values are computed.

PEFT's adapters are what is stored and trained; a pass only reads them. In training, texts that share a prompt share the
dropout on it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from threading import RLock
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import forest_attention
from .experts import layers_name
from .forest import Forest

ATTENTION = "dmoerm_forest"
"""Name of the attention function among those of transformers."""

GROUP_TOKENS = 2048
"""On a CPU, experts go through a layer one group after the other, each of about as many tokens as its caches hold."""


@dataclass
class Pass:
    """
    The state of one pass.

    Attributes:
        backbone (`PreTrainedModel`): what is run.
        forest (`Forest`): the texts.
        adapters (`list[str]`): the experts that go through the current layer at once.
        causal (`bool`): whether a token sees only what stands before it.
        asking (`str`): which tokens ask in attention: `"all"`, `"last"`, or `"none"` where keys and values are wanted.
        keys_and_values (`tuple[Tensor, Tensor]`, *optional*): of all tokens, while the last ones ask.
        windows (`set`): the windows that the layers' attention asked for, None among them.
        common (`Tensor`, *optional*): the hidden states that are the same for all experts, while they branch.
        known (`dict`, *optional*): linear layer -> its output for `common`, for the groups of experts that follow.
    """

    backbone: PreTrainedModel
    forest: Forest
    adapters: list[str]
    causal: bool
    asking: str = "all"
    keys_and_values: tuple[Tensor, Tensor] | None = None
    windows: set[int | None] = field(default_factory=set)
    common: Tensor | None = None
    known: dict[nn.Module, Tensor] | None = None

    @contextmanager
    def but(self, **changes: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            yield
        finally:
            vars(self).update(before)


_current: ContextVar[Pass | None] = ContextVar("pass", default=None)

taking_turns = RLock()
"""Held by the thread that runs a backbone: a pass changes the backbone's modules, which other threads may share."""


class _KeysAndValues(Exception):
    """Ends the forward of a layer where its keys and values are known."""


def last_hidden_states(
    backbone: PreTrainedModel, adapters: list[str], forest: Forest, *, causal: bool, first_position: int = 0
) -> Tensor:
    """
    The last hidden state of each text's last token under each expert.

    Args:
        adapters (`list[str]`): k adapters of the backbone; without any, the base runs alone.
        forest (`Forest`): N texts; of a backbone that is not causal, without shared beginnings.
        causal (`bool`): whether the backbone's tokens see only what stands before them.
        first_position (`int`): the position id of a text's first token.

    Returns:
        `Tensor` of shape (N, max(k, 1), H).

    Raises:
        ValueError: if the backbone has something that packed texts cannot have; the message is the reason.
    """
    config = backbone.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if odd := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"it has layers with {', '.join(sorted(odd))}")
    state = Pass(backbone, forest, list(adapters), causal)
    with _entered(state):
        hidden = backbone(
            input_ids=forest.input_ids.unsqueeze(0),
            position_ids=forest.position_ids.unsqueeze(0) + first_position,
            use_cache=False,
        ).last_hidden_state
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None)
    if windowed and state.windows == {None}:
        raise ValueError("its attention is not told the window that its configuration has")
    return hidden.expand(max(len(adapters), 1), len(forest.ends), -1).transpose(0, 1)


def in_this_pass(layer: nn.Module, function: Callable) -> Callable:
    """A layer's function as it runs now, whenever it is called: gradient checkpointing runs it again in the backward pass."""
    state = _current.get()
    as_now = state and replace(state, known=None)

    def run(*args: Any, **kwargs: Any) -> Any:
        if _current.get() is state:
            return function(*args, **kwargs)
        with _entered(as_now, layer):
            return function(*args, **kwargs)

    return run


@contextmanager
def _entered(state: Pass, part: nn.Module | None = None) -> Iterator[None]:
    """Within it the modules of the backbone, or of a part of it, do what the docstring of this file says."""
    config, backbone = state.backbone.config, state.backbone
    part = part or backbone
    with ExitStack() as stack:
        stack.enter_context(taking_turns)
        stack.callback(_current.reset, _current.set(state))
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = ATTENTION
        layers = backbone.get_submodule(layers_name(backbone))
        here = [layer for layer in layers if part in (layer, backbone)]
        if layers[-1] in here:
            stack.enter_context(_wrapped(layers[-1], partial(_ask_last, layers[-1]), state))
        if state.adapters:
            for owner in [module for module in part.modules() if _owns_lora(module)]:
                stack.enter_context(_wrapped(owner, _repeat, state))
                for child in owner.children():
                    if isinstance(child, LoraLayer):
                        stack.enter_context(_wrapped(child, partial(_experts_linear, child), state))
                    elif isinstance(child, nn.Linear):
                        stack.enter_context(_wrapped(child, partial(_once_if_common, child), state))
            branching = next(i for i, layer in enumerate(layers) if any(map(_owns_lora, layer.modules())))
            for layer in layers[branching:]:
                if layer in here:
                    stack.enter_context(_wrapped(layer, _in_groups, state))
        yield


def _owns_lora(module: nn.Module) -> bool:
    return any(isinstance(child, LoraLayer) for child in module.children())


@contextmanager
def _wrapped(module: nn.Module, wrapper: Callable, state: Pass) -> Iterator[None]:
    """Within it `module(...)` is `wrapper(state, module's forward, ...)`."""
    before = vars(module).get("forward")
    module.forward = partial(wrapper, state, module.forward)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _in_groups(state: Pass, forward: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer, for as many experts at once as is fast."""
    adapters = state.adapters
    size = len(adapters) if hidden.is_cuda else max(1, GROUP_TOKENS // hidden.shape[1])
    if size >= len(adapters):
        return forward(hidden, *args, **kwargs)
    outputs = []
    branching = len(hidden) == 1
    known: dict[nn.Module, Tensor] | None = {} if branching and not torch.is_grad_enabled() else None
    for start in range(0, len(adapters), size):
        rows = hidden if branching else hidden[start : start + size]
        with state.but(adapters=adapters[start : start + size], known=known):
            outputs.append(forward(rows, *args, **kwargs))
    return torch.cat(outputs)


def _repeat(state: Pass, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """A module that holds layers with LoRA: its hidden states, repeated for each expert where they are still one."""
    hidden = args[0] if args else kwargs["hidden_states"]
    branching = len(hidden) < len(state.adapters) or state.known is not None
    hidden = hidden.expand(len(state.adapters), -1, -1)
    if args:
        args = (hidden, *args[1:])
    else:
        kwargs["hidden_states"] = hidden
    try:
        with state.but(common=hidden if branching else None):
            return forward(*args, **kwargs)
    finally:
        state.known = None  # what follows in the layer is each group's own


def _once_if_common(linear: nn.Module, state: Pass, forward: Callable, x: Tensor) -> Tensor:
    """A linear layer of the base, run once for what is the same for all experts."""
    if x is not state.common:
        return forward(x)
    known = {} if state.known is None else state.known
    if linear not in known:
        known[linear] = forward(x[:1])
    return known[linear].expand(len(x), -1, -1)


def _experts_linear(layer: LoraLayer, state: Pass, forward: Callable, x: Tensor) -> Tensor:
    """
    A linear layer with LoRA: row i of `x`, shape (k, T, in), goes through the base layer and adapter i.

    In inference in fp32 the adapters are merged into the base's weight, for this call, where that is less work: where the
    experts have different inputs, and many tokens.
    """
    base, names = layer.get_base_layer(), state.adapters
    down, up = ([parts[name].weight for name in names] for parts in (layer.lora_A, layer.lora_B))
    scaling = [layer.scaling[name] for name in names]
    if not down[0].numel():
        raise ValueError("its weights are sharded over devices")
    plain = type(base) is nn.Linear and x.dtype == base.weight.dtype == torch.float32
    if plain and x is not state.common and not torch.is_grad_enabled() and not layer.training:
        size_out, size_in = base.weight.shape
        if x.shape[1] * (size_in + size_out) > size_in * size_out:  # else the two thin products are less work
            merged = [base.weight.addmm(b, a, alpha=scale) for a, b, scale in zip(down, up, scaling, strict=True)]
            return torch.stack(
                [nn.functional.linear(row, weight, base.bias) for row, weight in zip(x, merged, strict=True)]
            )
    out = _once_if_common(base, state, base, x)
    low = layer.lora_dropout[names[0]](x).to(down[0].dtype) @ torch.stack(down).transpose(1, 2)
    low = low * torch.tensor(scaling, dtype=low.dtype, device=low.device).view(-1, 1, 1)
    return torch.baddbmm(out.to(low.dtype), low, torch.stack(up).transpose(1, 2).to(low.dtype)).to(out.dtype)


def _ask_last(layer: nn.Module, state: Pass, forward: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The last layer: only the texts' last tokens ask, and only they go on."""
    tokens, ends = hidden.shape[1], state.forest.ends

    def at_ends(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(at_ends, value))
        of_tokens = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == tokens
        return value[:, ends] if of_tokens else value

    with _not_checkpointed(layer):
        try:
            with state.but(asking="none"):
                forward(hidden, *args, **kwargs)
        except _KeysAndValues as known:
            kwargs = {name: at_ends(value) for name, value in kwargs.items()}
            with state.but(asking="last", keys_and_values=known.args):
                return forward(at_ends(hidden), *map(at_ends, args), **kwargs)
    raise ValueError("its last layer does not attend through the attention interface of transformers")


@contextmanager
def _not_checkpointed(layer: nn.Module) -> Iterator[None]:
    """Within it gradient checkpointing leaves the layer alone: it has little to keep, and gives its keys by an exception."""
    before = getattr(layer, "gradient_checkpointing", False)
    if before:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        if before:
            layer.gradient_checkpointing = True


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[`forest_attention`] as one of transformers' attention functions."""
    if tensors := sorted(name for name, other in others.items() if isinstance(other, Tensor)):
        raise ValueError(f"its attention takes {tensors[0]!r}, which packed texts do not have")
    state = _current.get()
    state.windows.add(sliding_window)
    if sliding_window is not None and not state.causal:
        raise ValueError("its attention has a window on both sides")
    if state.asking == "none":
        raise _KeysAndValues(key, value)
    if state.asking == "last":
        key, value = state.keys_and_values
    return forest_attention(
        query,
        key,
        value,
        state.forest,
        last_tokens=state.asking == "last",
        causal=state.causal,
        scaling=scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
    ), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
