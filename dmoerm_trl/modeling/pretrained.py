"""The base class of the router and the reward model as Hugging Face models."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .checkpoint import check_floating, stored_weights
from .configuration_dmoerm import DMoERMConfig
from .embedding import checkpoint_as_now
from .inner import InnerModel
from .quantization import keep_differentiable, of_bases_alone


class DMoERMPreTrainedModel(PreTrainedModel):
    """
    Base class of this package's models.

    Heads, aggregator and normalisation stay in fp32. The attention implementation is one that the backbones support.
    """

    config_class = DMoERMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["base_head", "expert_heads", "aggregator", "reward_mean", "reward_std"]

    def __init__(self, config: DMoERMConfig, *args: Any, **kwargs: Any):
        config.check()  # `from_pretrained` may have changed it
        super().__init__(config, *args, **kwargs)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for module in self.modules():
            if getattr(module, "gradient_checkpointing", False):
                checkpoint_as_now(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """
        Load a model from safetensors; see `PreTrainedModel.from_pretrained`. A `quantization_config` applies only to
        the bases.

        Raises:
            ValueError: If the checkpoint lacks a weight (a head, an expert, the router), has an unexpected one, one of
                another shape, one that is stored as integers or is not finite, or an invalid normalisation.
        """
        report = kwargs.pop("output_loading_info", False)
        # mismatched sizes are refused below
        kwargs = {
            "use_safetensors": True,
            **kwargs,
            "ignore_mismatched_sizes": True,
        }
        if (quantization := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = of_bases_alone(quantization)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        keep_differentiable(model)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(str(key) for key in info[problem]):
                raise ValueError(
                    f"{model.name_or_path}: got {len(keys)} {problem.replace('_', ' ')} (such as {keys[0]!r}), need a "
                    "checkpoint that has exactly the weights of its config.json, because a head or an expert drawn at "
                    "random gives wrong rewards: save it again with `save_pretrained`, or correct `tasks` in the config."
                )
        check_floating(model.name_or_path, stored_weights(model.name_or_path, kwargs), model)
        check_finite(model)
        for module in model.modules():
            if isinstance(module, InnerModel) and not module.reward_std.is_meta:
                module.check_normalisation()
        return (model, info) if report else model


def check_finite(model: nn.Module) -> None:
    """
    Check that all weights of a model are finite.

    Raises:
        ValueError: If a weight of the model, or its normalisation, is NaN or infinite.
    """
    for name, weight in model.state_dict().items():
        if not weight.is_meta and not weight.float().sum().isfinite():
            raise ValueError(
                f"got a weight {name!r} that is not finite, need numbers, because every reward would be NaN: the "
                "checkpoint is broken or its training diverged. Take an earlier one, or lower the learning rate."
            )
