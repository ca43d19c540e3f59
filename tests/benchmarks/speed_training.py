"""Phase 2, and the phases of a whole inner MoE, against TRL's `RewardTrainer` on the same pairs."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig
from speed_measure import Case
from speed_setting import OURS, TASK, Setting, groups, least_flops, pairs
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.data.splits import split_rows
from dmoerm_trl.modeling.assembly import export_expert
from dmoerm_trl.modeling.heads import activate
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.training.phases import phase1, phase2, phase3
from dmoerm_trl.training.ranked_config import RankedRewardConfig

STEP = 8
"""Pairs a step of TRL's trainer, prompts a step of ours."""
MEASURED = 3 * STEP
"""Pairs at most on which TRL's trainer is measured; its cost is the same for every further step."""


def phase2_case(setting: Setting, name: str) -> Case:
    """
    All experts of a task for an epoch, without evaluation. The unit is an epoch of full fine-tuning of a single reward
    model. `peft_loop` trains the experts one after the other with TRL's trainer and PEFT, in steps of as many pairs, and
    `reference` pair by pair; both are measured on one expert and one step's pairs.
    """
    rows = setting.rows(*setting.sizes[name])
    all_pairs = pairs(rows, setting)
    part = all_pairs[:STEP]
    loop = partial(train_with_trl, setting, part, peft_config=setting.lora_config("all", task_type="SEQ_CLS"))
    variants: dict[str, Callable[[], Tensor]] = {
        "single": partial(train_with_trl, setting, all_pairs[:MEASURED]),
        "reference": partial(loop, batch_size=1),
        "peft_loop": loop,
    }
    variants |= {variant: partial(train_experts, setting, rows, layers) for variant, layers in OURS.items()}
    trees = groups(setting, rows)
    limits = {"single": least_flops(setting, trees, lora_layers=None, training="full")}
    for variant, layers in OURS.items():
        limits[variant] = least_flops(setting, trees, lora_layers=layers, training="lora")
    factor = setting.experts * len(all_pairs) / len(part)
    return Case(
        variants,
        limits,
        exactness=lambda _: {name: gradient_error(setting, layers, rows[:2]) for name, layers in OURS.items()},
        factors={
            "single": len(all_pairs) / len(all_pairs[:MEASURED]),
            "reference": factor,
            "peft_loop": factor,
        },
        once={"reference", "peft_loop"},
    )


def inner_moe_case(setting: Setting, name: str) -> Case:
    """
    Phases 1 to 3 of a task, an epoch each, on the pipeline's shares of the rows (60% and 40%, a tenth of each for
    validation), evaluations, checkpoints and files included. The unit is an epoch of a single reward model on all rows.
    """
    rows = setting.rows(*setting.sizes[name])
    split = split_rows(rows, test=0.0)
    all_pairs = pairs(rows, setting)
    variants = {"single": partial(train_with_trl, setting, all_pairs[:MEASURED])}
    variants |= {variant: partial(train_inner_moe, setting, split, layers) for variant, layers in OURS.items()}
    trees = {part: groups(setting, part_rows) for part, part_rows in split.items()}
    limits = {"single": least_flops(setting, groups(setting, rows), lora_layers=None, training="full")}
    for variant, layers in OURS.items():
        first, second = trees["phase1_train"], trees["phase3_train"]
        limits[variant] = (
            least_flops(setting, first, lora_layers=None, training="full")
            + least_flops(setting, trees["phase1_validation"], lora_layers=None)
            + least_flops(setting, first + second, lora_layers=layers, training="lora")
            + least_flops(setting, trees["phase1_validation"], lora_layers=layers)
            + least_flops(setting, second + trees["phase3_validation"], lora_layers=layers)
        )
    factors = {"single": len(all_pairs) / len(all_pairs[:MEASURED])}
    return Case(variants, limits, exactness=lambda _: {}, factors=factors, once={"ours_half"})


# The variants. Each returns a weight of the trained head, which all of the training has led to.


def train_with_trl(
    setting: Setting,
    examples: Sequence[dict[str, list[int]]],
    batch_size: int = STEP,
    peft_config: LoraConfig | None = None,
) -> Tensor:
    """An epoch with TRL's plain trainer."""
    model = AutoModelForSequenceClassification.from_pretrained(setting.base, num_labels=1)
    with TemporaryDirectory() as folder:
        args = RewardConfig(
            folder, per_device_train_batch_size=batch_size, save_strategy="no", max_length=None, **quiet(setting)
        )
        dataset = Dataset.from_list(list(examples))
        trainer = RewardTrainer(
            model, args, train_dataset=dataset, processing_class=setting.tokenizer, peft_config=peft_config
        )
        trainer.train()
    return next(weight for name, weight in model.named_parameters() if "score" in name).detach()


