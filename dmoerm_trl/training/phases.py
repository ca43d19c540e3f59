"""The router and the three phases, each a function that can be called alone."""

import copy
import hashlib
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from ..data.formatting import Encoding, Formatter
from ..data.rows import PreferenceRow
from ..distributed.engines import start_deepspeed
from ..modeling.assembly import add_experts_to
from ..modeling.boundaries import find_spans
from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.initial_weights import load_initial_weights
from ..modeling.inner import InnerModel
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..modeling.pretrained import DMoERMPreTrainedModel, check_finite
from ..modeling.quantization import check_full_precision
from ..modeling.router import Router
from ..scoring.batch import map_encodings, score_encodings
from ..tasks import slug
from .experts_trainer import Experts, ExpertsTrainer, history_of, untrained_experts
from .ranked_dataset import labelled_encodings, ranked_dataset
from .ranked_trainer import RankedRewardConfig, fit, train_or_resume

History = list[dict[str, Any]]


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
    Train the gate of equation 1 on the task labels of prompts, by cross-entropy. Rows of other tasks are not used. An
    evaluation gives `eval_accuracy` and `eval_macro_f1`, the mean over tasks of F1, in which each task counts the same.

    Args:
        base (`str`): a pretrained backbone with the tokenizer of the reward model.
        num_layers (`int`, *optional*): how many of its layers to keep, from the bottom; all if not given.
        balance (`float`): how far the loss makes up for tasks of few rows, from 0 (each row weighs the same) to 1 (each task
            does): a row's weight is its task's number of rows to the power of `-balance`.

    Raises:
        ValueError: if the backbone has fewer layers, or a weight that is not finite, for a budget of tokens, or a `balance`
            that is not within 0 and 1.

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
            f"got train_tokens_per_batch={args.train_tokens_per_batch} for the router, need None, because a batch of the "
            "router is prompts alone: set `per_device_train_batch_size`."
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
    """One weight a task, its number of rows to the power of `-balance`, with mean 1 over the rows."""
    weights = torch.bincount(labels, minlength=tasks).clamp(min=1).float() ** -balance
    return weights / weights[labels].mean()


