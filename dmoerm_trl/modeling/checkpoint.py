"""What stands in a checkpoint's safetensors: transformers casts whatever it finds, and drops what a model has no place for."""

from collections.abc import Collection, Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The arguments of `from_pretrained` that say where a checkpoint is."""


def safetensors_files(name: str, options: Mapping[str, Any]) -> list[str]:
    """
    The safetensors of a checkpoint, none if it has no such file.

    Args:
        name (`str`): folder or hub name.
        options (`Mapping`): arguments of `from_pretrained`, of which those that say where the checkpoint is are used.
    """
    where = {key: options[key] for key in OF_THE_HUB if key in options}

    def file(file_name: str) -> str | None:
        return cached_file(name, file_name, _raise_exceptions_for_missing_entries=False, **where)

    if (whole := file(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := file(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        return get_checkpoint_shard_files(name, index, **where)[0]
    return []


def read_weights(files: Collection[str], names: Collection[str]) -> dict[str, Tensor]:
    """The weights of some names; those that are not there are left out."""
    found = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys() if name in names}
    return found


def check_floating(name: str, files: Collection[str], model: nn.Module) -> None:
    """
    Checks that what a model computes with was stored as floating-point numbers.

    Args:
        name (`str`): the checkpoint, for the message.
        files (`Collection[str]`): its safetensors.
        model (`nn.Module`): what was loaded from it.

    Raises:
        ValueError: if a floating-point weight of the model was stored as integers.
    """
    odd = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            kinds = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}
            odd |= {key: kind for key, kind in kinds.items() if kind.startswith(("I", "U", "BOOL"))}
    if not odd:
        return
    floating = [key for key, weight in model.state_dict().items() if weight.is_floating_point()]
    for stored, kind in odd.items():  # a base may be stored under a prefix
        if any(stored == key or stored.endswith(f".{key}") or key.endswith(f".{stored}") for key in floating):
            raise ValueError(
                f"{name}: got the weight {stored!r} as integers ({kind}), need floating-point numbers, because what was "
                "rounded away does not come back: save the model again in float32, bfloat16 or float16."
            )
