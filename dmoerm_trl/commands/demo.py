"""Run `dmoerm demo`."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from ..data.rows import PreferenceRow, write_rows
from ..demo.tiny_base import train_tiny_base
from ..demo.world import World
from ..evaluation.best_of_n import BestOfN, run_best_of_n
from ..evaluation.methods import method_scores, router_accuracy
from ..evaluation.table import CEILING, Table, consistency_table
from ..files import partial_path, write_json, writing
from ..generation.samplers import SamplerSpec, generate
from ..rl.ppo import ppo_config, ppo_trainer
from ..scoring.aggregation import AGGREGATIONS
from ..scoring.batch import score_encodings
from ..scoring.describe import describe
from ..scoring.explain import explanation
from ..tasks import OTHERS
from ..training.pipeline import Pipeline
from ..training.recipe import Recipe
from .train import train

if TYPE_CHECKING:
    from ..scripts.demo import DemoArguments


def demo(arguments: "DemoArguments", recipe: Recipe) -> dict[str, Any]:
    """Run the demo, print the results, and return the content of `summary.json`, which it writes to the output folder."""
    seconds: dict[str, float] = {}
    world = World(recipe.seed, arguments.pairs)
    with timed(seconds, "world and base"):
        make_world_and_base(arguments, recipe, world)
    with timed(seconds, "training"):
        run = train(recipe)
    with timed(seconds, "evaluation"):
        table = evaluate_in_world(run, world)
        accuracy = router_accuracy(run, run.rows("test"))
    with timed(seconds, "best of n"):
        curves = best_of_n_in_world(arguments, run)
    with timed(seconds, "ppo"):
        ppo = run_ppo(arguments, run, world)
    print(f"\nConsistency with the world's annotators (%)\n\n{table.to_markdown()}\n")
    print(f"Best of n\n\n{curves}")
    print(f"router accuracy on held-out prompts: {accuracy:.1%}")
    print(f"PPO: reward {ppo['before']['reward']:+.3f} -> {ppo['after']['reward']:+.3f}", end=", ")
    print(f"gold {ppo['before']['gold']:+.3f} -> {ppo['after']['gold']:+.3f}\n")
    print(explain_one(run), end="\n\n")
    summary = {
        "consistency": {m: {c: cell["mean"] for c, cell in cells.items()} for m, cells in table.to_dict().items()},
        "router_accuracy": accuracy,
        "best_of_n": curves.curves.to_dict()["curves"],
        "ppo": ppo,
        "seconds": seconds | {f"training: {name}": value for name, value in run.manifest["seconds"].items()},
    }
    path = run.root / "summary.json"
    write_json(path, summary)
    print(f"table: {run.root / 'consistency.md'}\ncurves: {run.root / 'accuracy_curves.png'}")
    print(f"best of n: {run.root / 'best_of_n' / 'best_of_n.png'}")
    print(f"model: {run.root / 'model'}\nsummary: {path}\nseconds: {sum(seconds.values()):.0f}")
    return summary


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def make_world_and_base(arguments: "DemoArguments", recipe: Recipe, world: World) -> None:
    """
    Write the world's rows to `recipe.train_data` and the tiny base to `recipe.base_model`, if they are not there.

    Raises:
        ValueError: If the existing rows or base are from another world or other settings.
    """
    rows, base = Path(recipe.train_data), Path(recipe.base_model)
    need = "need those of this recipe, because rows, base and gold belong to one world"
    with TemporaryDirectory() as folder:
        written = Path(folder) / rows.name
        numbers = arguments.rows_per_task, arguments.rows_of_others, arguments.labelled_rows_per_task
        write_rows(world.rows(*numbers), written)
        if rows.exists() and rows.read_bytes() != written.read_bytes():
            raise ValueError(
                f"{rows}: got rows of another seed or number, {need}: name another place by `train_data`."
            )
        if not rows.exists():
            with writing(rows, binary=True) as file:
                file.write(written.read_bytes())
    settings = {"seed": recipe.seed, "texts": arguments.base_texts, "pairs": arguments.pairs, **arguments.base}
    record = base / "tiny_base.json"
    if not (base / "config.json").exists():
        temporary = partial_path(base)
        train_tiny_base(world.texts(arguments.base_texts), temporary, seed=recipe.seed, **arguments.base)
        write_json(temporary / record.name, settings)
        temporary.rename(base)
    elif not record.exists() or json.loads(record.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{base}: got a base of another seed or size, {need}: name another place by `base_model`.")


def evaluate_in_world(run: Pipeline, world: World) -> Table:
    """Compute the consistency table on the test rows, with the ceiling: that of the gold reward with the noisy labels."""
    rows = run.rows("test")
    scores = method_scores(run, rows)
    scores[CEILING] = [[world.gold(row.prompt, text, row.task) for text in row.responses] for row in rows]
    table = consistency_table(scores, rows, list(run.tasks.tasks))
    table.save(run.root / "consistency")
    return table


def best_of_n_in_world(arguments: "DemoArguments", run: Pipeline) -> BestOfN:
    """Measure the gold reward of the best of n responses by each reward model, on held-out prompts."""
    rows = held_out(run, arguments.best_of_n_prompts)
    result = run_best_of_n(
        run.root / "best_of_n",
        [{"prompt": row.prompt, "task": row.task} for row in rows],
        SamplerSpec(run.recipe.base_model, max_new_tokens=80, max_length=run.recipe.max_length),
        reward_models(run),
        "dmoerm_trl.demo.world:world_gold",
        n=arguments.best_of_n,
        seed=run.recipe.seed,
        workers=run.recipe.workers,
        max_length=run.recipe.max_length,
    )
    result.save(run.root / "best_of_n")
    return result


def reward_models(run: Pipeline) -> dict[str, str | dict[str, list[str]]]:
    """List the reward models of a run against which policies are optimised, in the format of best of n and PPO."""
    members = [str(run.root / "ensemble" / str(member)) for member in range(run.recipe.ensemble_size)]
    return {
        "DMoERM": str(run.root / "model"),
        "single": members[0],
        **{name: {name: members} for name in AGGREGATIONS},
    }


def held_out(run: Pipeline, count: int) -> list[PreferenceRow]:
    """Select test rows, one of each task in turn."""
    rows = {task: iter(run.rows("test", task=task)) for task in run.tasks.tasks}
    tasks = list(rows)
    return [next(rows[tasks[number % len(tasks)]]) for number in range(count)]


def explain_one(run: Pipeline) -> str:
    """Explain the score of the best response to a held-out prompt."""
    model, row = run.load("model"), next(row for row in run.rows("test") if row.task != OTHERS)
    response = row.responses[row.ranks.index(min(row.ranks))]
    (scores,) = describe(model, run.formatter, [(row.prompt, response)])
    return explanation(row.prompt[-1]["content"], response, **scores)


def run_ppo(arguments: "DemoArguments", run: Pipeline, world: World) -> dict[str, dict[str, float]]:
    """Run some steps of PPO against the DMoERM, and measure reward and gold before and after on held-out prompts."""
    args = ppo_config()(output_dir=str(run.root / "ppo"), seed=run.recipe.seed, **arguments.ppo)
    policy = AutoModelForCausalLM.from_pretrained(run.recipe.base_model)
    set_seed(run.recipe.seed)  # for the new head of the value model
    value_model = AutoModelForSequenceClassification.from_pretrained(run.recipe.base_model, num_labels=1)
    reward_model = run.load("model")
    held_out = [row for row in run.rows("test") if row.task != OTHERS][: arguments.ppo_prompts]

    def measure() -> dict[str, float]:
        prompts = [row.prompt for row in held_out]
        texts = generate(policy, prompts, run.formatter, max_new_tokens=args.response_length, seed=run.recipe.seed)
        encodings = [run.formatter.encode(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        pad_token_id = run.formatter.tokenizer.pad_token_id
        rewards = score_encodings(reward_model, encodings, pad_token_id=pad_token_id)
        golds = [world.gold(row.prompt, text, row.task) for row, text in zip(held_out, texts, strict=True)]
        return {"reward": float(rewards.mean()), "gold": sum(golds) / len(golds)}

    before = measure()
    prompts = [row.prompt for row in run.rows("phase1_train", "phase3_train") if row.task != OTHERS]
    tokenizer = run.formatter.tokenizer
    trainer = ppo_trainer(args, tokenizer, policy, None, reward_model, prompts, value_model, formatter=run.formatter)
    trainer.train()
    return {"before": before, "after": measure()}
