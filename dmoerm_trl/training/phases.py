"""The three phases, each a function that can be called by itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from ..data.formatting import Encoding, Formatter
from ..data.rows import PreferenceRow
from ..modeling.assembly import add_experts_to
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..modeling.quantization import check_full_precision
from ..scoring.batch import score_encodings
from ..tasks import slug
from .aggregator_training import train_aggregator
from .embedding_cache import CHUNK, embeddings_on_disk
from .experts_trainer import Experts, ExpertsTrainer, history_of, untrained_experts
from .ranked_config import RankedRewardConfig
from .ranked_dataset import labelled_encodings, ranked_dataset
from .ranked_trainer import fit, train_or_resume
from .stages import History


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
    Fine-tune all weights of a pretrained model on the overall preferences of a task. The result is the base of the task. With
    all rows it is the single reward model, and with several seeds an ensemble (sections 4.2.2 and 5.2).

    Args:
        config: Further arguments of [`DMoERMConfig`].

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
    Train one LoRA expert per capability point, all on one stream of the rows that have labels of some of the points. The head
    of an expert starts as the head of the base.

    Each expert is trained on its own labels as if it were alone ([`ExpertsTrainer`]). If all rows have labels of all points and
    there is no LoRA dropout, training the points one by one, each in its own call, gives the same experts.

    Args:
        base (`DMoERMForSequenceClassification`): The model of phase 1, whose weights do not change. It may be loaded with a
            `quantization_config` (QLoRA); the experts are in full precision, and can be used on the base in full precision.
        points (`Sequence[str]`): One or more capability points.

    Returns:
        A one-task model with the experts, which [`export_expert`] writes, and the log history of each point.

    Raises:
        ValueError: For a quantised base under DeepSpeed.

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
    Train only the aggregator, and normalise the rewards to zero mean on the texts of this phase. Base and experts are frozen
    and without dropout, so each text is embedded once: see [`embeddings_on_disk`].

    Args:
        experts (`dict`): Capability point -> folder of the expert that phase 2 saved.
        unit_variance (`bool`): Whether the rewards are normalised to unit variance too.

    Returns:
        The inner model as a model with one task, and the log history.

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
        of_rows, pairs = labelled_encodings(rows, formatter, [None])
        columns = {"pairs": pairs, "texts": [], "length": [], "prompt": []}
        for row in of_rows:
            columns["texts"].append(list(range(len(encodings), len(encodings) + len(row))))
            columns["length"].append(len(experts) * len(row))  # the token budget of a batch counts embeddings
            columns["prompt"].append(str(row[0].input_ids[: row[0].prompt_length]))
            encodings += row
        datasets.append(Dataset.from_dict(columns))
    z = embeddings_on_disk(model, encodings, formatter.tokenizer.pad_token_id, Path(args.output_dir))
    inner = model.model.inner_models[slug(task)]
    history = train_aggregator(inner, model.config, z, *datasets, args, formatter.tokenizer)
    with torch.no_grad():
        rewards = [inner.reward(chunk.to(args.device))[:, 0] for chunk in z.split(CHUNK)]
        inner.set_normalisation(torch.cat(rewards), unit_variance)
    return model.eval(), history


def normalise(
    model: DMoERMForSequenceClassification,
    rows: Sequence[PreferenceRow],
    formatter: Formatter,
    *,
    unit_variance: bool = False,
) -> None:
    """
    Normalise the rewards of a one-task model, in place, to zero mean (optionally unit variance) on the responses of `rows`
    ("All RMs will be normalized to have a zero mean after training", figure 5).
    """
    (task,) = model.config.tasks
    encodings, _ = formatter.encode_rows(rows)
    flat = [encoding for row in encodings for encoding in row]
    rewards = score_encodings(model, flat, pad_token_id=formatter.tokenizer.pad_token_id, description="normalising")
    model.model.inner_models[slug(task)].set_normalisation(rewards.to(model.device), unit_variance)
