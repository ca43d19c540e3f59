"""
The consistency table in the simulated world over several seeds, each with a world, a base and trainings of its own.

    python tests/benchmarks/world.py --seeds 3 --json FILE

The seeds are 1, 2, ...: the settings were chosen on seed 0, those of the aggregator with a look at its test rows. Further options are keys of the recipe, such
as `--rows_per_task 2000 --test_share 0.5`. A killed run goes on where it was.

Rows beside those of the demo's table: `phase 1`, the base of the inner models; `LoRA mean` (and WCO, UWO), five LoRA reward
models; `task mean`, three reward models for each task, trained on its rows alone; `judge mean`, reward models trained on the
rows that only the judge labelled too, with its ranks on the whole. For a method's `training`, the seconds of one core that its
trainings took; for `scoring`, how long it takes to score the test rows, where a single reward model takes 1.

Keys: `consistency`: method -> column -> `mean`, `low` and `high` of the seeds' values; `ceiling`, the same of gold itself;
`gain`: DMoERM's consistency less that of the best ensemble of the same ranked rows, overall, seed by seed; `training` and
`scoring`; `router_accuracy`; `settings`, the recipe.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from world_members import SETTINGS, Member, members_of, train_members

from dmoerm_trl.arguments import Parser
from dmoerm_trl.commands.demo import make_world_and_base
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.demo.world import World
from dmoerm_trl.evaluation.methods import method_scores, router_accuracy
from dmoerm_trl.evaluation.table import CEILING, LENGTH_ONLY, consistency_table
from dmoerm_trl.files import write_json
from dmoerm_trl.scoring.aggregation import AGGREGATIONS
from dmoerm_trl.scoring.batch import score_rows
from dmoerm_trl.scripts.demo import DemoArguments
from dmoerm_trl.tasks import OTHERS, OVERALL, slug
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "demo" / "world.yaml"
SIZES = {"LoRA": 5, "task": 3, "judge": 3}
"""Kind of member -> size of its ensemble."""

SAME_ROWS = ("mean", "WCO", "UWO", *(f"LoRA {name}" for name in AGGREGATIONS), "task mean")
"""The ensembles of the same ranked rows as DMoERM."""

METHODS = (LENGTH_ONLY, "single", *SAME_ROWS, "judge mean", "phase 1", "DMoERM-w/o-Outer", "DMoERM")
"""The rows of the table."""


def read_recipe(recipe_file: str, seed: int, folder: Path, **keys: object) -> tuple[DemoArguments, Recipe]:
    """A recipe of the demo for one seed, with the run, the base and the rows in `folder`, and some keys replaced."""
    places = {"output_dir": folder / "run", "base_model": folder / "base", "train_data": folder / "world.jsonl"}
    options = [word for key, value in {**places, **keys, "seed": seed}.items() for word in (f"--{key}", str(value))]
    return Parser((DemoArguments, Recipe), prog="world.py").parse(["--config", str(recipe_file), *options])


def run_seed(recipe_file: str, seed: int, folder: Path, sizes: dict[str, int], keys: dict[str, str]) -> dict:
    """Train and evaluate all methods in the world of one seed, on the test rows of the tasks."""
    arguments, recipe = read_recipe(recipe_file, seed, folder, **keys)
    world = World(seed, arguments.pairs)
    make_world_and_base(arguments, recipe, world)
    run = Pipeline(recipe)
    run.run()
    rows = [row for row in run.rows("test") if row.task != OTHERS]
    members = train_members(recipe, members_of(recipe, sizes), folder / "members")
    scores = method_scores(run, rows) | {"phase 1": phase1_scores(run, rows)}
    for kind, size in sizes.items():
        ensemble = []
        for number in range(size):
            of_task = {m.task: found["scores"] for m, found in members.items() if (m.kind, m.seed) == (kind, number)}
            ensemble.append(merged(of_task, rows))
        for name in AGGREGATIONS if kind == "LoRA" else ("mean",):
            scores[f"{kind} {name}"] = aggregated(ensemble, AGGREGATIONS[name])
    scores[CEILING] = [[world.gold(row.prompt, text, row.task) for text in row.responses] for row in rows]
    table = consistency_table({name: scores[name] for name in (*METHODS, CEILING)}, rows, list(run.tasks.tasks))
    table.save(folder / "consistency")
    print(f"\nseed {seed}\n\n{table.to_markdown()}", flush=True)
    return {
        "consistency": table.to_dict(),
        "router_accuracy": router_accuracy(run, rows),
        "training": training_seconds(run, members),
        "scoring": scoring_ratios(run, rows[:: max(1, len(rows) // 300)]),
        "settings": asdict(arguments) | asdict(recipe) | {"members": SETTINGS, "sizes": sizes},
    }


def phase1_scores(run: Pipeline, rows: list[PreferenceRow]) -> list[list[float]]:
    """Score rows by the bases of the inner models, each row by that of its task."""
    if run.recipe.share_base:
        return score_rows(run.load(f"{OVERALL}/phase1"), rows, run.formatter)
    of_task = {}
    for task in run.tasks.tasks:
        own = [row for row in rows if row.task == task]
        of_task[task] = score_rows(run.load(f"{slug(task)}/phase1"), own, run.formatter)
    return merged(of_task, rows)


def merged(of_task: dict[str, list[list[float]]], rows: list[PreferenceRow]) -> list[list[float]]:
    """Merge the scores of each task's rows, or take those of all rows that have a task, in the order of `rows`."""
    scores = {task: iter(values) for task, values in of_task.items()}
    return [next(scores[OVERALL if OVERALL in scores else row.task]) for row in rows]