def train_experts(setting: Setting, rows: Sequence[PreferenceRow], lora_layers: str) -> Tensor:
    """Phase 2 of all experts."""
    model = DMoERMForSequenceClassification.from_base(setting.base, task=TASK, **setting.model_arguments(lora_layers))
    with TemporaryDirectory() as folder:
        never = {"eval_strategy": "no", "load_best_model_at_end": False, "patience": 0}
        args = RankedRewardConfig(folder, per_device_train_batch_size=STEP, **never, **quiet(setting))
        trained, _ = phase2(model, setting.points, rows, rows[:1], setting.formatter, args)
    return next(weight for name, weight in trained.named_parameters() if "expert_heads" in name).detach()


def train_inner_moe(setting: Setting, split: dict[str, list[PreferenceRow]], lora_layers: str) -> Tensor:
    """Phases 1, 2 and 3, each from what the one before left on disk."""
    first = split["phase1_train"], split["phase1_validation"]
    second = split["phase3_train"], split["phase3_validation"]
    with TemporaryDirectory() as folder:
        root = Path(folder)

        def args(phase: str) -> RankedRewardConfig:
            each = {"eval_strategy": "epoch", "save_only_model": True}
            return RankedRewardConfig(str(root / phase), per_device_train_batch_size=STEP, **each, **quiet(setting))

        model, _ = phase1(
            setting.base, TASK, *first, setting.formatter, args("phase1"), **setting.model_arguments(lora_layers)
        )
        model.save_pretrained(root / "base")

        model = DMoERMForSequenceClassification.from_pretrained(str(root / "base"))
        rows = [*split["phase1_train"], *split["phase3_train"]]
        model, _ = phase2(model, setting.points, rows, first[1], setting.formatter, args("phase2"))
        for point in setting.points:
            export_expert(model, TASK, point, root / point)

        model = DMoERMForSequenceClassification.from_pretrained(str(root / "base"))
        experts = {point: root / point for point in setting.points}
        model, _ = phase3(model, experts, *second, setting.formatter, args("phase3"))
    return next(weight for name, weight in model.named_parameters() if "aggregator" in name).detach()


def quiet(setting: Setting) -> dict:
    return {
        "num_train_epochs": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": setting.device == "cpu",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
    }


# The truth.


def gradient_error(setting: Setting, lora_layers: str, rows: Sequence[PreferenceRow]) -> float:
    """
    The largest relative difference of a LoRA weight's gradient, all experts in one pass against one text and one expert at
    a time with PEFT. The loss is the sum over the experts of equation 7 on their own labels.
    """
    model = setting.ours(lora_layers).train()
    inner, backbone = model.model.inner_models[TASK], model.model.backbones[TASK]
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
    texts = setting.encodings(rows)
    heads = copy.deepcopy(inner.expert_heads)

    batch = next(setting.padded(texts, len(texts)))
    lengths = torch.tensor([text.prompt_length for text in texts], device=setting.device)
    scores = inner.capability_scores(model.model.embed(TASK, model.model.find_spans(**batch, prompt_lengths=lengths)))
    sum(ranking_loss(scores[:, index], rows, point) for index, point in enumerate(setting.points)).backward()

    plain = setting.peft(model).train()
    for head, adapter, point in zip(heads.values(), plain.peft_config, setting.points, strict=True):
        plain.set_adapter(adapter)
        z = [
            plain(input_ids=torch.tensor([text.input_ids], device=setting.device)).last_hidden_state[0, -1]
            for text in texts
        ]
        ranking_loss(activate(head(torch.stack(z)), model.config.activation)[:, 0], rows, point).backward()
    truth = dict(plain.base_model.model.named_parameters())
    errors = [
        (weight.grad - truth[name].grad).norm() / truth[name].grad.norm()
        for name, weight in backbone.named_parameters()
        if "lora_" in name
    ]
    return float(torch.stack(errors).max())


def ranking_loss(scores: Tensor, rows: Sequence[PreferenceRow], point: str) -> Tensor:
    """Equation 7, pair by pair."""
    losses, remaining = [], iter(scores)
    for row in rows:
        rewards = list(islice(remaining, len(row.responses)))
        margins = [rewards[better] - rewards[worse] for better, worse in row.pairs_of(point)]
        losses.append(-nn.functional.logsigmoid(torch.stack(margins)).mean())
    return torch.stack(losses).mean()
