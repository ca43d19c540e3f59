"""TRL's RewardTrainer for K ranked responses per prompt instead of pairs: equation 7, with one forward pass per response."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from trl import RewardTrainer

from ..data.formatting import Formatter
from ..data.preference_row import PreferenceRow
from ..distributed.engines import check_engine, start_deepspeed, unsharded_afterwards
from ..modeling.finite import nan_allowed
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..tasks import OVERALL
from .batches import TokenBatches, collate_ranked, distinct_tokens
from .checkpoints import check_checkpoint, find_best, last_checkpoint, reading, was_the_end
from .ranked_config import RankedRewardConfig
from .ranked_dataset import ranked_dataset

logger = logging.getLogger(__name__)


def ranking_loss(rewards: Tensor, pairs: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, int]:
    """
    Compute equation 7 for several prompts: the mean over prompts of the mean over a prompt's pairs (w better than l) of
    `-log(sigmoid(r_w - r_l))`.

    Args:
        rewards (`Tensor` of shape (N,)): Reward r of each response.
        pairs (`Tensor` of shape (pairs, 2)): Indices of w and l, two responses to one prompt.
        groups (`Tensor` of shape (N,)): Index of each response's prompt.

    Returns:
        The loss, a scalar that is 0 without pairs; the margins `r_w - r_l`, of shape (pairs,); and the number of prompts that
        have a pair.

    Example:

    ```python
    import torch
    from dmoerm_trl import ranking_loss

    rewards, pairs, groups = torch.tensor([2.0, 0.0]), torch.tensor([[0, 1]]), torch.tensor([0, 0])
    loss, margins, prompts = ranking_loss(rewards, pairs, groups)
    assert margins.tolist() == [2.0] and prompts == 1
    ```
    """
    better, worse = pairs.unbind(1)
    margins = rewards[better] - rewards[worse]
    in_group = torch.bincount(groups[better])
    prompts = int((in_group > 0).sum())
    weights = 1 / in_group[groups[better]] / max(prompts, 1)
    return -(nn.functional.logsigmoid(margins) * weights).sum(), margins, prompts


class RankedRewardTrainer(RewardTrainer):
    """
    TRL's [`~trl.RewardTrainer`] for K ranked responses per prompt. The arguments are those of the parent, in the same order.

    It overrides four steps. This package's formatter tokenises the rows, and none is dropped for its length. A batch holds each
    response of a prompt once. The loss is equation 7. An evaluation is exact, whatever the batches and the number of processes:
    `eval_loss` is the mean of equation 7 over all prompts that have a pair, and `eval_accuracy` and `eval_margin` are means
    over all pairs.

    Args:
        model (`DMoERMForSequenceClassification` or `str`): The model to train, or the folder or hub name of a base model, which
            gets a new head.
        args ([`RankedRewardConfig`], *optional*): The settings. By default those of the paper, with output to the folder
            `<model>-Reward`, and without evaluations if there is no `eval_dataset`.
        data_collator (`Callable`, *optional*): The collator; this package's by default.
        train_dataset, eval_dataset (`Sequence[PreferenceRow]` or `Dataset`, *optional*): Rows, or the result of
            [`~dmoerm_trl.training.ranked_dataset.ranked_dataset`].
        processing_class (`PreTrainedTokenizerBase`, *optional*): The model's tokenizer; loaded from the model's folder by
        default. options: Further arguments of the parent, such as `callbacks`.

    Raises:
        ValueError: If a response does not fit into `args.max_length`, or no row has a pair.

    Example:

    ```python
    from dmoerm_trl import RankedRewardTrainer, load_rows

    rows, _ = load_rows("runs/demo/data/test.jsonl")
    trainer = RankedRewardTrainer("runs/demo/base", train_dataset=rows[:4])
    trainer.args.max_steps = 1
    trainer.train()
    ```
    """

    rankings: list[str] = [""]
    """Suffixes of the metrics' names, one for each ranking that the model learns."""

    def __init__(
        self,
        model: DMoERMForSequenceClassification | nn.Module | str,
        args: RankedRewardConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
        train_dataset: Dataset | Sequence[PreferenceRow] | None = None,
        eval_dataset: Dataset | Sequence[PreferenceRow] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        if args is None:
            unevaluated = {"eval_strategy": "no", "load_best_model_at_end": False, "patience": 0}
            folder = f"{Path(name).name or 'DMoERM'}-Reward"
            args = RankedRewardConfig(folder, **unevaluated if eval_dataset is None else {})
        start_deepspeed(args)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(name)
        if isinstance(model, str):
            formatter = Formatter(processing_class, args.max_length or sys.maxsize)
            model = DMoERMForSequenceClassification.from_base(model, task=OVERALL, **formatter.model_settings)
        train_dataset, eval_dataset = (
            _as_dataset(rows, model, processing_class, args.max_length) for rows in (train_dataset, eval_dataset)
        )
        options.setdefault("callbacks", args.callbacks)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or partial(collate_ranked, pad_token_id=processing_class.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        self._seen = self._nothing()  # since the last training log

    # The data.

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: RankedRewardConfig, dataset_name: str
    ) -> Dataset:
        """Add the column `length`, by which rows are batched, and report the rows over the budget."""
        if "length" not in dataset.column_names:
            lengths = [distinct_tokens(row["input_ids"], row["prompt_lengths"]) for row in dataset]
            dataset = dataset.add_column("length", lengths)
        budget = args.train_tokens_per_batch if dataset_name == "train" else args.eval_tokens_per_batch
        over = [length for length in dataset["length"] if budget is not None and length > budget]
        if over and args.process_index == 0:
            logger.warning(
                f"{len(over)} of {len(dataset)} prompts have more tokens with their responses (up to {max(over)}) than the "
                f"budget of {budget} tokens a batch: each is a batch of its own."
            )
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "prompt_lengths", "pairs", "texts"]

    def get_train_dataloader(self) -> DataLoader:
        if self.args.train_tokens_per_batch is None:
            self._say_what_is_repeated(self.args.per_device_train_batch_size * self.args.world_size)
            return super().get_train_dataloader()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return self._in_token_batches(
            self.train_dataset, self.args.train_tokens_per_batch, lambda: seed + int(self.state.epoch or 0)
        )

    def _say_what_is_repeated(self, step: int) -> None:
        rows = len(self.train_dataset)
        if (
            self.args.world_size > 1
            and rows % step
            and not self.args.dataloader_drop_last
            and self.args.process_index == 0
        ):
            logger.warning(
                f"{-rows % step} of {rows} prompts are trained on twice an epoch: its last step would have {rows % step} of "
                f"{step}, and each of the {self.args.world_size} processes needs as many."
            )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        return self._in_token_batches(
            self.eval_dataset if eval_dataset is None else eval_dataset, self.args.eval_tokens_per_batch
        )

    def _in_token_batches(self, dataset: Dataset, budget: int, seed: Callable[[], int] | None = None) -> DataLoader:
        loader = DataLoader(
            self._remove_unused_columns(dataset),
            batch_sampler=TokenBatches(list(dataset["length"]), budget, seed),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    # The loss.

    def rank(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Run the model and return, for each of `rankings`, the rewards, pairs and groups for [`ranking_loss`]."""
        inputs = dict(inputs)
        pairs, groups = inputs.pop("pairs"), inputs.pop("groups")
        with nan_allowed():
            rewards = model(**inputs).logits
        return {"": (rewards.squeeze(-1), pairs[:, 1:], groups)}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ranked = self.rank(model, inputs)
        losses, totals = self._equation_7(ranked)
        shares = self._shares(totals[:, 1], num_items_in_batch)[[self.rankings.index(name) for name in ranked]]
        loss = (losses * shares.to(losses)).sum()
        if self.args.center_rewards_coefficient is not None:
            labelled = [r[torch.isin(groups, groups[pairs[:, 0]])] for r, pairs, groups in ranked.values()]
            squares = [rewards.square().sum() / max(len(rewards), 1) for rewards in labelled]
            loss = loss + self.args.center_rewards_coefficient * torch.stack(squares).sum()
        self._seen += totals
        return (loss, ranked) if return_outputs else loss

    def _equation_7(self, ranked: dict[str, tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """
        Compute the means of equation 7 over prompts, of shape (len(ranked),), and the sums for the metrics, of shape (rankings,
        5): the losses of the prompts, the number of prompts, the pairs in the right order (a tie of two rewards counts half),
        the margins, and the number of pairs.
        """
        losses, totals = [], self._nothing()
        for name, ranking in ranked.items():
            loss, margins, prompts = ranking_loss(*ranking)
            losses.append(loss)
            margins = margins.detach().cpu().double().nan_to_num(nan=-torch.inf)  # NaN counts as a wrong order
            right = (margins > 0).sum() + (margins == 0).sum() / 2
            numbers = [float(loss.detach()) * prompts, prompts, float(right), float(margins.sum()), len(margins)]
            totals[self.rankings.index(name)] = torch.tensor(numbers, dtype=totals.dtype)
        return torch.stack(losses), totals

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
        """
        Return the batches of an optimizer step, and how many of its prompts on all processes have a pair, of shape (rankings,).
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)
        prompts = self._nothing()[:, 1]
        for batch in batches:
            of_pairs = torch.stack([batch["pairs"][:, 0], batch["groups"][batch["pairs"][:, 1]]])
            prompts += torch.bincount(of_pairs.unique(dim=1)[0], minlength=len(prompts)).to(prompts)
        return batches, self._over_processes(prompts)

    def _shares(self, prompts: Tensor, of_step: Tensor | None) -> Tensor:
        """
        Compute the weight of a batch's mean in the mean of its optimizer step, of shape (rankings,). It is multiplied by the
        number of batches and processes, over which the trainer takes the plain mean.
        """
        if of_step is None:  # the step has one batch
            return torch.ones_like(prompts)
        batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return prompts * batches / of_step.to(prompts).clamp(min=1)

    def _nothing(self) -> Tensor:
        return torch.zeros(len(self.rankings), 5, dtype=torch.float64)

    def _metrics_of(self, totals: Tensor, prefix: str = "") -> dict[str, float]:
        """Compute the metrics over all processes, for the rankings that had a pair."""
        metrics = {}
        rows = self._over_processes(totals).tolist()
        for name, (loss, prompts, right, margin, pairs) in zip(self.rankings, rows, strict=True):
            if pairs:
                values = {"loss": loss / prompts, "accuracy": right / pairs, "margin": margin / pairs}
                metrics |= {f"{prefix}{metric}{name}": value for metric, value in values.items()}
        return metrics

    def _over_processes(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(values.to(self.args.device)) if self.accelerator.num_processes > 1 else values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs = {**self._metrics_of(self._seen), **logs}
            self._seen = self._nothing()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model. Under DeepSpeed or FSDP a checkpoint gets only the engine's files, because gathering the full weights is
        costly and nothing reads them. Its folder is created nevertheless, because each process finds the best checkpoint by it
        right after.
        """
        if not (_internal_call and (self.is_deepspeed_enabled or self.is_fsdp_enabled)):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)

    # The evaluation.

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """
        Run the parent's loop and add the metrics. accelerate gives all processes the same number of batches; the batches that
        it repeats for that at the end are left out of the sums.
        """
        self._evaluated: list[Tensor] = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sampler = dataloader.batch_sampler
        batches = sampler.total_length if isinstance(sampler, BatchSamplerShard) else len(sampler)
        own = len(range(self.accelerator.process_index, batches, self.accelerator.num_processes))
        totals = sum(self._evaluated[:own], self._nothing())
        output.metrics.update(self._metrics_of(totals, f"{metric_key_prefix}_"))
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            ranked = self.rank(model, self._prepare_inputs(inputs))
            self._evaluated.append(self._equation_7(ranked)[1])
        return None, None, None


def _as_dataset(
    rows: Dataset | Sequence[PreferenceRow] | None,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> Dataset | None:
    if rows is None or isinstance(rows, Dataset):
        return rows
    return ranked_dataset(rows, Formatter.for_model(model.config, tokenizer, max_length or sys.maxsize))


def fit(
    model: PreTrainedModel,
    args: RankedRewardConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """
    Train a model on ranked responses and return it as it was at its best evaluation, with the log history.

    A killed run resumes from its last complete checkpoint in `args.output_dir` and ends with the same model.
    """
    trainer = RankedRewardTrainer(
        model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer
    )
    train_or_resume(trainer)
    return trainer.model, trainer.state.log_history


def train_or_resume(trainer: Trainer) -> None:
    """
    Train to the end, from the last complete checkpoint if there is one, so that the result is that of an uninterrupted run.

    Raises:
        ValueError: If the checkpoint lacks a file or has an unreadable one; the message says what to delete.

    Example:

    ```python
    from dmoerm_trl import RankedRewardConfig, RankedRewardTrainer, load_rows, train_or_resume

    rows, _ = load_rows("runs/demo/data/test.jsonl")
    args = RankedRewardConfig("runs/mine", max_steps=1, eval_steps=1)
    trainer = RankedRewardTrainer("runs/demo/base", args, train_dataset=rows[:4], eval_dataset=rows[4:])
    train_or_resume(trainer)  # resumes if it is started again after a kill
    ```
    """
    check_engine(trainer)
    checkpoint = last_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:
        check_checkpoint(checkpoint, trainer)
        if was_the_end(checkpoint):  # the trainer would train for another step
            trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
        if trainer.args.load_best_model_at_end:
            find_best(checkpoint, trainer)
    with unsharded_afterwards(trainer), reading(checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
