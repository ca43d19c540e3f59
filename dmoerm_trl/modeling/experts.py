"""The k LoRA experts of one backbone, stored as PEFT adapters (equation 3)."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from .configuration_dmoerm import DMoERMConfig
from .configuration_dmoerm import adapter_name as adapter_name


def lora_config(config: DMoERMConfig, backbone: PreTrainedModel) -> LoraConfig:
    """
    Build PEFT's configuration of one expert; the defaults are those of the paper's table 5.

    Raises:
        ValueError: If `lora_layers` selects some layers and the backbone has no list of layers.
    """
    targets: list[str] | str = list(config.lora_target_modules)
    if (
        indices := config.layers_with_lora
    ) is not None:  # a regular expression, because PEFT's `layers_to_transform` needs a longer name
        name = layers_name(backbone).rsplit(".", 1)[-1]
        targets = rf"(.*\.)?{name}\.({'|'.join(map(str, indices))})\.(.*\.)?({'|'.join(map(re.escape, targets))})"
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )


def layers_name(backbone: PreTrainedModel) -> str:
    """
    Return the name of the backbone's list of layers, such as `"layers"` or `"encoder.layer"`.

    Raises:
        ValueError: If no list has as many modules as the configuration has layers.
    """
    count = getattr(backbone.config.get_text_config(), "num_hidden_layers", None)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name
    raise ValueError(
        f"got a {type(backbone).__name__} without a list of {count} layers, need one, because the layers are counted "
        'there; LoRA in all layers (lora_layers="all") does without it.'
    )


def remove_experts(backbone: PreTrainedModel) -> None:
    """Remove all LoRA adapters from the backbone, in place; the inverse of [`add_experts`]."""
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, LoraLayer):
            backbone.set_submodule(name, layer.get_base_layer())
    vars(backbone).pop("peft_config", None)


def check_target_modules(backbone: nn.Module, target_modules: list[str]) -> None:
    """
    Check that the LoRA targets name modules of the backbone.

    Raises:
        ValueError: If a target names no linear module of the backbone; the message lists the names that exist.
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
    Add one untrained LoRA adapter for each of `names` to the backbone, in place.

    An untrained adapter does not change the output, because its B is zero. Existing adapters are left as they are. All
    parameters of the backbone become trainable, except quantised ones.
    """
    present = {name for layer in lora_layers(backbone) for name in layer.lora_A}
    names = [name for name in names if name not in present]
    if not names:
        return
    check_target_modules(backbone, config.lora_target_modules)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for name in names:
            inject_adapter_in_model(lora_config(config, backbone), backbone, adapter_name=name)
    for layer in lora_layers(backbone):
        layer._active_adapter = []  # if no expert is selected, the backbone is the base
        for module in layer.modules():
            module._is_hf_initialized = True  # otherwise transformers would initialise B at random
    for weight in backbone.parameters():
        weight.requires_grad_(weight.is_floating_point())


def lora_layers(backbone: nn.Module) -> Iterator[LoraLayer]:
    """Iterate over the backbone's layers with LoRA."""
    return (module for module in backbone.modules() if isinstance(module, LoraLayer))


@contextmanager
def active_expert(backbone: nn.Module, name: str | None) -> Iterator[None]:
    """
    Context manager in which the backbone runs with one expert, or as the base if `name` is None.

    PEFT's `set_adapter` is not used, because it also changes `requires_grad`: running an expert must not change what
    is trained.
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
