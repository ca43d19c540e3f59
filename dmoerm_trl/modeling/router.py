"""The outer layer: a small frozen top-1 gate over the tasks (equations 1 and 2)."""

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration import DMoERMConfig
from .heads import Float32Linear, last_token
from .pretrained import DMoERMPreTrainedModel


class Router(DMoERMPreTrainedModel):
    """
    `E(t | x)` of equation 1: a backbone and a linear layer over the tasks of `config.tasks`.

    It is given prompts alone, so that no response can choose its own judge. Inside a DMoERM it is frozen and always in
    evaluation mode; on its own it is trained on task labels by `transformers.Trainer`.
    """

    base_model_prefix = "backbone"
    _keep_in_fp32_modules_strict = ["score"]

    def __init__(self, config: DMoERMConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if config.router_config is None:
            raise ValueError("got no `router_config`, need the configuration of the router's backbone.")
        self.backbone = backbone if backbone is not None else AutoModel.from_config(config.router_config)
        self.score = Float32Linear(config.router_config.hidden_size, len(config.tasks))
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids (`Tensor` of shape (B, T)): the prompts' tokens, padded on the right.
            attention_mask (`Tensor` of shape (B, T)): ones for tokens.
            labels (`Tensor` of shape (B,), *optional*): index of the task in `config.tasks`.

        Returns:
            `logits` of shape (B, tasks), fp32, and the cross-entropy with `labels` as `loss`.
        """
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.score(last_token(hidden, attention_mask.sum(1)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`E(t | x)`, shape (B, tasks); the chosen task of equation 1 is its argmax."""
        return self(input_ids=input_ids, attention_mask=attention_mask).logits.softmax(-1)
