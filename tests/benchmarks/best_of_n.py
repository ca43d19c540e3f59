"""
Best of n in the simulated world, to n = 60,000: five reward models and the world's gold, time and memory.

    python tests/benchmarks/best_of_n.py --json FILE

Trains the demo's recipe first where `--run` holds no finished training; `seconds` is the time after it. Memory is the resident
memory of all processes of a run together, at its peak, with n and with a tenth of it, each a run of its own from nothing.

Keys: `seconds`; `rss_6000` and `rss_60000` in bytes, named after n; `curves`: reward model -> n -> mean gold reward with `low`
and `high`; `proxy`, `win_rate` and `fits` as in [`~dmoerm_trl.evaluation.best_of_n_curves.BestOfNCurves.to_dict`]; `distinct`:
share of the responses that were scored, the others repeat one.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from trl import TrlParser

from dmoerm_trl.commands.demo import held_out, make_world_and_base, reward_models
from dmoerm_trl.demo.world import World
from dmoerm_trl.scripts.demo import RECIPE, DemoArguments
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
BON_RECIPE = ROOT / "recipes" / "demo" / "bon.yaml"


def trained(recipe_file: str, folder: Path) -> Pipeline:
    """The demo's training in `folder`, finished."""
    places = {"output_dir": folder, "base_model": folder / "base", "train_data": folder / "world.jsonl"}
    options = [word for key, path in places.items() for word in (f"--{key}", str(path))]
    arguments, recipe = TrlParser((DemoArguments, Recipe)).parse_args_and_config(
        ["--config", recipe_file, *options], fail_with_unknown_args=True
    )
    run = Pipeline(recipe)
    if not run.finished:
        make_world_and_base(arguments, recipe, World(recipe.seed))
        run.run()
    return run


def settings(run: Pipeline, prompts: Path) -> dict:
    """The demo's recipe of best of n, with the models of this run and all its ensemble members."""
    changes = {"policy": run.recipe.base_model, "prompts": str(prompts), "reward_models": reward_models(run)}
    return {**yaml.safe_load(BON_RECIPE.read_text()), **changes, "num_prompts": None, "show_prompts": 2}


def measured(recipe: Path, output_dir: Path, n: int) -> tuple[float, int]:
    """Seconds, and the peak of the resident memory in bytes, of one run of the example in a process of its own."""
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [sys.executable, str(ROOT / "examples" / "bon_eval.py"), "--config", str(recipe)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--n", str(n), "--output_dir", str(output_dir)])
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.2)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} --n {n}: ended with {process.returncode}; its error stands above.")
    return time.perf_counter() - start, peak


def resident(pid: int) -> int:
    """Bytes of a process and all that it started."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:  # it ended while it was looked at
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo's training")
    parser.add_argument("--recipe", default=str(ROOT / RECIPE), help="the demo's recipe")
    parser.add_argument("--work", type=Path, default=Path("runs/best_of_n"), help="folder for the responses; emptied")
    parser.add_argument("--n", type=int, default=60_000, help="responses a prompt")
    parser.add_argument("--prompts", type=int, default=8, help="number of prompts, of all tasks in turn")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of bon.yaml to change")
    options = parser.parse_args()

    run = trained(options.recipe, options.run)
    options.work.mkdir(parents=True, exist_ok=True)
    prompts, recipe = options.work / "prompts.jsonl", options.work / "bon.yaml"
    rows = [{"prompt": row.prompt, "task": row.task} for row in held_out(run, options.prompts)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    chosen = {**settings(run, prompts), **changes}
    recipe.write_text(yaml.safe_dump(chosen, sort_keys=False))

    result: dict = {"n": options.n, "settings": chosen}
    for n in (options.n // 10, options.n):
        result["seconds"], result[f"rss_{n}"] = measured(recipe, options.work / str(n), n)
        print(f"n = {n}: {result['seconds']:.0f} seconds, {result[f'rss_{n}'] / 2**20:.0f} MiB", flush=True)
    growth = result[f"rss_{options.n}"] / result[f"rss_{options.n // 10}"] - 1
    outcome = json.loads((options.work / str(options.n) / "best_of_n.json").read_text())
    result |= {"rss_growth": growth, **outcome}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2))
    print(f"memory grows by {growth:.1%}; {options.json}")


if __name__ == "__main__":
    main()
