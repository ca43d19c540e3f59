"""k LoRA experts on one backbone, stored as PEFT adapters (equation 3)."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tasks import slug
from .configuration import DMoERMConfig
from .heads import last_token


def adapter_name(task: str, point: str) -> str:
    """Name of the PEFT adapter of a task's capability point."""
    return f"{slug(task)}__{slug(point)}"


def lora_config(config: DMoERMConfig) -> LoraConfig:
    """PEFT's configuration of one expert; the defaults are the paper's table 5."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_target_modules),
        layers_to_transform=config.layers_with_lora,
    )


def check_target_modules(backbone: nn.Module, target_modules: list[str]) -> None:
    """
    Raises:
        ValueError: if a LoRA target names no linear module of the backbone; the message lists those that it has.
    """
    linear = {name.rsplit(".", 1)[-1] for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    linear |= {n.split(".")[-1] for n, m in backbone.named_modules() if isinstance(m, LoraLayer)}
    if missing := [target for target in target_modules if target.rsplit(".", 1)[-1] not in linear]:
        raise ValueError(
            f"got LoRA target modules {target_modules}, but {type(backbone).__name__} has no linear module {missing}: "
            f"set `lora_target_modules` to some of {sorted(linear - {'base_layer'})}."
        )


def add_experts(backbone: PreTrainedModel, config: DMoERMConfig, names: list[str]) -> None:
    """
    Puts one untrained LoRA adapter for each of `names` into the backbone, in place.

    An untrained adapter changes nothing, its B is zero. An adapter that is there already is left as it is. All
    parameters of the backbone are left trainable.
    """
    present = {name for layer in lora_layers(backbone) for name in layer.lora_A}
    names = [name for name in names if name not in present]
    if not names:
        return
    check_target_modules(backbone, config.lora_target_modules)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for name in names:
            inject_adapter_in_model(lora_config(config), backbone, adapter_name=name)
    for layer in lora_layers(backbone):
        for module in layer.modules():
            module._is_hf_initialized = True  # or transformers would draw B at random
    backbone.requires_grad_(True)


def lora_layers(backbone: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in backbone.modules() if isinstance(module, LoraLayer))


@contextmanager
def active_expert(backbone: nn.Module, name: str | None) -> Iterator[None]:
    """
    Within it the backbone is that of one expert, or the base where `name` is None.

    PEFT's `set_adapter` would also flip `requires_grad`; what an expert is read for must not decide what is trained.
    """
    layers = list(lora_layers(backbone))
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [] if name is None else [name]
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def checkpoint_under_expert(layer: nn.Module) -> None:
    """Has gradient checkpointing recompute a layer under the expert under which it ran, not the one that ran last."""
    checkpoint = layer._gradient_checkpointing_func

    def checkpoint_with_expert(function: Callable, *args: Any) -> Any:
        lora = next(lora_layers(layer), None)
        expert = lora.active_adapters[0] if lora is not None and lora.active_adapters else None

        def run(*inputs: Any) -> Any:
            with active_expert(layer, expert):
                return function(*inputs)

        return checkpoint(run, *args)

    layer._gradient_checkpointing_func = checkpoint_with_expert


def embeddings(
    backbone: PreTrainedModel, names: list[str], input_ids: Tensor, attention_mask: Tensor, lengths: Tensor
) -> Tensor:
    """
    The last-token embeddings `z_i` of equation 3 under each expert; the base's alone where there are no experts.

    Args:
        names (`list[str]`): k adapters.
        input_ids, attention_mask (`Tensor` of shape (B, T)): texts padded on the right.
        lengths (`Tensor` of shape (B,)): number of tokens of each text.

    Returns:
        `Tensor` of shape (B, max(k, 1), H).
    """
    if not names:
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return last_token(hidden, lengths).unsqueeze(1)
    z = []
    for name in names:
        with active_expert(backbone, name):
            hidden = backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        z.append(last_token(hidden, lengths))
    return torch.stack(z, 1)
