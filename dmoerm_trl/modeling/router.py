"""The outer layer: a small frozen top-1 gate over the tasks (equations 1 and 2)."""

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_dmoerm import DMoERMConfig
from .embedding import embeddings
from .heads import Float32Linear, nan_of_overflow
from .multi_lora import backbone_lock
from .pretrained import DMoERMPreTrainedModel

REMEMBERED = 4096
"""Number of prompts whose routes a router caches."""

SAMPLED = 64
"""Number of entries of each weight that a router compares to detect a change."""


class Router(DMoERMPreTrainedModel):
    """
    `E(t | x)` of equation 1: a backbone and a linear layer over the tasks of `config.tasks`.

    It reads only the prompt, so that no response can choose the task that scores it. Inside a DMoERM it is frozen and
    always in evaluation mode; before that it is trained on task labels with `transformers.Trainer`.

    Example:

    ```python
    from dmoerm_trl import Router

    router = Router.from_pretrained("runs/demo/router")
    list(router.config.tasks)
    ```
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
        Compute the logits of the tasks.

        Args:
            input_ids (`Tensor` of shape (B, T)): Tokens of the prompts, padded on the right.
            attention_mask (`Tensor` of shape (B, T)): 1 for tokens, 0 for padding.
            labels (`Tensor` of shape (B,), *optional*): Indices of the tasks in `config.tasks`.

        Returns:
            `logits` of shape (B, tasks), fp32, and the cross-entropy with `labels` as `loss`.
        """
        logits = self._logits(input_ids, attention_mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """
        Compute `E(t | x)`, shape (B, tasks); its argmax is the chosen task of equation 1.

        The results of the most recently used prompts are cached as long as the router's weights do not change.

        Args:
            input_ids, attention_mask (`Tensor` of shape (B, T)): See [`forward`].
        """
        lengths = attention_mask.sum(1).long()
        prompts = [tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
        known = self._remembered
        with backbone_lock:  # the threads of a server share the cache
            versions, sample = self._fingerprint()
            if versions != self._remembered_weights[0] or not torch.equal(sample, self._remembered_weights[1]):
                known.clear()
                self._remembered_weights = versions, sample
            if new := {prompt: row for row, prompt in enumerate(prompts) if prompt not in known}:
                rows = list(new.values())
                known.update(zip(new, self._logits(input_ids[rows], lengths[rows]).softmax(-1), strict=True))
            for prompt in prompts:  # most recently used last
                known[prompt] = known.pop(prompt)
            result = torch.stack([known[prompt] for prompt in prompts])
            for prompt in list(known)[:-REMEMBERED]:
                del known[prompt]
        return result

    def _fingerprint(self) -> tuple[tuple, Tensor]:
        """
        Return the addresses and versions of all weights, and a sample of their entries.

        The sample is needed because writing through `.data` does not change the version.
        """
        weights = [weight.detach() for weight in self.parameters()]
        versions = tuple((weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in weights)
        sample = [weight.reshape(-1)[:: max(1, weight.numel() // SAMPLED)].float() for weight in weights]
        return versions, torch.cat(sample).cpu()

    def _logits(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        z = embeddings(self.backbone, [], input_ids, lengths)[:, 0]
        return nan_of_overflow(self.score(z), z)
