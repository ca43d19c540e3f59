"""
Load the initial weights of training from any pretrained model: its text backbone, and the head of a general reward
model if it is compatible (phase 1 trains a task's base from a general RM).
"""

import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..distributed.sharding import gathered
from ..tasks import slug
from .checkpoint import check_floating, read_weights, stored_weights
from .configuration_dmoerm import DMoERMConfig, as_config
from .embedding import is_causal
from .experts import layers_name, remove_experts
from .load_errors import loading
from .quantization import check_full_precision

logger = logging.getLogger(__name__)

OF_PRETRAINING = re.compile(
    r"(.*\.)?lm_head\.|(cls|embed_out|predictions|sop_classifier|pred_layer|head|decoder|mtp)\.|vocab_|"
    r"(lm|mask|generator|discriminator)_(predictions|lm_head)\."
)
"""Names of pretraining heads, which predict tokens and are dropped without a warning."""


class InitialWeights(NamedTuple):
    """
    The initial weights of training.

    Attributes:
        backbone (`PreTrainedModel`): The backbone, as `AutoModel` builds it from its configuration.
        head (`dict[str, Tensor]`, *optional*): `weight` of shape (1, H) and `bias` of shape (1,) of the linear layer that
            computes the reward from the last token's embedding.
    """

    backbone: PreTrainedModel
    head: dict[str, Tensor] | None


def load_initial_weights(
    name: str, *, trust_remote_code: bool = False, dtype: str | torch.dtype = "float32", num_layers: int | None = None
) -> InitialWeights:
    """
    Load the initial weights of training.

    Args:
        name (`str`): Folder or hub name of any model that `AutoModel` loads, of a reward model, or of a model of this
            package with one task.
        num_layers (`int`, *optional*): Number of layers to keep, from the bottom; all by default.

    Raises:
        ValueError: If it is not a complete model in full precision in safetensors, needs other inputs than text, has
            several tasks, or has fewer layers than `num_layers`.
    """
    if Path(name).exists():  # an adapter's folder has no configuration
        _check_files(name)
    with loading(name, "a base model"):
        return _load_initial_weights(name, trust_remote_code, dtype, num_layers)


def _load_initial_weights(
    name: str, trust_remote_code: bool, dtype: str | torch.dtype, num_layers: int | None
) -> InitialWeights:
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name}: got a quantised checkpoint, need full precision, because what was rounded away does not come back: take the "
            "model that it was made from."
        )
    _check_files(name)
    if isinstance(config, DMoERMConfig):
        _only_task(config, name)
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype)
        return initial_weights_of(model, name, num_layers=num_layers)
    options = {"trust_remote_code": trust_remote_code, "dtype": dtype, "use_safetensors": True}
    model, report = AutoModel.from_pretrained(name, config=config, output_loading_info=True, **options)
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):  # not used
        raise ValueError(
            f"{name}: got a checkpoint without {len(missing)} weights of {type(model).__name__} (such as {missing[0]!r}), "
            "need all of them, because the others would be drawn at random."
        )
    stored = stored_weights(name)
    check_floating(name, stored, model)
    dropped = {key: stored[key].shape for key in report["unexpected_keys"] if key in stored}
    start = initial_weights_of(model, name, num_layers=num_layers)
    names = _compatible_head(dropped, start.backbone, name)
    return start._replace(head=names and _as_head(*read_weights(stored, names).values()))


def initial_weights_of(
    model: PreTrainedModel, name: str | None = None, *, num_layers: int | None = None
) -> InitialWeights:
    """
    Take the initial weights of training from a loaded model, whose modules are reused; see [`load_initial_weights`].

    Args:
        name (`str`, *optional*): Name of the model in messages; its class by default.
    """
    name = name or type(model).__name__
    check_full_precision(model, "train as a whole")
    if isinstance(model.config, DMoERMConfig):
        task = _only_task(model.config, name)
        whole = model.base_model
        backbone, head = whole.backbones[whole.backbone_key(task)], whole.inner_models[slug(task)].base_head
        remove_experts(backbone)
        head = head.state_dict()
    else:
        backbone = _text_part(model, name)
        kept = {id(weight) for weight in model.base_model.parameters()}
        dropped = {key: weight for key, weight in model.named_parameters() if id(weight) not in kept}
        _check_rebuilt(backbone, name)
        names = _compatible_head({key: weight.shape for key, weight in dropped.items()}, backbone, name)
        head = names and _as_head(*(dropped[key].detach() for key in names))
    if num_layers is not None:
        _keep_layers(backbone, num_layers, name)
        _check_rebuilt(backbone, name)
    return InitialWeights(backbone, head)


