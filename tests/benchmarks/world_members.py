"""Reward models beside those of a run in the simulated world, of which further ensembles are made."""

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, pstdev

import torch

from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.demo.world import World
from dmoerm_trl.evaluation.response_store import worker_pool
from dmoerm_trl.files import write_json
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.scoring.batch import score_capabilities, score_rows
from dmoerm_trl.tasks import OTHERS, OVERALL, slug
from dmoerm_trl.training.phases import phase1, phase2
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.recipe import Recipe

PREFERENCE = "overall preference"
"""The only "capability point" of a LoRA reward model: its labels are the ranks."""

SETTINGS = {
    "task": {"max_steps": 100, "eval_steps": 10},
    "LoRA": {"learning_rate": 3e-3},
    "judge": {"max_steps": 1500, "eval_steps": 150},
}
"""
Kind of member -> what its training has other than the recipe's `baselines`.

- `"task"`: trained on the rows of one task alone;
- `"LoRA"`: LoRA with the experts' settings and a head, on the pretrained base, as the ensembles of appendix B.2;
- `"judge"`: trained on the rows that only the judge labelled too, with its ranks on the whole.
"""


@dataclass(frozen=True)
class Member:
    """One reward model: its kind, the task whose rows it is trained on and scores ("overall" for all), and its seed."""

    kind: str
    task: str
    seed: int


def members_of(recipe: Recipe, sizes: dict[str, int]) -> list[Member]:
    """List the members of ensembles of `sizes`, kind -> number of members; those of a task for each task."""
    tasks = {kind: list(recipe.task_table.tasks) if kind == "task" else [OVERALL] for kind in sizes}
    return [Member(kind, task, seed) for kind in sizes for task in tasks[kind] for seed in range(sizes[kind])]


def train_members(recipe: Recipe, members: list[Member], folder: Path) -> dict[Member, dict]:
    """Train members beside a finished run and return what [`train_member`] wrote. Those that are there are not trained again."""
    calls = [(recipe, member, _file(folder, member)) for member in members if not _file(folder, member).exists()]
    with worker_pool(recipe.workers) as run:
        for _ in run(train_member, calls):
            pass
    return {member: json.loads(_file(folder, member).read_text()) for member in members}


def _file(folder: Path, member: Member) -> Path:
    return folder / f"{slug(member.kind)}-{slug(member.task)}-{member.seed}.json"


def train_member(recipe: Recipe, member: Member, file: Path) -> int:
    """
    Train a member and write its `scores` of the responses to the test rows, standardised on the validation rows, and the
    `seconds` of the training. With a task they are those of the task's rows.
    """
    run = Pipeline(recipe)
    parts = ("phase1_train", "phase3_train"), ("phase1_validation", "phase3_validation"), ("test",)
    training, validation, test = (run.rows(*names, task=member.task) for names in parts)
    test = [row for row in test if row.task != OTHERS]
    if member.kind == "judge":
        world = World(recipe.seed)
        training = [row if row.pairs_of() or row.task == OTHERS else world.judged(row) for row in training]
    training, validation = ([row for row in rows if row.pairs_of()] for rows in (training, validation))
    work = file.with_suffix(".work")
    settings = replace(recipe, baselines={**recipe.baselines, **SETTINGS[member.kind]})
    args = settings.phase("baselines", str(work), seed=recipe.seed + member.seed, disable_tqdm=True)
    start = time.perf_counter()
    if member.kind == "LoRA":
        torch.manual_seed(args.seed)  # for the head
        base = DMoERMForSequenceClassification.from_base(
            recipe.base_model, task=member.task, **run.formatter.model_settings, **recipe.model_settings
        )
        parts = [_with_labels(rows) for rows in (training, validation)]
        model, _ = phase2(base, [PREFERENCE], *parts, run.formatter, args)
    else:
        model, _ = phase1(
            recipe.base_model, member.task, training, validation, run.formatter, args, **recipe.model_settings
        )
    seconds = time.perf_counter() - start
    of_validation, of_test = (_scores(run, model, rows) for rows in (validation, test))
    mu, sigma = mean(sum(of_validation, [])), pstdev(sum(of_validation, []))
    scores = [[(score - mu) / sigma for score in of_row] for of_row in of_test]
    shutil.rmtree(work)
    write_json(file, {"scores": scores, "seconds": seconds})
    return 1


def _with_labels(rows: list[PreferenceRow]) -> list[PreferenceRow]:
    return [replace(row, capability_ranks={PREFERENCE: row.ranks}, capability_pairs={}) for row in rows]


def _scores(run: Pipeline, model: DMoERMForSequenceClassification, rows: list[PreferenceRow]) -> list[list[float]]:
    """The rewards of the responses or, of a LoRA reward model, the scores of its only expert."""
    (points,) = model.config.tasks.values()
    if not points:
        return score_rows(model, rows, run.formatter)
    encodings, _ = run.formatter.encode_rows(rows)
    flat = [encoding for row in encodings for encoding in row]
    scores = score_capabilities(model, flat, pad_token_id=run.formatter.tokenizer.pad_token_id).scores[:, 0]
    values = iter(scores.tolist())
    return [[next(values) for _ in row.responses] for row in rows]
