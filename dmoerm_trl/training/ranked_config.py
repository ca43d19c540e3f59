"""Training arguments of the phases: TRL's RewardConfig with the paper's settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import is_torch_bf16_gpu_available
from trl import RewardConfig

from ..distributed.engines import check_installed


@dataclass
class RankedRewardConfig(RewardConfig):
    """
    [`~trl.RewardConfig`] with the paper's settings (appendix B.1): one prompt per step, an evaluation every 100 steps, early
    stopping after 20 evaluations without a better accuracy, the best model kept, and LoRA dropout left on.

    Example:

    ```python
    from dmoerm_trl import RankedRewardConfig

    args = RankedRewardConfig("runs/mine", learning_rate=1e-5, train_tokens_per_batch=8192)
    ```
    """

    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Prompts per step and device, each with all its responses."}
    )
    train_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Token budget per step and device, instead of `per_device_train_batch_size`. A batch holds whole prompts "
            "with all their responses; shared tokens count once."
        },
    )
    eval_tokens_per_batch: int = field(
        default=16_384,
        metadata={
            "help": "Token budget of a batch in evaluation, which holds whole prompts. No metric depends on it."
        },
    )
    per_device_eval_batch_size: int = field(
        default=16,
        metadata={"help": "Prompts per batch in evaluating the router; the phases use `eval_tokens_per_batch`."},
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: 'steps' or 'epoch'."})
    eval_steps: int = field(default=100, metadata={"help": "Steps between two evaluations."})
    save_strategy: str | None = field(default=None, metadata={"help": "Always that of `eval_strategy`."})
    save_total_limit: int = field(
        default=2, metadata={"help": "Maximum number of checkpoints, including the best and the last."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best model, not the last."})
    metric_for_best_model: str = field(
        default="eval_accuracy", metadata={"help": "Metric by which the best model is chosen."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run keeps its count of evaluations without improvement."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Whether to turn all dropout off."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Whether to save memory at the cost of time."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Whether batches are pinned, which needs a GPU."}
    )
    report_to: Any = field(default="none", metadata={"help": "Where metrics are reported, such as 'tensorboard'."})
    ddp_timeout: int = field(
        default=86_400,
        metadata={"help": "Seconds that processes wait for the main process, which assembles the model."},
    )
    patience: int = field(
        default=20,
        metadata={"help": "Early stopping: evaluations without improvement before training stops; 0 for never."},
    )

    def __post_init__(self):
        self._check()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()
        self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps
        # at its end the trainer would delete the last one, and half of it if it is killed
        if self.save_total_limit == 1:
            self.save_total_limit = 2
        if self.deepspeed:
            check_installed()
        super().__post_init__()
        # `DataParallel` cannot hold these models: several GPUs need several processes
        self._n_gpu = min(self.n_gpu, 1)
        unset_hf_deepspeed_config()  # otherwise ZeRO-3 would load models in shards, which no phase could read

    def _check(self) -> None:
        """Refuse settings that the parent accepts but that make a trainer fail or silently do something else."""
        for names, (right, need) in RANGES.items():
            for name in names:
                if (value := getattr(self, name)) is not None and not right(value):
                    raise ValueError(f"got {name}={value!r}, need {need}.")
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"got learning_rate={self.learning_rate} and weight_decay={self.weight_decay}, need a product below 1, because a "
                "step would shrink weights past zero: lower one of them."
            )
        if self.eval_strategy not in ("steps", "epoch") and (self.load_best_model_at_end or self.patience):
            raise ValueError(
                f"got eval_strategy={self.eval_strategy!r}, need 'steps' or 'epoch', because evaluations choose "
                "the best model: set one, or `load_best_model_at_end: false` and `patience: 0`."
            )

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks that implement `patience`."""
        return [EarlyStoppingCallback(self.patience)] if self.patience else []


RANGES: dict[tuple[str, ...], tuple[Callable[[Any], bool], str]] = {
    ("train_tokens_per_batch", "eval_tokens_per_batch"): (lambda value: value >= 1, "a number of tokens, at least 1"),
    (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "eval_steps"),
        *("save_total_limit", "eval_accumulation_steps", "torch_empty_cache_steps", "dataset_num_proc"),
    ): (lambda value: value >= 1, "at least 1"),
    ("patience", "dataloader_num_workers"): (lambda value: value >= 0, "0 or more"),
    ("max_steps",): (lambda value: value == -1 or value >= 1, "at least 1, or -1 for the number of epochs to decide"),
    ("num_train_epochs", "logging_steps"): (lambda value: 0 < value < math.inf, "a number above 0"),
    (
        *("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay"),
        *("center_rewards_coefficient", "neftune_noise_alpha"),
    ): (lambda value: 0 <= value < math.inf, "a finite number, 0 or more"),
    ("adam_beta1", "adam_beta2"): (lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    ("label_smoothing_factor",): (lambda value: value == 0, "0, because equation 7 has no such factor"),
    ("push_to_hub",): (
        lambda value: not value,
        "False, because a stage is a part of a model: upload the finished one",
    ),
    ("auto_find_batch_size",): (
        lambda value: not value,
        "False, because the size of a step would change during training",
    ),
}
"""Settings -> check of a value, and description of what is needed."""
