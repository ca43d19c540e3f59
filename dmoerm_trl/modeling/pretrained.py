"""What the router and the reward model have in common as Hugging Face models."""

from typing import Any

from transformers import PreTrainedModel

from .configuration import DMoERMConfig
from .experts import checkpoint_under_expert


class DMoERMPreTrainedModel(PreTrainedModel):
    """Heads, aggregator and normalisation stay in fp32; attention is whatever the backbones support."""

    config_class = DMoERMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["base_head", "expert_heads", "aggregator", "reward_mean", "reward_std"]

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for module in self.modules():
            if getattr(module, "gradient_checkpointing", False):
                checkpoint_under_expert(module)
