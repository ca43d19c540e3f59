"""An ensemble as one reward model (section 5.2 of the paper): for PPO, for GRPO and RLOO, for a monitor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from ..evaluation.scorers import AGGREGATIONS
from ..modeling.configuration import DMoERMConfig
from ..modeling.loading import loading
from ..modeling.modeling import DMoERMForSequenceClassification


class RewardEnsemble(nn.Module):
    """
    The rewards of k reward models made into one, in one pass a member. The members are frozen and in evaluation mode.

    PPO reads a reward from `score(backbone(...).hidden_states[-1])`. The ensemble is its own backbone, and `score` is the
    identity, as in [`~dmoerm_trl.modeling.modeling.DMoERMForSequenceClassification`].

    Args:
        members (`Sequence[DMoERMForSequenceClassification]`): k reward models of one tokenizer. Each holds the mean and the
            deviation that standardise its rewards. They are taken over.
        aggregate (`Callable`): rewards of shape (k, B, 1) -> (B, 1): one of equations 8 to 10, see
            [`~dmoerm_trl.evaluation.ensembles`].

    Raises:
        ValueError: if there is no member, or one is no DMoERM.
    """

    base_model_prefix = "backbone"

    def __init__(self, members: Sequence[DMoERMForSequenceClassification], aggregate: Callable[[Tensor], Tensor]):
        super().__init__()
        kinds = [type(member).__name__ for member in members]
        if not kinds or not all(isinstance(member, DMoERMForSequenceClassification) for member in members):
            raise ValueError(
                f"got the members {kinds}, need one or more DMoERMForSequenceClassification, because only they hold the mean "
                "and the deviation that bring their rewards to one scale: train them with `dmoerm train`."
            )
        self.members = nn.ModuleList(members)
        self.aggregate = aggregate
        self.score = nn.Identity()
        self.requires_grad_(False).eval()

    @property
    def backbone(self) -> "RewardEnsemble":
        return self

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def train(self, mode: bool = True) -> "RewardEnsemble":
        """The members stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """
        Takes what [`~dmoerm_trl.modeling.modeling.DMoERMModel`] takes.

        Returns:
            `SequenceClassifierOutput`: `logits` of shape (B, 1), the rewards; `hidden_states`, one tensor of shape (B, T, 1)
            that has them at every position, from which PPO reads them.
        """
        rewards = torch.stack([member(input_ids, attention_mask, **kwargs).logits for member in self.members])
        logits = self.aggregate(rewards)
        return SequenceClassifierOutput(
            logits=logits, hidden_states=(logits.unsqueeze(1).expand(-1, input_ids.shape[1], -1),)
        )


def load_reward_model(
    spec: str | Mapping[str, Sequence[str]],
) -> tuple[DMoERMForSequenceClassification | RewardEnsemble, PreTrainedTokenizerBase]:
    """
    A reward model and its tokenizer.

    Args:
        spec (`str` or `Mapping`): folder or hub name of a DMoERM, or `{"mean": members}`, `{"WCO": members}`,
            `{"UWO": members}` with a list of such names, as best of n takes them.

    Raises:
        ValueError: if the mapping is another, or the members' tokenizers differ.
    """
    if isinstance(spec, str):
        return _load(spec)
    if not (
        isinstance(spec, Mapping) and len(spec) == 1 and next(iter(spec)) in AGGREGATIONS and next(iter(spec.values()))
    ):
        raise ValueError(
            f"got the reward model {spec}, need a folder, a hub name, or one of {list(AGGREGATIONS)} with a list of members."
        )
    ((name, members),) = spec.items()
    models, tokenizers = zip(*map(_load, members), strict=True)
    for member, tokenizer in zip(members, tokenizers, strict=True):
        if _language(tokenizer) != _language(tokenizers[0]):
            raise ValueError(
                f"got the members {members[0]} and {member} with tokenizers that differ in vocabulary or chat template, need "
                "one for all, because all read the same token ids: train the members on one base."
            )
    return RewardEnsemble(list(models), AGGREGATIONS[name]), tokenizers[0]


def _load(name: str) -> tuple[DMoERMForSequenceClassification, PreTrainedTokenizerBase]:
    with loading(name, "a DMoERM", DMoERMConfig.model_type):
        return DMoERMForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def _language(tokenizer: PreTrainedTokenizerBase) -> tuple:
    return tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id
