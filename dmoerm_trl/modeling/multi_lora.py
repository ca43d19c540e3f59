"""
Multi-LoRA with prefix sharing: run all experts of a backbone in one pass over packed sequences.

The pass wraps the `forward` of the backbone's modules, so that no model's code is copied or changed. In a pass
- the texts are a [`PackedSequences`]: there is no padding, except in the attention of encoders on a GPU, and a prompt
  that several texts share is computed only once;
- the backbone runs with a batch of one up to the first module with LoRA. There the hidden states are repeated for each
  expert; linear layers whose input is still the same for all experts run once. From then on row i of the batch belongs
  to expert i. On a CPU the layers with LoRA process the experts in groups;
- the last layer computes queries only for each text's last token, and keys and values for all tokens.

The experts are stored and trained as PEFT adapters; a pass only reads them. In training, texts that share a prompt
share the dropout on it.
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

from .attention import packed_attention
from .experts import layers_name
from .prefix_tree import PackedSequences

ATTENTION = "dmoerm_packed"
"""Name under which the attention function is registered with transformers."""

GROUP_TOKENS = 2048
"""Tokens per group of experts on a CPU, about as many as fit its caches; a layer processes group after group."""


@dataclass
class Pass:
    """
    The state of one pass.

    Attributes:
        backbone (`PreTrainedModel`): The backbone that runs.
        packed (`PackedSequences`): The texts.
        adapters (`list[str]`): The experts that the current layer processes together.
        causal (`bool`): Whether a token attends only to the tokens before it.
        queries (`str`): The tokens whose queries are used in attention: `"all"`, each text's `"last"`, or `"none"` if
            only keys and values are needed.
        keys_and_values (`tuple[Tensor, Tensor]`, *optional*): Those of all tokens, while `queries` is `"last"`.
        windows (`set`): The sliding windows of the layers' attention so far; None stands for full attention.
        common (`Tensor`, *optional*): The hidden states that are the same for all experts, in the module where the
            experts branch.
        known (`dict`, *optional*): Linear layer -> its output for `common`, to be reused by the next groups of
            experts.
    """

    backbone: PreTrainedModel
    packed: PackedSequences
    adapters: list[str]
    causal: bool
    queries: str = "all"
    keys_and_values: tuple[Tensor, Tensor] | None = None
    windows: set[int | None] = field(default_factory=set)
    common: Tensor | None = None
    known: dict[nn.Module, Tensor] | None = None

    @contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """Context manager in which some attributes have other values."""
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            yield
        finally:
            vars(self).update(before)


_current: ContextVar[Pass | None] = ContextVar("pass", default=None)

backbone_lock = RLock()
"""Lock of the thread that runs a backbone: a pass changes the backbone's modules, which other threads may use too."""


class _KeysAndValues(Exception):
    """Raised to leave the forward of a layer as soon as its keys and values are computed."""


def last_hidden_states(
    backbone: PreTrainedModel, adapters: list[str], packed: PackedSequences, *, causal: bool, first_position: int = 0
) -> Tensor:
    """
    Compute the last hidden state of each text's last token with each expert.

    Args:
        adapters (`list[str]`): k adapters of the backbone; if there are none, the base runs alone.
        packed (`PackedSequences`): N texts, without prefix sharing if the backbone is not causal.
        causal (`bool`): Whether the backbone's tokens attend only to the tokens before them.
        first_position (`int`): Position id of a text's first token.

    Returns:
        `Tensor` of shape (N, max(k, 1), H).

    Raises:
        ValueError: If the backbone has a feature that does not work with packed sequences; the message is the reason.
    """
    config = backbone.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if odd := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"it has layers with {', '.join(sorted(odd))}")
    state = Pass(backbone, packed, list(adapters), causal)
    with _pass_entered(state):
        hidden = backbone(
            input_ids=packed.input_ids.unsqueeze(0),
            position_ids=packed.position_ids.unsqueeze(0) + first_position,
            use_cache=False,
        ).last_hidden_state
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None)
    if windowed and state.windows == {None}:
        raise ValueError("its attention is not told the window that its configuration has")
    return hidden.expand(max(len(adapters), 1), len(packed.ends), -1).transpose(0, 1)


def in_this_pass(layer: nn.Module, function: Callable) -> Callable:
    """Bind a layer's function to the current pass; gradient checkpointing calls it again in the backward pass."""
    state = _current.get()
    recorded = state and replace(state, known=None)

    def run(*args: Any, **kwargs: Any) -> Any:
        if _current.get() is state:
            return function(*args, **kwargs)
        with _pass_entered(recorded, layer):
            return function(*args, **kwargs)

    return run


