"""The outer layer: a small frozen top-1 gate over the tasks (equations 1 and 2)."""

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration import DMoERMConfig
from .embedding import embeddings
from .heads import Float32Linear, nan_of_overflow
from .one_pass import taking_turns
from .pretrained import DMoERMPreTrainedModel

REMEMBERED = 4096
"""Prompts whose route a router remembers."""

SAMPLED = 64
"""Numbers of each weight by which a router sees that it has changed."""


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
        self._remembered: dict[tuple[int, ...], Tensor] = {}
        self._remembered_weights: tuple[tuple, Tensor] = (), torch.empty(0)
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
        logits = self._logits(input_ids, attention_mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """
        `E(t | x)`, shape (B, tasks); the chosen task of equation 1 is its argmax.

        The router runs once for each prompt and remembers the last ones, as long as its weights stay as they are.

        Args:
            input_ids, attention_mask (`Tensor` of shape (B, T)): as of [`forward`].
        """
        lengths = attention_mask.sum(1).long()
        prompts = [tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
        known = self._remembered
        with taking_turns:  # the threads of a server share one memory
            versions, sample = self._fingerprint()
            if versions != self._remembered_weights[0] or not torch.equal(sample, self._remembered_weights[1]):
                known.clear()
                self._remembered_weights = versions, sample
            if new := {prompt: row for row, prompt in enumerate(prompts) if prompt not in known}:
                rows = list(new.values())
                known.update(zip(new, self._logits(input_ids[rows], lengths[rows]).softmax(-1), strict=True))
            for prompt in prompts:  # those used last come last
                known[prompt] = known.pop(prompt)
            result = torch.stack([known[prompt] for prompt in prompts])
            for prompt in list(known)[:-REMEMBERED]:
                del known[prompt]
        return result

    def _fingerprint(self) -> tuple[tuple, Tensor]:
        """Places and versions of all weights, and some numbers of each: what is written through `.data` has no version."""
        weights = [weight.detach() for weight in self.parameters()]
        versions = tuple((weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in weights)
        sample = [weight.reshape(-1)[:: max(1, weight.numel() // SAMPLED)].float() for weight in weights]
        return versions, torch.cat(sample).cpu()

    def _logits(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        z = embeddings(self.backbone, [], input_ids, lengths)[:, 0]
        return nan_of_overflow(self.score(z), z)
