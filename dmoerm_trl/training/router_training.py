"""Train the router, the outer layer (equations 1 and 2)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from ..data.formatting import Encoding, Formatter
from ..data.rows import PreferenceRow
from ..distributed.engines import start_deepspeed
from ..modeling.boundaries import find_spans
from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.initial_weights import load_initial_weights
from ..modeling.pretrained import check_finite
from ..modeling.router import Router
from .ranked_config import RankedRewardConfig
from .ranked_trainer import train_or_resume
from .stages import History


def train_router(
    base: str,
    tasks: Sequence[str],
    train_rows: Sequence[PreferenceRow],
    eval_rows: Sequence[PreferenceRow],
    formatter: Formatter,
    args: RankedRewardConfig,
    *,
    num_layers: int | None = None,
    balance: float = 0.0,
    trust_remote_code: bool = False,
) -> tuple[Router, History]:
    """
    Train the gate of equation 1 on the task labels of prompts by cross-entropy. Rows of other tasks are not used. An evaluation
    gives `eval_accuracy` and `eval_macro_f1`, the mean of F1 over tasks.

    Args:
        base (`str`): A pretrained backbone with the tokenizer of the reward model.
        num_layers (`int`, *optional*): Number of its layers to keep, from the bottom; all by default.
        balance (`float`): Weighting of the loss, from 0 (all rows weigh the same) to 1 (all tasks do). The weight of a row is
            the number of rows of its task to the power of `-balance`.

    Raises:
        ValueError: If the backbone has fewer layers or a weight that is not finite, if a token budget is set, or if `balance`
            is not between 0 and 1.

    Example:

    ```python
    from dmoerm_trl import Formatter, RankedRewardConfig, load_rows, train_router
    from transformers import AutoTokenizer

    rows, _ = load_rows("runs/demo/data/test.jsonl")
    formatter = Formatter(AutoTokenizer.from_pretrained("runs/demo/base"), max_length=512)
    args = RankedRewardConfig("runs/router", max_steps=1, eval_steps=1)
    router, history = train_router("runs/demo/base", ["chitchat", "roleplay"], rows, rows, formatter, args)
    ```
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"got balance={balance}, need 0 (each row weighs the same) to 1 (each task does).")
    if args.train_tokens_per_batch is not None:
        raise ValueError(
            f"got train_tokens_per_batch={args.train_tokens_per_batch} for the router, need None, because the "
            "router reads only prompts: set `per_device_train_batch_size`."
        )
    set_seed(args.seed)
    backbone = load_initial_weights(base, trust_remote_code=trust_remote_code, num_layers=num_layers).backbone
    check_finite(backbone)
    router = Router(DMoERMConfig(tasks={task: [] for task in tasks}, router_config=backbone.config), backbone)
    for module in router.modules():
        if args.disable_dropout and isinstance(module, nn.Dropout):
            module.p = 0.0

    def dataset(rows: Sequence[PreferenceRow]) -> Dataset:
        rows = [row for row in rows if row.task in tasks]
        encodings = [formatter.encode(row.prompt, response="") for row in rows]
        spans = [_prompt_ids(encoding, formatter) for encoding in encodings]
        return Dataset.from_dict({"input_ids": spans, "labels": [list(tasks).index(row.task) for row in rows]})

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = formatter.tokenizer.pad(
            [{"input_ids": example["input_ids"]} for example in examples], padding_side="right", return_tensors="pt"
        )
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    def metrics(prediction: Any) -> dict[str, float]:
        return routing_metrics(prediction.predictions.argmax(-1), prediction.label_ids)

    train_dataset = dataset(train_rows)
    weights = _task_weights(torch.tensor(train_dataset["labels"]), len(tasks), balance).to(args.device)

    def balanced_loss(outputs: SequenceClassifierOutput, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        losses = nn.functional.cross_entropy(outputs.logits, labels, weights, reduction="sum")
        return losses / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    start_deepspeed(args)
    trainer = Trainer(
        router,
        args,
        data_collator=collate,
        train_dataset=train_dataset,
        eval_dataset=dataset(eval_rows),
        compute_loss_func=balanced_loss if balance else None,
        compute_metrics=metrics,
        callbacks=args.callbacks,
    )
    train_or_resume(trainer)
    return router.eval(), trainer.state.log_history


def _task_weights(labels: Tensor, tasks: int, balance: float) -> Tensor:
    """Compute the weight of each task, its number of rows to the power of `-balance`, with mean 1 over the rows."""
    weights = torch.bincount(labels, minlength=tasks).clamp(min=1).float() ** -balance
    return weights / weights[labels].mean()


def routing_metrics(routes: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """
    Compute the `accuracy` of routing and the `macro_f1`, the mean of F1 over the tasks that occur among the routes or the
    labels.

    Args:
        routes, labels (array of shape (N,)): Indices of the chosen and of the correct task.
    """
    routes, labels = np.asarray(routes), np.asarray(labels)
    right = routes == labels
    f1 = [
        2 * (right & (labels == task)).sum() / ((routes == task).sum() + (labels == task).sum())
        for task in np.union1d(routes, labels)
    ]
    return {"accuracy": float(right.mean()), "macro_f1": float(np.mean(f1))}


def _prompt_ids(encoding: Encoding, formatter: Formatter) -> list[int]:
    """Return the tokens of a text that the router reads, the same in training as in a DMoERM."""
    spans = find_spans(
        torch.tensor([encoding.input_ids]),
        prompt_lengths=torch.tensor([encoding.prompt_length]),
        **formatter.model_settings,
    )
    return spans.input_ids[0, : int(spans.prompt_lengths)].tolist()