@contextmanager
def _pass_entered(state: Pass, part: nn.Module | None = None) -> Iterator[None]:
    """Context manager in which the modules of the backbone, or of one part of it, are wrapped for a pass."""
    config, backbone = state.backbone.config, state.backbone
    part = part or backbone
    with ExitStack() as stack:
        stack.enter_context(backbone_lock)
        stack.callback(_current.reset, _current.set(state))
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = ATTENTION
        layers = backbone.get_submodule(layers_name(backbone))
        here = [layer for layer in layers if part in (layer, backbone)]
        if layers[-1] in here:
            stack.enter_context(_wrapped(layers[-1], partial(_last_query_only, layers[-1]), state))
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
    """Context manager in which `module(...)` calls `wrapper(state, the module's own forward, ...)`."""
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
    """Run a layer for groups of experts, each as large as is fast on the device."""
    adapters = state.adapters
    size = len(adapters) if hidden.is_cuda else max(1, GROUP_TOKENS // hidden.shape[1])
    if size >= len(adapters):
        return forward(hidden, *args, **kwargs)
    outputs = []
    branching = len(hidden) == 1
    known: dict[nn.Module, Tensor] | None = {} if branching and not torch.is_grad_enabled() else None
    for start in range(0, len(adapters), size):
        rows = hidden if branching else hidden[start : start + size]
        with state.changed(adapters=adapters[start : start + size], known=known):
            outputs.append(forward(rows, *args, **kwargs))
    return torch.cat(outputs)


def _repeat(state: Pass, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run a module that has layers with LoRA, after repeating the hidden states for each expert if needed."""
    hidden = args[0] if args else kwargs["hidden_states"]
    branching = len(hidden) < len(state.adapters) or state.known is not None
    hidden = hidden.expand(len(state.adapters), -1, -1)
    if args:
        args = (hidden, *args[1:])
    else:
        kwargs["hidden_states"] = hidden
    try:
        with state.changed(common=hidden if branching else None):
            return forward(*args, **kwargs)
    finally:
        state.known = None  # the rest of the layer differs between the groups


def _once_if_common(linear: nn.Module, state: Pass, forward: Callable, x: Tensor) -> Tensor:
    """Run a linear layer of the base only once if its input is the same for all experts."""
    if x is not state.common:
        return forward(x)
    known = {} if state.known is None else state.known
    if linear not in known:
        known[linear] = forward(x[:1])
    return known[linear].expand(len(x), -1, -1)


def _experts_linear(layer: LoraLayer, state: Pass, forward: Callable, x: Tensor) -> Tensor:
    """
    Run a linear layer with LoRA: row i of `x`, shape (k, T, in), goes through the base layer and adapter i.

    In fp32 inference the adapters are merged into the base's weight for this call if that is less work, which it is if
    the experts have different inputs of many tokens.
    """
    base, names = layer.get_base_layer(), state.adapters
    down, up = ([parts[name].weight for name in names] for parts in (layer.lora_A, layer.lora_B))
    scaling = [layer.scaling[name] for name in names]
    if not down[0].numel():
        raise ValueError("its weights are sharded over devices")
    plain = type(base) is nn.Linear and x.dtype == base.weight.dtype == torch.float32
    if plain and x is not state.common and not torch.is_grad_enabled() and not layer.training:
        size_out, size_in = base.weight.shape
        if x.shape[1] * (size_in + size_out) > size_in * size_out:  # otherwise the two low-rank products are less work
            merged = [base.weight.addmm(b, a, alpha=scale) for a, b, scale in zip(down, up, scaling, strict=True)]
            return torch.stack(
                [nn.functional.linear(row, weight, base.bias) for row, weight in zip(x, merged, strict=True)]
            )
    out = _once_if_common(base, state, base, x)
    low = layer.lora_dropout[names[0]](x).to(down[0].dtype) @ torch.stack(down).transpose(1, 2)
    low = low * torch.tensor(scaling, dtype=low.dtype, device=low.device).view(-1, 1, 1)
    return torch.baddbmm(out.to(low.dtype), low, torch.stack(up).transpose(1, 2).to(low.dtype)).to(out.dtype)


def _last_query_only(
    layer: nn.Module, state: Pass, forward: Callable, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run the last layer with the queries of the texts' last tokens only, and return only these tokens."""
    tokens, ends = hidden.shape[1], state.packed.ends

    def at_ends(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(at_ends, value))
        of_tokens = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == tokens
        return value[:, ends] if of_tokens else value

    with _not_checkpointed(layer):
        try:
            with state.changed(queries="none"):
                forward(hidden, *args, **kwargs)
        except _KeysAndValues as known:
            kwargs = {name: at_ends(value) for name, value in kwargs.items()}
            with state.changed(queries="last", keys_and_values=known.args):
                return forward(at_ends(hidden), *map(at_ends, args), **kwargs)
    raise ValueError("its last layer does not attend through the attention interface of transformers")


@contextmanager
def _not_checkpointed(layer: nn.Module) -> Iterator[None]:
    """
    Context manager that switches gradient checkpointing off for a layer.

    The last layer has few activations to save, and it passes its keys and values on by an exception.
    """
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
    """Call [`packed_attention`] with the signature of transformers' attention functions."""
    if tensors := sorted(name for name, other in others.items() if isinstance(other, Tensor)):
        raise ValueError(f"its attention takes {tensors[0]!r}, which packed texts do not have")
    state = _current.get()
    state.windows.add(sliding_window)
    if sliding_window is not None and not state.causal:
        raise ValueError("its attention has a window on both sides")
    if state.queries == "none":
        raise _KeysAndValues(key, value)
    if state.queries == "last":
        key, value = state.keys_and_values
    return packed_attention(
        query,
        key,
        value,
        state.packed,
        last_tokens=state.queries == "last",
        causal=state.causal,
        scaling=scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
    ), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
