"""Train the aggregator of an inner model on cached embeddings, for phase 3."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.heads import Aggregator, activate
from ..modeling.inner import SMALLEST_STD, InnerModel, new_aggregator
from ..modeling.pretrained import DMoERMPreTrainedModel
from .embedding_cache import CHUNK
from .ranked_config import RankedRewardConfig
from .ranked_trainer import fit
from .stages import History


def train_aggregator(
    inner: InnerModel,
    config: DMoERMConfig,
    z: Tensor,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    args: RankedRewardConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> History:
    """
    Train the aggregator of an inner model, in place, whose other weights are frozen.

    Several members are trained one after the other, each with a seed of its own and validated on another part of the prompts of
    both datasets.

    Args:
        z (`Tensor` of shape (N, k, H)): The embeddings of all texts, on the CPU.
        train_dataset, eval_dataset (`Dataset`): Rows with `texts`, indices into z; their `pairs`; their `length` in tokens, of
            which a batch has a budget; and their `prompt`, the same text for the rows of one prompt.

    Returns:
        The log history of the first member.
    """
    x, start, standardisation = _inputs(inner.requires_grad_(False), z, args.device)
    sample = x[:: -(-len(x) // CHUNK)].to(args.device)
    members: list[Aggregator] = []
    history: History = []
    for number, datasets in enumerate(_folds(train_dataset, eval_dataset, config.aggregator_members)):
        own = copy.copy(args)
        if number:
            own.seed, own.output_dir = args.seed + number, str(Path(args.output_dir) / f"member-{number}")
            set_seed(own.seed)
        one = config.aggregator_members == 1
        member = inner.aggregator if one else new_aggregator(config, len(inner.points), members=1).to(args.device)
        member.start_from(*start, sample)
        _, of_member = fit(CachedAggregator(config, member, x), own, *datasets, tokenizer)
        members.append(member)
        history = history or of_member
    if len(members) > 1:
        inner.aggregator.set_members(members)
    if standardisation is not None:
        inner.aggregator.fold_standardisation(*standardisation)
    return history


@torch.no_grad()
def _inputs(
    inner: InnerModel, z: Tensor, device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """
    Return what the aggregator is trained on, the arguments of [`Aggregator.start_from`], and the mean and standard deviation
    by which the inputs were standardised, if they were.
    """
    if not inner.reads_scores:
        heads = inner.expert_heads.values()
        return z, (torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])), None
    x = torch.cat([inner.aggregator_inputs(chunk.to(device)) for chunk in z.split(CHUNK)])
    mean, std = x.mean(0), x.std(0)
    std = std.where(std > SMALLEST_STD * mean.abs() * 10, 1)  # an expert may score all texts alike
    return ((x - mean) / std).cpu(), (torch.ones_like(mean), torch.zeros_like(mean[:, 0])), (mean, std)


def _folds(train_dataset: Dataset, eval_dataset: Dataset, members: int) -> Sequence[tuple[Dataset, Dataset]]:
    """
    Return the rows on which each member is trained and validated: the datasets themselves for one member, else all rows, of
    which each member validates another part.

    Raises:
        ValueError: If there are fewer prompts than members.
    """
    if members == 1:
        return [(train_dataset.remove_columns("prompt"), eval_dataset.remove_columns("prompt"))]
    rows = concatenate_datasets([train_dataset, eval_dataset])
    numbers: dict[str, int] = {}
    folds = [numbers.setdefault(prompt, len(numbers)) % members for prompt in rows["prompt"]]
    rows = rows.remove_columns("prompt")
    if len(numbers) < members:
        raise ValueError(
            f"got aggregator_members={members} and {len(numbers)} ranked prompts in phase 3, need at least as many prompts, "
            "because each aggregator is validated on prompts of its own: lower it, or rank responses to more prompts."
        )
    return [
        tuple(
            rows.select([index for index, fold in enumerate(folds) if (fold == member) == validates])
            for validates in (False, True)
        )
        for member in range(members)
    ]


class CachedAggregator(DMoERMPreTrainedModel):
    """
    An aggregator as a model of its own, which looks up what it reads of its texts.

    Args:
        aggregator (`Aggregator`): It is trained in place.
        x (`Tensor` of shape (N, k, input_size)): What it reads of all texts, on the CPU.
    """

    def __init__(self, config: DMoERMConfig, aggregator: Aggregator, x: Tensor):
        super().__init__(copy.deepcopy(config))
        self.aggregator = aggregator.requires_grad_(True)
        self.__dict__["x"] = x  # not a buffer: it stays on the CPU

    def get_input_embeddings(self) -> None:
        """Return None, because FSDP calls this and there are none."""

    def forward(self, texts: Tensor, finite: bool = False) -> SequenceClassifierOutput:
        """Return `logits` of shape (B, 1) for `texts` of shape (B,), indices into x. `finite` is ignored."""
        logits = self.aggregator(self.x[texts.cpu()].to(texts.device))
        return SequenceClassifierOutput(logits=activate(logits, self.config.activation))