def _check_files(name: str) -> None:
    """
    Check the files of a base model.

    Raises:
        ValueError: If it is an adapter, or its weights are not stored as safetensors.
    """
    folder = Path(name)
    if folder.suffix == ".gguf" or any(folder.glob("*.gguf")) and not stored_weights(name):
        raise ValueError(
            f"{name}: got a GGUF file, need safetensors in full precision: take the model that it was made from, or convert it "
            "with `AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)`."
        )
    if find_adapter_config_file(name) is not None:
        raise ValueError(
            f"{name}: got a PEFT adapter, need a whole model, because it is trained as a whole: merge it into its base with "
            "`PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)`, and save the tokenizer there."
        )
    if not stored_weights(name):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise ValueError(
            f"{name}: got no safetensors{f' but {pickles[0]}, a pickle' if pickles else ''}, need the weights as safetensors, "
            "because reading a pickle can run what is hidden in it: where you trust it, convert it once with "
            "`AutoModel.from_pretrained(folder).save_pretrained(other_folder)`, and save the tokenizer there."
        )


def _only_task(config: DMoERMConfig, name: str) -> str:
    """Return the only task of a model, or refuse the model."""
    if config.backbone_config is None or "Router" in (config.architectures or []):
        raise ValueError(f"{name}: got a router, need a model with a reward or a pretrained one: name another folder.")
    if len(config.tasks) != 1:
        raise ValueError(
            f"{name}: got a DMoERM of the tasks {list(config.tasks)}, need one base: take a task's with `base_reward_model(model, "
            "task).save_pretrained(folder)` of dmoerm_trl.modeling.assembly, save the tokenizer there, and name that folder."
        )
    return next(iter(config.tasks))


def _text_part(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Find the text part of a model: the module that `AutoModel` builds from its text configuration."""
    config = model.config.get_text_config()
    kinds = MODEL_MAPPING.get(type(config), type(model.base_model) if config is model.config else ())
    parts = [part for part in model.modules() if isinstance(part, kinds)]
    if not parts:
        raise ValueError(
            f"{name}: got a {type(model).__name__}, in which there is nothing that `AutoModel` builds from its "
            f"{type(config).__name__}, need a decoder or an encoder of text: take another base."
        )
    if config is not model.config:
        warnings.warn(
            f"{name}: the part of {type(model).__name__} that reads text is used, {type(parts[0]).__name__}; images and other "
            "inputs are not read.",
            stacklevel=2,
        )
    return parts[0]


def _compatible_head(dropped: Mapping[str, tuple[int, ...]], backbone: PreTrainedModel, name: str) -> list[str] | None:
    """
    Find the names of the weight, and of the bias if any, of a head that can be kept; warn of a head that cannot.

    Args:
        dropped (`Mapping`): Name -> shape of the weights that are not part of the backbone.
    """
    size = backbone.config.hidden_size
    dropped = {key: shape for key, shape in dropped.items() if not OF_PRETRAINING.match(key)}
    weights = [key for key, shape in dropped.items() if tuple(shape) == (1, size)]
    linear = [key for key in (*weights, *(key[: -len("weight")] + "bias" for key in weights)) if key in dropped]
    others = [key for key, shape in dropped.items() if key not in linear and len(shape) > 0]
    with gathered(backbone):  # ZeRO-3 may have sharded it during loading
        causal = is_causal(backbone)
    if len(weights) == 1 and not others and causal:
        logger.info("%s: its head %r is kept.", name, weights[0])
        return linear
    if dropped:
        warnings.warn(
            f"{name}: its head is left out ({', '.join(sorted(dropped)[:4])}) and a new one is drawn, because a reward is made by "
            f"one linear layer of the embedding of a decoder's last token, of shape (1, {size}).",
            stacklevel=2,
        )
    return None


def _as_head(weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    return {"weight": weight, "bias": weight.new_zeros(1) if bias is None else bias}


def _keep_layers(backbone: PreTrainedModel, count: int, name: str) -> None:
    """Keep only the lowest `count` layers of a backbone, in place."""
    config = backbone.config
    total = config.num_hidden_layers
    if not 1 <= count <= total:
        raise ValueError(f"got num_layers={count}, need 1 to {total}, which {name} has.")
    del backbone.get_submodule(layers_name(backbone))[count:]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:count]


def _check_rebuilt(backbone: PreTrainedModel, name: str) -> None:
    """
    Check that `AutoModel` can rebuild the backbone from its configuration, as needed to load a saved model.

    Raises:
        ValueError: If it would build a backbone with other weights.
    """
    with torch.device("meta"):
        again = AutoModel.from_config(as_config(backbone.config.to_dict()))
    if odd := sorted(again.state_dict().keys() ^ backbone.state_dict().keys()):
        raise ValueError(
            f"{name}: got a {type(backbone).__name__} whose weights are not those (such as {odd[0]!r}) of what `AutoModel` builds "
            "from its configuration, need the same, because a saved model is loaded so: load the base with "
            "`AutoModel.from_pretrained`."
        )
