"""
The consistency table in the simulated world over several seeds, each with a world, a base and a training of its own.

    python tests/benchmarks/world.py --seeds 3 --json FILE

A killed run goes on where it was. A cell's `mean` is that of the seeds; `low` and `high` are the lowest and the highest of
the seeds' values. `gain` is DMoERM's consistency less that of the best ensemble (mean, WCO or UWO), overall, seed by seed.
"""

import argparse
import json
import time
from pathlib import Path

from trl import TrlParser

from dmoerm_trl.commands.demo import evaluate_in_world, make_world_and_base
from dmoerm_trl.demo.world import World
from dmoerm_trl.evaluation.methods import router_accuracy
from dmoerm_trl.evaluation.table import CEILING
from dmoerm_trl.scripts.demo import RECIPE, DemoArguments
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.recipe import Recipe

ENSEMBLES = ("mean", "WCO", "UWO")


def read_recipe(recipe_file: str, seed: int, folder: Path, **keys: object) -> tuple[DemoArguments, Recipe]:
    """The demo's recipe for one seed, with the run, the base and the rows in `folder`, and some keys replaced."""
    places = {"output_dir": folder / "run", "base_model": folder / "base", "train_data": folder / "world.jsonl"}
    options = [word for key, value in {**places, **keys, "seed": seed}.items() for word in (f"--{key}", str(value))]
    parser = TrlParser((DemoArguments, Recipe))
    return parser.parse_args_and_config(["--config", recipe_file, *options], fail_with_unknown_args=True)


def run_seed(recipe_file: str, seed: int, folder: Path) -> dict:
    """Trains and evaluates all methods in the world of one seed."""
    start = time.perf_counter()
    arguments, recipe = read_recipe(recipe_file, seed, folder)
    world = World(seed)
    make_world_and_base(arguments, recipe, world)
    run = Pipeline(recipe)
    run.run()
    table = evaluate_in_world(run, world)
    print(f"\nseed {seed}\n\n{table.to_markdown()}", flush=True)
    return {
        "consistency": table.to_dict(),
        "router_accuracy": router_accuracy(run, run.rows("test")),
        "seconds": time.perf_counter() - start,
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
        table["DMoERM"]["overall"]["mean"] - max(table[method]["overall"]["mean"] for method in ENSEMBLES)
        for table in tables
    ]
    return {
        "consistency": consistency,
        "ceiling": consistency.pop(CEILING),
        "gain": {"seeds": gains, **cell(gains)},
        "router_accuracy": cell([seed["router_accuracy"] for seed in seeds]),
        "seconds": [seed["seconds"] for seed in seeds],
    }


def markdown(summary: dict) -> str:
    """The table of the means, in percent, with the range of the overall column."""
    rows = {**summary["consistency"], CEILING: summary["ceiling"]}
    columns = list(summary["ceiling"])
    lines = ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for method, cells in rows.items():
        numbers = [f"{100 * cells[column]['mean']:.1f}" for column in columns]
        numbers[-1] += f" ({100 * cells[columns[-1]]['low']:.1f} to {100 * cells[columns[-1]]['high']:.1f})"
        lines.append(f"| {method} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--recipe", default=RECIPE, help="the demo's recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs/world"), help="folder for the trainings")
    options = parser.parse_args()
    summary = summarise([run_seed(options.recipe, seed, options.runs / str(seed)) for seed in range(options.seeds)])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(summary, indent=2))
    print(f"\n{options.seeds} seeds\n\n{markdown(summary)}\n\ngain over the best ensemble: {summary['gain']}")


if __name__ == "__main__":
    main()
