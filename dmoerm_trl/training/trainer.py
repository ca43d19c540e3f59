"""TRL's RewardTrainer on K ranked responses a prompt instead of pairs: equation 7, each response once a step."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.utils import is_torch_bf16_gpu_available
from trl import RewardConfig, RewardTrainer


@dataclass
class PhaseConfig(RewardConfig):
    """
    [`~trl.RewardConfig`] with the paper's settings (appendix B.1): one prompt a step, evaluation every 100 steps, early
    stopping after 20 evaluations without a better accuracy, the best model kept, the dropout of LoRA left on.
    """

    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Prompts a step on each device, each with all its responses."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Prompts a batch in evaluation."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: 'steps' or 'epoch'."})
    eval_steps: int = field(default=100, metadata={"help": "Steps between two evaluations."})
    save_strategy: str | None = field(default=None, metadata={"help": "Always as `eval_strategy`."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept, the best and the last among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best model, not the last."})
    metric_for_best_model: str = field(default="eval_accuracy", metadata={"help": "What 'best' means."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run goes on with its count of evaluations without a better one."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Whether to turn all dropout off."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Whether to save memory for time."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Whether batches are pinned, which needs a GPU."}
    )
    report_to: Any = field(default="none", metadata={"help": "Where metrics are reported, such as 'tensorboard'."})
    patience: int = field(
        default=20, metadata={"help": "Evaluations without a better one after which training stops; 0 for never."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()
        self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps
        if self.save_total_limit == 1:  # the trainer would delete the last at its end, half of it if it is killed
            self.save_total_limit = 2
        super().__post_init__()

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """What a trainer needs to heed `patience`."""
        return [EarlyStoppingCallback(self.patience)] if self.patience else []


def ranking_loss(rewards: Tensor, ranks: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """
    Equation 7 for several prompts: the mean over prompts of the mean over a prompt's non-tied pairs (w better than l) of
    `-log(sigmoid(r_w - r_l))`.

    Args:
        rewards (`Tensor` of shape (N,)): r of every response.
        ranks (`Tensor` of shape (N,)): its rank within its prompt, 1 is best; tied responses are no pair.
        groups (`Tensor` of shape (N,)): index of its prompt.

    Returns:
        The loss, a scalar, and the margins `r_w - r_l` of all pairs, shape (pairs,).
    """
    pairs = (groups.unsqueeze(1) == groups) & (ranks.unsqueeze(1) < ranks)
    better, worse = pairs.nonzero(as_tuple=True)
    margins = rewards[better] - rewards[worse]
    in_group = torch.bincount(groups[better], minlength=int(groups.max()) + 1)
    weights = 1 / in_group[groups[better]] / (in_group > 0).sum().clamp(min=1)
    return -(nn.functional.logsigmoid(margins) * weights).sum(), margins


def collate_ranked(examples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """
    Flattens the responses of several prompts into one batch.

    Args:
        examples (`list[dict]`): each with `input_ids` (K lists of tokens, prompt included), `prompt_lengths` (K numbers)
            and `ranks` (K numbers), or with `texts` (K indices of embeddings) in place of the first two.

    Returns:
        The model's inputs with N = the sum of all K in the first dimension, and `ranks` and `groups` of shape (N,).
    """
    batch = {
        "ranks": torch.tensor([rank for example in examples for rank in example["ranks"]]),
        "groups": torch.tensor([index for index, example in enumerate(examples) for _ in example["ranks"]]),
    }
    if "texts" in examples[0]:
        return {"texts": torch.tensor([text for example in examples for text in example["texts"]]), **batch}
    rows = [torch.tensor(ids) for example in examples for ids in example["input_ids"]]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True),
        "prompt_lengths": torch.tensor([length for example in examples for length in example["prompt_lengths"]]),
        **batch,
    }


class RankedRewardTrainer(RewardTrainer):
    """
    Overrides three steps of [`~trl.RewardTrainer`]: the data are taken as they are (already tokenised by this package's
    formatter, none dropped for its length), a batch holds each response of a prompt once, and the loss is equation 7.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PhaseConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
    ):
        pad_token_id = processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda examples: collate_ranked(examples, pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=args.callbacks,
        )

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "prompt_lengths", "ranks", "texts"]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        ranks, groups = inputs.pop("ranks"), inputs.pop("groups")
        outputs = model(**inputs)
        rewards = outputs.logits.squeeze(-1)
        loss, margins = ranking_loss(rewards, ranks, groups)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * rewards.square().mean()
        metrics = self._metrics["train" if self.model.training else "eval"]
        margins = margins.detach().nan_to_num(nan=-torch.inf)  # a reward that is NaN is no right order
        margins = self.accelerator.pad_across_processes(margins, pad_index=torch.nan)
        margins = self.accelerator.gather(margins)
        margins = margins[~margins.isnan()]  # one entry a pair, so that the trainer's mean is that over pairs
        if len(margins):
            metrics["accuracy"].extend(((margins > 0).float() + 0.5 * (margins == 0).float()).tolist())
            metrics["margin"].extend(margins.tolist())
        return (loss, outputs) if return_outputs else loss


def fit(
    model: PreTrainedModel,
    args: PhaseConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """
    Trains a model on ranked responses and returns it as it was at its best evaluation, with the log history.

    A run that was killed goes on from its last whole checkpoint in `args.output_dir` and ends with the same model.
    """
    trainer = RankedRewardTrainer(model, args, train_dataset, eval_dataset, tokenizer)
    train(trainer)
    return trainer.model, trainer.state.log_history


def train(trainer: Trainer) -> None:
    """Trains to the end, from the last whole checkpoint if there is one, so that the result is that of an unbroken run."""
    checkpoint = last_checkpoint(trainer.args.output_dir)
    if checkpoint is not None and _was_the_end(checkpoint):  # the trainer would go on for another step
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    trainer.train(resume_from_checkpoint=checkpoint)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a trainer's folder that was written to its end, None where there is none."""
    whole = []
    for path in Path(folder).glob("checkpoint-*/trainer_state.json"):  # the trainer writes this file last
        try:
            whole.append((json.loads(path.read_text())["global_step"], str(path.parent)))
        except json.JSONDecodeError:
            continue
    return max(whole, default=(0, None))[1]


def _was_the_end(checkpoint: str) -> bool:
    """Whether training stopped with this checkpoint: its steps were done, or its patience was at its end."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
