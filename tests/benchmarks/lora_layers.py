"""
What LoRA in fewer layers costs in consistency: DMoERM in the simulated world with LoRA in all layers, the top half and the
top third, over several seeds. Base, router and phase 1 are those of one training, phases 2 and 3 are trained anew.

    python tests/benchmarks/lora_layers.py --seeds 3 --json FILE

A killed run goes on where it was. `seconds` are those of phases 2 and 3.
"""

import argparse
import json
import shutil
from pathlib import Path

from world import cell, read_recipe

from dmoerm_trl.commands.demo import make_world_and_base
from dmoerm_trl.demo.world import World
from dmoerm_trl.evaluation.table import consistency_table
from dmoerm_trl.modeling.configuration_dmoerm import LORA_LAYERS
from dmoerm_trl.scoring.batch import score_rows
from dmoerm_trl.scripts.demo import RECIPE
from dmoerm_trl.tasks import slug
from dmoerm_trl.training.pipeline import Pipeline


def run_seed(recipe_file: str, seed: int, folder: Path) -> dict[str, dict]:
    """`lora_layers` -> the consistency of a DMoERM in the world of one seed, column by column, and the seconds."""
    results, first = {}, None
    for lora_layers in LORA_LAYERS:
        root = folder / slug(lora_layers)
        keys = {"output_dir": root, "lora_layers": lora_layers, "ensemble_size": 0, "without_outer": False}
        arguments, recipe = read_recipe(recipe_file, seed, folder, **keys)
        make_world_and_base(arguments, recipe, World(seed, arguments.pairs))
        if first is not None and not (root / "manifest.json").exists():
            for stage in (first / "data", first / "router", *first.glob("*/phase1")):
                shutil.copytree(stage, root / stage.relative_to(first), dirs_exist_ok=True)
            for path in root.glob("*/phase1/config.json"):  # experts take their settings from their base
                path.write_text(json.dumps({**json.loads(path.read_text()), "lora_layers": lora_layers}))
        first = first or root
        run = Pipeline(recipe)
        run.run()
        rows = run.rows("test")
        scores = {"DMoERM": score_rows(run.load("model"), rows, run.formatter)}
        columns = consistency_table(scores, rows, list(run.tasks.tasks)).to_dict()["DMoERM"]
        seconds = sum(
            time for stage, time in run.manifest["seconds"].items() if "experts" in stage or "phase3" in stage
        )
        results[lora_layers] = {
            "consistency": {c: values["mean"] for c, values in columns.items()},
            "seconds": seconds,
        }
        print(f"seed {seed}, {lora_layers}: {results[lora_layers]}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--recipe", default=RECIPE, help="the demo's recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs/lora_layers"), help="folder for the trainings")
    options = parser.parse_args()
    seeds = [run_seed(options.recipe, seed, options.runs / str(seed)) for seed in range(options.seeds)]
    summary = {
        lora_layers: {
            "consistency": {
                column: cell([seed[lora_layers]["consistency"][column] for seed in seeds])
                for column in seeds[0][lora_layers]["consistency"]
            },
            "overall_by_seed": [seed[lora_layers]["consistency"]["overall"] for seed in seeds],
            "seconds": cell([seed[lora_layers]["seconds"] for seed in seeds]),
        }
        for lora_layers in LORA_LAYERS
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(summary, indent=2))
    columns = list(summary["all"]["consistency"])
    print("\n| LoRA in | " + " | ".join(columns) + " | seconds |\n| --- |" + " ---: |" * (len(columns) + 1))
    for lora_layers, result in summary.items():
        numbers = [f"{100 * result['consistency'][column]['mean']:.1f}" for column in columns]
        overall = result["consistency"]["overall"]
        numbers[-1] += f" ({100 * overall['low']:.1f} to {100 * overall['high']:.1f})"
        print(f"| {lora_layers} | " + " | ".join(numbers) + f" | {result['seconds']['mean']:.0f} |")


if __name__ == "__main__":
    main()
