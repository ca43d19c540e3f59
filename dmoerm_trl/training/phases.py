"""The router and the three phases, each a function that can be called alone."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModel, Trainer, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from ..data.formatting import Encoding, Formatter
from ..data.rows import PreferenceRow
from ..evaluation.scoring import map_encodings, score_encodings
from ..modeling.assembly import add_experts_to, expert_on
from ..modeling.configuration import DMoERMConfig
from ..modeling.inner import InnerModel
from ..modeling.modeling import DMoERMForSequenceClassification
from ..modeling.pretrained import DMoERMPreTrainedModel, check_finite
from ..modeling.router import Router
from ..modeling.spans import find_spans
from ..tasks import slug
from .trainer import PhaseConfig, fit, train

History = list[dict[str, Any]]


def ranked_dataset(rows: Sequence[PreferenceRow], formatter: Formatter, point: str | None = None) -> Dataset:
    """
    The rows as [`RankedRewardTrainer`] takes them.

    Args:
        point (`str`, *optional*): take this capability point's labels in place of the overall ranks, and only the rows
            that have some, with two ranks that differ.
    """
    ranks = [row.ranks if point is None else row.capability_ranks.get(point, []) for row in rows]
    kept = [index for index, row_ranks in enumerate(ranks) if len(set(row_ranks)) > 1]
    if not kept:
        raise ValueError(
            f"got {len(rows)} rows and none with two distinct ranks of {point or 'the overall preference'}."
        )
    encodings, _ = formatter.encode_rows([rows[index] for index in kept])
    return Dataset.from_dict(
        {
            "input_ids": [[encoding.input_ids for encoding in row] for row in encodings],
            "prompt_lengths": [[encoding.prompt_length for encoding in row] for row in encodings],
            "ranks": [ranks[index] for index in kept],
        }
    )


def train_router(
    base: str,
    tasks: Sequence[str],
    train_rows: Sequence[PreferenceRow],
    eval_rows: Sequence[PreferenceRow],
    formatter: Formatter,
    args: PhaseConfig,
    *,
    num_layers: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Router, History]:
    """
    Trains the gate of equation 1 on the task labels of prompts, by cross-entropy. Rows of other tasks are not used.

    Args:
        base (`str`): a pretrained backbone with the tokenizer of the reward model.
        num_layers (`int`, *optional*): how many of its layers to keep, from the bottom; all if not given.

    Raises:
        ValueError: if the backbone has fewer layers, or a weight that is not finite.
    """
    set_seed(args.seed)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"got num_layers={num_layers}, need 1 to {config.num_hidden_layers}, which {base} has.")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:num_layers]
    backbone = AutoModel.from_pretrained(base, config=config, trust_remote_code=trust_remote_code, dtype="float32")
    check_finite(backbone)
    router = Router(DMoERMConfig(tasks={task: [] for task in tasks}, router_config=backbone.config), backbone)

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

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        router,
        args,
        data_collator=collate,
        train_dataset=dataset(train_rows),
        eval_dataset=dataset(eval_rows),
        compute_metrics=accuracy,
        callbacks=args.callbacks,
    )
    train(trainer)
    return router.eval(), trainer.state.log_history


def phase1(
    base: str,
    task: str,
    train_rows: Sequence[PreferenceRow],
    eval_rows: Sequence[PreferenceRow],
    formatter: Formatter,
    args: PhaseConfig,
    *,
    trust_remote_code: bool = False,
    **config: Any,
) -> tuple[DMoERMForSequenceClassification, History]:
    """
    Full fine-tuning of a pretrained model on a task's overall preferences: the task's base. With all of the rows it is
    the single reward model, with several seeds an ensemble (sections 4.2.2 and 5.2).

    Args:
        config: further arguments of [`DMoERMConfig`].
    """
    set_seed(args.seed)
    model = DMoERMForSequenceClassification.from_base(
        base,
        task=task,
        trust_remote_code=trust_remote_code,
        response_marker=formatter.markers.response_marker,
        end_of_turn=formatter.markers.end_of_turn,
        pad_token_id=formatter.tokenizer.pad_token_id,
        **config,
    )
    return fit(
        model, args, ranked_dataset(train_rows, formatter), ranked_dataset(eval_rows, formatter), formatter.tokenizer
    )


def phase2(
    base: DMoERMForSequenceClassification,
    point: str,
    train_rows: Sequence[PreferenceRow],
    eval_rows: Sequence[PreferenceRow],
    formatter: Formatter,
    args: PhaseConfig,
) -> tuple[Any, History]:
    """
    Trains one LoRA expert on the labels of one capability point; its head starts as the base's head.

    Returns:
        The expert, a `PeftModel` on `base` whose `save_pretrained` writes an ordinary adapter, and the log history.
    """
    set_seed(args.seed)
    return fit(
        expert_on(base),
        args,
        ranked_dataset(train_rows, formatter, point),
        ranked_dataset(eval_rows, formatter, point),
        formatter.tokenizer,
    )


def phase3(
    base: DMoERMForSequenceClassification,
    experts: Mapping[str, str | Path],
    train_rows: Sequence[PreferenceRow],
    eval_rows: Sequence[PreferenceRow],
    formatter: Formatter,
    args: PhaseConfig,
    *,
    unit_variance: bool = False,
) -> tuple[DMoERMForSequenceClassification, History]:
    """
    Trains the aggregator alone, and normalises the rewards to zero mean on the phase's own texts. Base and experts are
    frozen and without dropout, so every text is embedded once.

    Args:
        experts (`dict`): capability point -> folder of the expert, as phase 2 saved it.
        unit_variance (`bool`): whether the rewards are normalised to unit variance too.

    Returns:
        The inner model, a model of its own with one task, and the log history.
    """
    (task,) = base.config.tasks
    set_seed(args.seed)
    model = add_experts_to(base, experts).to(args.device)
    train_dataset, eval_dataset = ranked_dataset(train_rows, formatter), ranked_dataset(eval_rows, formatter)
    encodings, datasets = [], []
    for dataset in (train_dataset, eval_dataset):
        texts = []
        for row in dataset:
            start = len(encodings)
            encodings += [Encoding(i, n, 0) for i, n in zip(row["input_ids"], row["prompt_lengths"], strict=True)]
            texts.append(list(range(start, len(encodings))))
        datasets.append(Dataset.from_dict({"texts": texts, "ranks": dataset["ranks"]}))

    def embed(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        return model.model.embed(task, model.model.find_spans(input_ids, attention_mask, prompt_lengths))

    z = map_encodings(
        embed, encodings, pad_token_id=formatter.tokenizer.pad_token_id, device=model.device, description="embedding"
    )
    inner = model.model.inner_models[slug(task)]
    inner.aggregator.start_from(list(inner.expert_heads.values()), z)
    head = AggregatorOnEmbeddings(model.config, inner, z)
    _, history = fit(head, args, *datasets, formatter.tokenizer)
    with torch.no_grad():
        inner.set_normalisation(inner.reward(head.z)[:, 0], unit_variance)
    return model.eval(), history


class AggregatorOnEmbeddings(DMoERMPreTrainedModel):
    """
    An inner model's aggregator as a model of its own, which looks its texts' embeddings up: what phase 3 trains.

    Args:
        inner (`InnerModel`): its aggregator is trained in place, the rest is frozen.
        z (`Tensor` of shape (N, k, H)): the embeddings of all texts.
    """

    def __init__(self, config: DMoERMConfig, inner: InnerModel, z: Tensor):
        super().__init__(copy.deepcopy(config))
        self.aggregator = inner.aggregator
        self.__dict__["inner"] = inner.requires_grad_(False)  # not a submodule: only the aggregator is saved
        self.aggregator.requires_grad_(True)
        self.register_buffer("z", z, persistent=False)

    def forward(self, texts: Tensor) -> SequenceClassifierOutput:
        """`texts` of shape (B,), indices into z -> `logits` of shape (B, 1)."""
        return SequenceClassifierOutput(logits=self.inner.reward(self.z[texts]))


def normalise(
    model: DMoERMForSequenceClassification,
    rows: Sequence[PreferenceRow],
    formatter: Formatter,
    *,
    unit_variance: bool = False,
) -> None:
    """
    Brings the rewards of a one-task model to zero mean (optionally unit variance) on the responses of `rows`, in place
    ("All RMs will be normalized to have a zero mean after training", figure 5).
    """
    (task,) = model.config.tasks
    encodings, _ = formatter.encode_rows(rows)
    flat = [encoding for row in encodings for encoding in row]
    rewards = score_encodings(model, flat, pad_token_id=formatter.tokenizer.pad_token_id, description="normalising")
    model.model.inner_models[slug(task)].set_normalisation(rewards, unit_variance)


def _prompt_ids(encoding: Encoding, formatter: Formatter) -> list[int]:
    """The tokens that the router reads of a text, the same in training as in a DMoERM."""
    spans = find_spans(
        torch.tensor([encoding.input_ids]),
        prompt_lengths=torch.tensor([encoding.prompt_length]),
        response_marker=formatter.markers.response_marker,
        end_of_turn=formatter.markers.end_of_turn,
    )
    return spans.input_ids[0, : int(spans.prompt_lengths)].tolist()