def routing_metrics(routes: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """
    How well prompts were sent to their tasks: `accuracy`, the share of right routes, and `macro_f1`, the mean of F1 over the
    tasks that occur among the routes or the labels, in which a rare task counts as much as a frequent one.

    Args:
        routes, labels (array of shape (N,)): index of the chosen and of the right task.
    """
    routes, labels = np.asarray(routes), np.asarray(labels)
    right = routes == labels
    f1 = [
        2 * (right & (labels == task)).sum() / ((routes == task).sum() + (labels == task).sum())
        for task in np.union1d(routes, labels)
    ]
    return {"accuracy": float(right.mean()), "macro_f1": float(np.mean(f1))}


def phase1(
    base: str,
    task: str,
    train_rows: Sequence[PreferenceRow],
    eval_rows: Sequence[PreferenceRow],
    formatter: Formatter,
    args: RankedRewardConfig,
    *,
    trust_remote_code: bool = False,
    **config: Any,
) -> tuple[DMoERMForSequenceClassification, History]:
    """
    Full fine-tuning of a pretrained model on a task's overall preferences: the task's base. With all of the rows it is
    the single reward model, with several seeds an ensemble (sections 4.2.2 and 5.2).

    Args:
        config: further arguments of [`DMoERMConfig`].

    Example:

    ```python
    from dmoerm_trl import Formatter, RankedRewardConfig, load_rows, phase1
    from transformers import AutoTokenizer

    rows, _ = load_rows("runs/demo/data/test.jsonl")
    formatter = Formatter(AutoTokenizer.from_pretrained("runs/demo/base"), max_length=512)
    args = RankedRewardConfig("runs/phase1", max_steps=1, eval_steps=1)
    base, history = phase1("runs/demo/base", "chitchat", rows, rows, formatter, args)
    ```
    """
    set_seed(args.seed)
    model = DMoERMForSequenceClassification.from_base(
        base,
        task=task,
        trust_remote_code=trust_remote_code,
        **formatter.model_settings,
        **config,
    )
    return fit(
        model, args, ranked_dataset(train_rows, formatter), ranked_dataset(eval_rows, formatter), formatter.tokenizer
    )


def phase2(
    base: DMoERMForSequenceClassification,
    points: Sequence[str],
    train_rows: Sequence[PreferenceRow],
    eval_rows: Sequence[PreferenceRow],
    formatter: Formatter,
    args: RankedRewardConfig,
) -> tuple[DMoERMForSequenceClassification, dict[str, History]]:
    """
    Train LoRA experts, one a capability point, all on one stream of the rows that have labels of some of the points. An
    expert's head starts as the base's head.

    Each expert is trained on its own labels as if it were alone ([`ExpertsTrainer`]). So where all rows have labels of all
    points and there is no LoRA dropout, training the points one by one, each in a call of its own, gives the same experts.

    Args:
        base (`DMoERMForSequenceClassification`): the model of phase 1, which is taken over and left bit-equal. It may be loaded
            with a `quantization_config` (QLoRA); the experts are in full precision, and serve on a base in full precision too.
        points (`Sequence[str]`): one capability point or more.

    Returns:
        A one-task model with the experts, which [`export_expert`] writes, and each point's log history.

    Raises:
        ValueError: for a quantised base under DeepSpeed.

    Example:

    ```python
    from dmoerm_trl import RankedRewardConfig, base_reward_model, load_reward_model, load_rows, phase2

    model, formatter = load_reward_model("runs/demo/model", max_length=512)
    rows, _ = load_rows("runs/demo/data/test.jsonl")
    args = RankedRewardConfig("runs/phase2", max_steps=1, eval_steps=1)
    experts, histories = phase2(base_reward_model(model, "chitchat"), ["empathy ability"], rows, rows, formatter, args)
    ```
    """
    if args.deepspeed_plugin is not None:
        check_full_precision(base, "train experts on under DeepSpeed")
    set_seed(args.seed)
    model = untrained_experts(base, points, args.seed)
    datasets = [ranked_dataset(rows, formatter, points) for rows in (train_rows, eval_rows)]
    trainer = ExpertsTrainer(Experts(model), args, *datasets, formatter.tokenizer)
    train_or_resume(trainer)
    return model.eval(), {point: history_of(trainer.state.log_history, point) for point in points}


def phase3(
    base: DMoERMForSequenceClassification,
    experts: Mapping[str, str | Path],
    train_rows: Sequence[PreferenceRow],
    eval_rows: Sequence[PreferenceRow],
    formatter: Formatter,
    args: RankedRewardConfig,
    *,
    unit_variance: bool = False,
) -> tuple[DMoERMForSequenceClassification, History]:
    """
    Train the aggregator alone, and normalise the rewards to zero mean on the phase's own texts. Base and experts are
    frozen and without dropout, so every text is embedded once: see [`embeddings_on_disk`].

    Args:
        experts (`dict`): capability point -> folder of the expert, as phase 2 saved it.
        unit_variance (`bool`): whether the rewards are normalised to unit variance too.

    Returns:
        The inner model, a model of its own with one task, and the log history.

    Example:

    ```python
    from dmoerm_trl import RankedRewardConfig, base_reward_model, export_expert, load_reward_model, load_rows, phase3

    model, formatter = load_reward_model("runs/demo/model", max_length=512)
    export_expert(model, "chitchat", "empathy ability", "runs/expert")
    rows, _ = load_rows("runs/demo/data/test.jsonl")
    args = RankedRewardConfig("runs/phase3", max_steps=1, eval_steps=1)
    adapters = {"empathy ability": "runs/expert"}
    inner, history = phase3(base_reward_model(model, "chitchat"), adapters, rows, rows, formatter, args)
    ```
    """
    (task,) = base.config.tasks
    set_seed(args.seed)
    model = add_experts_to(base, experts).to(args.device)
    encodings: list[Encoding] = []
    datasets = []
    for rows in (train_rows, eval_rows):
        (of_rows, pairs), texts = labelled_encodings(rows, formatter, [None]), []
        for row in of_rows:
            texts.append(list(range(len(encodings), len(encodings) + len(row))))
            encodings += row
        lengths = [len(experts) * len(row) for row in texts]  # a batch's budget counts embeddings
        datasets.append(Dataset.from_dict({"texts": texts, "pairs": pairs, "length": lengths}))
    z = embeddings_on_disk(model, encodings, formatter.tokenizer.pad_token_id, Path(args.output_dir))
    inner = model.model.inner_models[slug(task)]
    inner.aggregator.start_from(list(inner.expert_heads.values()), z[:: -(-len(z) // CHUNK)].to(args.device))
    _, history = fit(AggregatorOnEmbeddings(model.config, inner, z), args, *datasets, formatter.tokenizer)
    with torch.no_grad():
        rewards = [inner.reward(chunk.to(args.device))[:, 0] for chunk in z.split(CHUNK)]
        inner.set_normalisation(torch.cat(rewards), unit_variance)
    return model.eval(), history


CHUNK = 4096
"""Texts whose embeddings are in memory at once."""


def embeddings_on_disk(
    model: DMoERMForSequenceClassification, encodings: Sequence[Encoding], pad_token_id: int, folder: Path
) -> Tensor:
    """
    The embeddings of all texts under a one-task model's experts (equation 3), computed once: a tensor that is mapped from a
    file in `folder`, so that what is in memory does not grow with the number of texts.

    Several processes share the work. The file gets its name, which tells the texts and the experts, when it is complete, so
    that a run that is killed later finds it.

    Returns:
        `Tensor` of shape (N, k, H), fp32, on the CPU.
    """
    (task,) = model.config.tasks
    shape = (len(encodings), len(model.config.tasks[task]), model.config.backbone_config.hidden_size)
    content = hashlib.sha256()
    for encoding in encodings:
        content.update(array("q", [encoding.prompt_length, len(encoding.input_ids), *encoding.input_ids]).tobytes())
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            content.update(weight.float().cpu().numpy().tobytes())
    path = folder / f"embeddings-{content.hexdigest()[:16]}.f32"
    size, state = math.prod(shape), PartialState()
    if not path.exists() or path.stat().st_size != 4 * size:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        z = torch.from_file(str(temporary), shared=True, size=size).view(shape)

        def embed(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
            return model.model.embed(task, model.model.find_spans(input_ids, attention_mask, prompt_lengths)).float()

        step = min(CHUNK, -(-len(encodings) // state.num_processes))
        for start in range(state.process_index * step, len(encodings), state.num_processes * step):
            chunk = encodings[start : start + step]
            description = f"embedding texts {start + 1} to {start + len(chunk)} of {len(encodings)}"
            options = {"pad_token_id": pad_token_id, "device": model.device, "description": description}
            z[start : start + step] = map_encodings(embed, chunk, **options)
        del z
        with temporary.open("rb+") as file:
            os.fsync(file)  # for the other machines
        state.wait_for_everyone()
        if state.is_main_process:
            temporary.rename(path)
        state.wait_for_everyone()
    return torch.from_file(str(path), shared=True, size=size).view(shape)


class AggregatorOnEmbeddings(DMoERMPreTrainedModel):
    """
    An inner model's aggregator as a model of its own, which looks its texts' embeddings up: what phase 3 trains.

    Args:
        inner (`InnerModel`): its aggregator is trained in place, the rest is frozen.
        z (`Tensor` of shape (N, k, H)): the embeddings of all texts, on the CPU.
    """

    def __init__(self, config: DMoERMConfig, inner: InnerModel, z: Tensor):
        super().__init__(copy.deepcopy(config))
        self.aggregator = inner.aggregator
        self.__dict__["inner"] = inner.requires_grad_(False)  # not a submodule: only the aggregator is saved
        self.__dict__["z"] = z  # not a buffer: it stays on the CPU
        self.aggregator.requires_grad_(True)

    def get_input_embeddings(self) -> None:
        """None: FSDP asks for it."""

    def forward(self, texts: Tensor, finite: bool = False) -> SequenceClassifierOutput:
        """`texts` of shape (B,), indices into z -> `logits` of shape (B, 1), not looked at whether they are `finite`."""
        return SequenceClassifierOutput(logits=self.inner.reward(self.z[texts.cpu()].to(texts.device)))


def normalise(
    model: DMoERMForSequenceClassification,
    rows: Sequence[PreferenceRow],
    formatter: Formatter,
    *,
    unit_variance: bool = False,
) -> None:
    """
    Bring the rewards of a one-task model to zero mean (optionally unit variance) on the responses of `rows`, in place
    ("All RMs will be normalized to have a zero mean after training", figure 5).
    """
    (task,) = model.config.tasks
    encodings, _ = formatter.encode_rows(rows)
    flat = [encoding for row in encodings for encoding in row]
    rewards = score_encodings(model, flat, pad_token_id=formatter.tokenizer.pad_token_id, description="normalising")
    model.model.inner_models[slug(task)].set_normalisation(rewards.to(model.device), unit_variance)


def _prompt_ids(encoding: Encoding, formatter: Formatter) -> list[int]:
    """The tokens that the router reads of a text, the same in training as in a DMoERM."""
    spans = find_spans(
        torch.tensor([encoding.input_ids]),
        prompt_lengths=torch.tensor([encoding.prompt_length]),
        **formatter.model_settings,
    )
    return spans.input_ids[0, : int(spans.prompt_lengths)].tolist()
