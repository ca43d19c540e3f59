"""
Read and check the safetensors files of a checkpoint.

The checks are needed because transformers casts any stored dtype, and drops weights that the model does not have.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The arguments of `from_pretrained` that locate a checkpoint."""


class Stored(NamedTuple):
    """The file, dtype and shape of a stored weight."""

    file: str
    dtype: str
    """Name of the dtype in safetensors, such as `"F32"`, `"BF16"` or `"I8"`."""
    shape: tuple[int, ...]


def stored_weights(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Stored]:
    """
    List the weights of a checkpoint by name; none if it has no safetensors.

    Args:
        name (`str`): Folder or hub name.
        options (`Mapping`, *optional*): Arguments of `from_pretrained`; only those that locate the checkpoint are
            used.
    """
    stored = {}
    for file in _files(name, {key: value for key, value in (options or {}).items() if key in OF_THE_HUB}):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():
                header = weights.get_slice(key)
                stored[key] = Stored(file, header.get_dtype(), tuple(header.get_shape()))
    return stored


def _files(name: str, where: Mapping[str, Any]) -> Sequence[str]:
    """List the safetensors files of a checkpoint."""

    def file(file_name: str) -> str | None:
        return cached_file(name, file_name, _raise_exceptions_for_missing_entries=False, **where)

    if (whole := file(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := file(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        return get_checkpoint_shard_files(name, index, **where)[0]
    return []


def read_weights(stored: Mapping[str, Stored], names: Collection[str]) -> dict[str, Tensor]:
    """Load the weights `names` from the files of the `stored` ones."""
    found = {}
    for name in names:
        with safe_open(stored[name].file, "pt") as weights:
            found[name] = weights.get_tensor(name)
    return found


def check_floating(name: str, stored: Mapping[str, Stored], model: nn.Module) -> None:
    """
    Check that the floating-point weights of a model were stored as floating-point numbers.

    Args:
        name (`str`): Name of the checkpoint, for the message.
        stored (`Mapping`): The weights of the checkpoint.
        model (`nn.Module`): The model that was loaded from it.

    Raises:
        ValueError: If a floating-point weight of the model was stored as integers.
    """
    odd = [key for key, weight in stored.items() if weight.dtype.startswith(("I", "U", "BOOL"))]
    floating = [key for key, weight in model.state_dict().items() if weight.is_floating_point()] if odd else []
    for key in odd:
        # one may have a prefix
        if any(key == own or key.endswith(f".{own}") or own.endswith(f".{key}") for own in floating):
            raise ValueError(
                f"{name}: got the weight {key!r} as integers ({stored[key].dtype}), need floating-point numbers, because what "
                "was rounded away does not come back: save the model again in float32, bfloat16 or float16."
            )