def aggregated(
    ensemble: list[list[list[float]]], aggregate: Callable[[torch.Tensor], torch.Tensor]
) -> list[list[float]]:
    """Aggregate the scores of the members of an ensemble."""
    values = iter(aggregate(torch.tensor([sum(member, []) for member in ensemble])).tolist())
    return [[next(values) for _ in of_row] for of_row in ensemble[0]]


def training_seconds(run: Pipeline, members: dict[Member, dict]) -> dict[str, float]:
    """Return method -> the seconds of one core that its trainings took."""
    stages = {name: seconds for name, seconds in run.manifest["seconds"].items() if name != "data"}

    def of(*prefixes: str) -> float:
        return sum(seconds for name, seconds in stages.items() if name.startswith(prefixes))

    ensemble, overall = of("ensemble/"), f"{OVERALL}/"
    base = of(f"{overall}phase1") if run.recipe.share_base else 0.0
    seconds = {"single": of("ensemble/0"), **dict.fromkeys(AGGREGATIONS, ensemble)}
    for kind in SIZES:
        for name in AGGREGATIONS if kind == "LoRA" else ("mean",):
            seconds[f"{kind} {name}"] = sum(
                found["seconds"] for member, found in members.items() if member.kind == kind
            )
    tasks = tuple(f"{slug(task)}/" for task in run.tasks.tasks)
    phase1 = base or sum(of(f"{task}phase1") for task in tasks)
    return seconds | {
        "phase 1": phase1,
        "DMoERM-w/o-Outer": of(overall),
        "DMoERM": of("router", *tasks) + base,
    }


def scoring_ratios(run: Pipeline, rows: list[PreferenceRow], rounds: int = 3) -> dict[str, float]:
    """Return method -> the time in which it scores rows, by that of a single reward model: medians of alternating rounds."""
    models = {"single": run.load("ensemble/0"), "DMoERM": run.load("model")}
    models["DMoERM-w/o-Outer"] = run.load(f"{OVERALL}/phase3")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            score_rows(model, rows, run.formatter)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    single = statistics.median(seconds["single"])
    ratios = {name: statistics.median(times) / single for name, times in seconds.items()}
    ratios |= dict.fromkeys(AGGREGATIONS, float(run.recipe.ensemble_size)) | {"phase 1": 1.0}
    return ratios | {
        f"{kind} {name}": float(size)
        for kind, size in SIZES.items()
        for name in (AGGREGATIONS if kind == "LoRA" else ("mean",))
    }


def cell(values: list[float]) -> dict[str, float]:
    """Mean, lowest and highest of the seeds' values."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}


def summarise(seeds: list[dict]) -> dict:
    """Mean, lowest and highest of the seeds for every method and column."""
    tables = [seed["consistency"] for seed in seeds]
    consistency = {
        method: {column: cell([table[method][column]["mean"] for table in tables]) for column in columns}
        for method, columns in tables[0].items()
    }
    gains = [
        table["DMoERM"][OVERALL]["mean"] - max(table[method][OVERALL]["mean"] for method in SAME_ROWS)
        for table in tables
    ]
    return {
        "consistency": consistency,
        "ceiling": consistency.pop(CEILING),
        "gain": {"seeds": gains, **cell(gains)},
        "router_accuracy": cell([seed["router_accuracy"] for seed in seeds]),
        **{
            cost: {method: cell([seed[cost][method] for seed in seeds]) for method in seeds[0][cost]}
            for cost in ("training", "scoring")
        },
        "settings": [seed["settings"] for seed in seeds],
    }


def markdown(summary: dict) -> str:
    """The table of the means, in percent, with the range of the overall column and the costs."""
    rows = {**summary["consistency"], CEILING: summary["ceiling"]}
    columns = list(summary["ceiling"])
    lines = ["| method | " + " | ".join([*columns, "training", "scoring"]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(columns) + 2))
    for method, cells in rows.items():
        numbers = [f"{100 * cells[column]['mean']:.1f}" for column in columns]
        numbers[-1] += f" ({100 * cells[columns[-1]]['low']:.1f} to {100 * cells[columns[-1]]['high']:.1f})"
        if method in summary["scoring"]:
            numbers += [f"{summary['training'][method]['mean']:.0f} s", f"{summary['scoring'][method]['mean']:.1f}"]
        else:
            numbers += ["–", "–"]
        lines.append(f"| {method} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first_seed", type=int, default=1, help="the first of them")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--recipe", default=RECIPE, help="a recipe of the demo")
    parser.add_argument("--runs", type=Path, default=Path("runs/world"), help="folder for the trainings")
    options, words = parser.parse_known_args()
    keys = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    numbers = range(options.first_seed, options.first_seed + options.seeds)
    seeds = [run_seed(options.recipe, seed, options.runs / str(seed), SIZES, keys) for seed in numbers]
    summary = summarise(seeds)
    write_json(options.json, summary)
    print(f"\n{options.seeds} seeds\n\n{markdown(summary)}\n\ngain over the best ensemble: {summary['gain']}")


if __name__ == "__main__":
    main()
