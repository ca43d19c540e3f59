"""An ensemble as one reward model (section 5.2 of the paper)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from ..data.formatting import Formatter
from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.load_errors import loading
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from .aggregation import AGGREGATIONS


class RewardEnsemble(nn.Module):
    """
    An ensemble of k reward models, which aggregates their rewards. The members are frozen and in evaluation mode.

    PPO reads a reward from `score(backbone(...).hidden_states[-1])`. The ensemble is its own backbone, and `score` is the
    identity, as in [`~dmoerm_trl.modeling.modeling_dmoerm.DMoERMForSequenceClassification`].

    Args:
        members (`Sequence[DMoERMForSequenceClassification]`): k reward models with the same tokenizer, each with the
            mean and standard deviation that standardise its rewards.
        aggregate (`Callable`): Function from shape (k, B, 1) to (B, 1), such as one of equations 8 to 10; see
            [`~dmoerm_trl.scoring.aggregation`].

    Raises:
        ValueError: If there is no member, or one is not a DMoERM.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, RewardEnsemble, worst_case_reward

    folders = ["runs/demo/ensemble/0", "runs/demo/ensemble/1"]
    members = [DMoERMForSequenceClassification.from_pretrained(folder) for folder in folders]
    reward_model = RewardEnsemble(members, worst_case_reward)
    ```
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
        """Set the mode, but keep the members in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """
        Compute the aggregated rewards; the arguments are those of [`~dmoerm_trl.modeling.modeling_dmoerm.DMoERMModel`].

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
    spec: str | Mapping[str, Sequence[str]], *, max_length: int, dtype: str | None = None
) -> tuple[DMoERMForSequenceClassification | RewardEnsemble, Formatter]:
    """
    Load a reward model and its formatter.

    Args:
        spec (`str` or `Mapping`): Folder or hub name of a DMoERM, or `{"mean": members}`, `{"WCO": members}`,
            `{"UWO": members}` with a list of such names, as best of n takes them.
        max_length (`int`): Tokens of prompt and response; older turns are cut.
        dtype (`str`, *optional*): Dtype of the bases; the checkpoint's if absent. Heads stay in fp32.

    Raises:
        ValueError: If the mapping is another, or the members' tokenizers differ.

    Example:

    ```python
    from dmoerm_trl import TextRewards, load_reward_model

    reward_model, formatter = load_reward_model({"mean": ["runs/demo/ensemble/0", "runs/demo/ensemble/1"]}, max_length=512)
    TextRewards(reward_model, formatter)([[{"role": "user", "content": "Hello?"}]], ["Good morning."])
    ```
    """
    if isinstance(spec, str):
        model, tokenizer = _load(spec, dtype)
        return model, Formatter.for_model(model.config, tokenizer, max_length)
    if not (
        isinstance(spec, Mapping) and len(spec) == 1 and next(iter(spec)) in AGGREGATIONS and next(iter(spec.values()))
    ):
        raise ValueError(
            f"got the reward model {spec}, need a folder, a hub name, or one of {list(AGGREGATIONS)} with a list of members."
        )
    ((name, members),) = spec.items()
    models, tokenizers = zip(*(_load(member, dtype) for member in members), strict=True)
    for member, tokenizer in zip(members, tokenizers, strict=True):
        if _language(tokenizer) != _language(tokenizers[0]):
            raise ValueError(
                f"got the members {members[0]} and {member} with tokenizers that differ in vocabulary or chat template, need "
                "one for all, because all read the same token ids: train the members on one base."
            )
    formatter = Formatter.for_model(models[0].config, tokenizers[0], max_length)
    return RewardEnsemble(list(models), AGGREGATIONS[name]), formatter


def _load(name: str, dtype: str | None) -> tuple[DMoERMForSequenceClassification, PreTrainedTokenizerBase]:
    options = {} if dtype is None else {"dtype": dtype}
    with loading(name, "a DMoERM", DMoERMConfig.model_type):
        return DMoERMForSequenceClassification.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name)


def _language(tokenizer: PreTrainedTokenizerBase) -> tuple:
    return tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id
