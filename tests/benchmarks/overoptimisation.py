"""
Figure 5 in the simulated world: best of n and PPO against five reward models, judged by the world's gold, whose value is known.

    python tests/benchmarks/overoptimisation.py --run runs/demo --seeds 3 --json runs/overoptimisation.json

Trains the demo's recipe first where `--run` holds no finished training. Best of n and PPO start from one policy and sample it
alike; PPO is recipes/demo/ppo.yaml, and only the reward model and the seed differ from run to run (the values start from the
policy's base for all). The prompts that gold is measured on are of the test rows. A killed command goes on where it was.

The figure (FILE with .png): gold and proxy over KL, best of n above, PPO below. The table of PPO (FILE with .md):

- gold before and at the end, of `--samples` responses to every test prompt. All runs start from one policy. Its error and
  that of the rise are over prompts, that of the end is over the seeds.
- p of a two-sided sign-flip test on the rise: prompts are the units, and a prompt's value is the difference of its means over
  responses and seeds.
- the KL (k3, nats) at the end, and the gold at one KL that all runs reach, by which reward models are compared at equal
  optimisation. This and what follows is read off the curves, of one response to each prompt that the recipe measures on.
- the best step (of the mean over seeds), the fall from there to the end, with p of the same test, and where gold peaks by the
  fit of Gao et al. A reward model is called overoptimised where the peak is within what was measured and gold fell with p
  below 0.05. The best step is chosen by the gold that it is judged by, so its gold and the fall are a little too great, and
  the fall's p too small.

Then the win rates (appendix D.2): how often gold prefers what DMoERM led to over what another reward model led to, at three n
and at three steps, to the same prompts. An interval is Wilson's, with a prompt's seeds counted as one comparison.

Keys: `settings`; `best_of_n` as in [`~dmoerm_trl.evaluation.best_of_n_curves.BestOfNCurves.to_dict`]; `ppo`: reward model ->
the table's numbers and the `curve`; `win_rates`: `best_of_n` and `ppo` -> n or step -> the other reward model.
"""

import argparse
import contextlib
import json
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from best_of_n import ROOT, trained
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmoerm_trl.commands.demo import held_out, reward_models
from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.evaluation.best_of_n import BestOfN, run_best_of_n
from dmoerm_trl.evaluation.best_of_n_curves import fit_to_dict
from dmoerm_trl.evaluation.overoptimisation import fit_overoptimisation
from dmoerm_trl.evaluation.response_store import worker_pool
from dmoerm_trl.evaluation.win_rate import WinRate, wilson_interval
from dmoerm_trl.generation.prompts import load_prompts
from dmoerm_trl.generation.samplers import SamplerSpec, generate
from dmoerm_trl.markdown import escape, markdown_table
from dmoerm_trl.rl.policy_curves import draw_policy_curves, read_seeds
from dmoerm_trl.scoring.reward_functions import gold_rewards
from dmoerm_trl.scoring.reward_models import weights_digest
from dmoerm_trl.scripts.demo import RECIPE
from dmoerm_trl.training.pipeline import Pipeline

PPO_RECIPE = ROOT / "recipes" / "demo" / "ppo.yaml"
OURS = "DMoERM"


# Best of n


def best_of_n(
    run: Pipeline, models: dict[str, Any], recipe: dict[str, Any], folder: Path, n: int, prompts: int, workers: int
) -> BestOfN:
    """Best of n from the policy of the PPO recipe, sampled as there; the winners at three n are of all prompts."""
    result = run_best_of_n(
        folder,
        [{"prompt": row.prompt, "task": row.task} for row in held_out(run, prompts)],
        SamplerSpec(
            recipe["policy"],
            max_new_tokens=recipe["response_length"],
            temperature=recipe["temperature"],
            top_p=recipe["top_p"],
            max_length=run.recipe.max_length,
        ),
        models,
        recipe["gold"],
        n=n,
        show=checkpoints(n, 1 / 32, 1 / 4),
        show_prompts=prompts,
        shard_size=min(n, 512),
        workers=workers,
        max_length=run.recipe.max_length,
    )
    result.save(folder)
    return result


def checkpoints(last: int, *shares: float) -> list[int]:
    """Those shares of the last n or step, and the last."""
    return sorted({*(max(1, round(share * last)) for share in shares), last})


# PPO


def train_policies(
    models: dict[str, Any], recipe: dict[str, Any], folder: Path, seeds: int, workers: int
) -> dict[str, list[Path]]:
    """
    A run of examples/ppo.py for each reward model and seed.

    Returns:
        `dict`: reward model -> the folders of its seeds.

    Raises:
        ValueError: if a folder holds a run of another recipe or of other weights.
    """
    folders = {name: [folder / name / str(seed) for seed in range(seeds)] for name in models}
    for name, of_seeds in folders.items():
        for seed, output_dir in enumerate(of_seeds):
            claim(output_dir, recipe | {"reward_model": models[name], "seed": seed, "output_dir": str(output_dir)})
    missing = [(path,) for of_seeds in zip(*folders.values(), strict=True) for path in of_seeds if not finished(path)]
    with worker_pool(workers) as run:
        for _ in tqdm(run(train_policy, missing), desc="PPO", unit=" runs", total=len(missing), smoothing=0):
            pass
    return folders


def claim(folder: Path, recipe: dict[str, Any]) -> None:
    """Writes the recipe of a run into its folder, or finds the same there."""
    names = {recipe["policy"], *members(recipe["reward_model"])}
    digests = {name: weights_digest(name) for name in sorted(names)}
    file, settings = folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False)
    settings += "".join(f"# sha256 of {name}: {digest}\n" for name, digest in digests.items())
    if file.exists() and file.read_text() != settings:
        raise ValueError(
            f"{folder}: got a run that was begun with another recipe or other weights, need the same to go on: delete the "
            "folder, or choose another --work."
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(settings)


def members(reward_model: str | dict[str, list[str]]) -> list[str]:
    return [reward_model] if isinstance(reward_model, str) else next(iter(reward_model.values()))


def finished(folder: Path) -> bool:
    return (folder / "finished").exists()


def train_policy(folder: Path) -> int:
    """Trains, or goes on, by the recipe in the folder; what is printed goes to log.txt there."""
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        runpy.run_path(str(ROOT / "examples" / "ppo.py"))["main"](["--config", str(folder / "recipe.yaml")])
    (folder / "finished").touch()
    return 1


def gold_of_prompts(folder: Path, steps: list[int]) -> np.ndarray:
    """The gold reward of each prompt's response at each step, shape (steps, P)."""
    files = [folder / "responses" / f"{step}.jsonl" for step in steps]
    return np.array([[json.loads(line)["gold"] for line in file.read_text().splitlines()] for file in files])


def measure_policies(
    folders: dict[str, list[Path]], recipe: dict[str, Any], before: Path, samples: int, workers: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    Gold of the policy that all runs start from, and of those that they lead to.

    Returns:
        `tuple`: gold of each test prompt, a mean over `samples` responses: before of shape (P,), and reward model -> at the
        end of shape (S, P).
    """
    name = f"gold-of-{samples}.npy"
    places = {before / name: recipe["policy"]}
    places |= {folder / name: str(folder) for of_seeds in folders.values() for folder in of_seeds}
    missing = [(policy, file, seed) for seed, (file, policy) in enumerate(places.items()) if not file.exists()]
    with worker_pool(workers) as run:
        measure = partial(measure_policy, recipe=recipe, samples=samples)
        for _ in tqdm(run(measure, missing), desc="gold", unit=" policies", total=len(missing), smoothing=0):
            pass
    ends = {model: np.stack([np.load(folder / name) for folder in of_seeds]) for model, of_seeds in folders.items()}
    return np.load(before / name), ends


def measure_policy(policy: str, file: Path, seed: int, *, recipe: dict[str, Any], samples: int) -> int:
    """Writes the gold of each test prompt, a mean over so many responses of a policy, shape (P,)."""
    max_length = recipe["max_prompt_length"] + 2 * recipe["response_length"]
    formatter = Formatter(AutoTokenizer.from_pretrained(recipe["policy"]), max_length)
    with contextlib.redirect_stdout(None):
        _, rows = load_prompts(
            recipe["prompts"],
            formatter,
            max_prompt_length=recipe["max_prompt_length"],
            eval_prompts=recipe["eval_prompts"],
            held_out=10**9,
        )
    prompts = [row["prompt"] for row in rows] * samples
    responses = generate(
        AutoModelForCausalLM.from_pretrained(policy, dtype="float32"),
        prompts,
        formatter,
        max_new_tokens=recipe["response_length"],
        temperature=recipe["temperature"],
        top_p=recipe["top_p"],
        batch_size=recipe["per_device_train_batch_size"],
        seed=seed,
    )
    gold = gold_rewards(recipe["gold"], rows, max_length=max_length)(prompts, responses)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, gold.double().reshape(samples, -1).mean(0).numpy())
    partial.replace(file)
    return 1


# What came out


def summarise(
    kl: np.ndarray, gold: np.ndarray, steps: list[int], common_kl: float, before: np.ndarray, end: np.ndarray
) -> dict[str, Any]:
    """
    The row of one reward model, see the module's text.

    Args:
        kl (`np.ndarray` of shape (S, T)): nats of each seed at each step.
        gold (`np.ndarray` of shape (S, T, P)): gold of each prompt's response.
        steps (`list[int]`): the T steps, from 0.
        common_kl (`float`): a KL that every seed reaches.
        before (`np.ndarray` of shape (Q,)), end (`np.ndarray` of shape (S, Q)): gold of each test prompt, as of
            [`measure_policies`].
    """
    of_steps = gold.mean(2)
    best = int(of_steps.mean(0).argmax())
    rise, fall = end - before, gold[:, best] - gold[:, -1]  # (S, Q), (S, P)
    fit = fit_overoptimisation(torch.tensor(kl.mean(0)), torch.tensor(of_steps.mean(0) - of_steps.mean(0)[0]), "rl")
    result = {
        "before": {"mean": float(before.mean()), "error": standard_error(before)},
        "best": cell(of_steps[:, best]) | {"step": steps[best], "kl": float(kl[:, best].mean())},
        "end": cell(end.mean(1)) | {"step": steps[-1]},
        "kl": cell(kl[:, -1]),
        "at_common_kl": cell(np.array([gold_at(*seed, common_kl) for seed in zip(kl, of_steps, strict=True)])),
        "rise": cell(rise.mean(1)) | {"error": standard_error(rise.mean(0)), "p": sign_flip_test(rise.mean(0))},
        "fall": cell(fall.mean(1)) | {"p": sign_flip_test(fall.mean(0))},
        "fit": fit_to_dict(fit),
    }
    result["overoptimised"] = bool(fit.peak_kl < kl.mean(0).max() and result["fall"]["p"] < 0.05)
    return result


def cell(of_seeds: np.ndarray) -> dict[str, Any]:
    """Mean, standard error over the seeds, and the seeds' values."""
    return {"mean": float(of_seeds.mean()), "error": standard_error(of_seeds), "seeds": of_seeds.tolist()}


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean; None of one value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def gold_at(kl: np.ndarray, gold: np.ndarray, at: float) -> float:
    """Gold where the KL first reaches `at`, on the line between two steps over the root of the KL."""
    after = int((kl >= at).argmax())
    if after == 0:
        return float(gold[0])
    low, high, root = *np.sqrt(kl[after - 1 : after + 1].clip(min=0)), at**0.5
    return float(np.interp(root, [low, high], gold[after - 1 : after + 1]))


def sign_flip_test(differences: np.ndarray, flips: int = 10_000, seed: int = 0) -> float:
    """
    p of the two-sided paired randomisation test that the mean difference is 0: how often it is as far from 0 where each
    difference is given a sign at random; 1 / (flips + 1) at the least.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, len(differences)))
    as_far = np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-12)
    return float((1 + as_far.sum()) / (1 + flips))


def win_rates(gold: dict[str, np.ndarray]) -> dict[str, Any]:
    """
    How often gold prefers the responses that the DMoERM led to.

    Args:
        gold (`dict`): reward model -> gold of shape (S, P), of responses to the same P prompts.

    Returns:
        `dict`: other reward model -> `rate`, `low`, `high` and the counts.
    """
    result = {}
    for name, of_other in gold.items():
        if name != OURS:
            difference = gold[OURS] - of_other
            outcome = WinRate(*(int(np.sum(np.sign(difference) == sign)) for sign in (1, 0, -1)))
            low, high = wilson_interval(outcome.rate, difference.shape[1])
            result[name] = {"rate": outcome.rate, "low": low, "high": high, **vars(outcome)}
    return result


def best_of_n_win_rates(outcome: BestOfN) -> dict[int, Any]:
    """[`win_rates`] at each n whose winners are known."""
    gold: dict[int, dict[str, list[float]]] = {}
    for winner in outcome.winners:
        gold.setdefault(winner.n, {}).setdefault(winner.reward_model, []).append(winner.gold)
    return {n: win_rates({name: np.array([values]) for name, values in of_n.items()}) for n, of_n in gold.items()}


# Tables and figure


def plus_minus(value: dict[str, Any]) -> str:
    error = value["error"]
    return f"{value['mean']:+.3f}" + (f" ± {error:.3f}" if error is not None else "")


def ppo_table(ppo: dict[str, dict[str, Any]], common_kl: float) -> str:
    rows = [["reward model", "gold before", "at the end", "rise", "p", "KL at the end", f"gold at KL {common_kl:.2f}"]]
    rows[0] += ["best", "at step", "fall to the end", "p", "fitted peak at", "overoptimised"]
    for name, row in ppo.items():
        peak = row["fit"]["peak_kl"]
        kl = f"{row['kl']['mean']:.2f}" + (f" ± {row['kl']['error']:.2f}" if row["kl"]["error"] is not None else "")
        rows.append(
            [escape(name), *(plus_minus(row[key]) for key in ("before", "end", "rise")), f"{row['rise']['p']:.4f}", kl]
        )
        rows[-1] += [plus_minus(row["at_common_kl"]), plus_minus(row["best"]), f"{row['best']['step']}"]
        rows[-1] += [plus_minus(row["fall"]), f"{row['fall']['p']:.4f}"]
        within = peak is not None and peak < max(row["curve"]["k3"])
        rows[-1] += [f"{peak:.2f} nats" if within else "beyond", "yes" if row["overoptimised"] else "no"]
    return markdown_table(rows)


def win_rate_table(rates: dict[int, Any], unit: str) -> str:
    rows = [[f"DMoERM against, at {unit}", *(f"{number:,}" for number in rates)]]
    for name in next(iter(rates.values())):
        of_name = [of_number[name] for of_number in rates.values()]
        rows.append(
            [escape(name), *(f"{r['rate']:.0%} [{r['low']:.0%}, {r['high']:.0%}], {r['ties']} ties" for r in of_name)]
        )
    return markdown_table(rows)


def plot(outcome: BestOfN, curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    above, below = figure.subfigures(2, 1)
    outcome.curves.draw(above)
    draw_policy_curves(below, curves)
    figure.savefig(path)


# The command


def compare(
    run: Pipeline,
    work: Path,
    file: Path,
    *,
    changes: dict[str, Any],
    seeds: int,
    samples: int,
    n: int,
    prompts: int,
    workers: int,
) -> str:
    """
    Measures what is not in the folder `work` yet, and writes the JSON file, and .md and .png beside it.

    Args:
        changes (`dict`): keys of the PPO recipe, in the place of its own.
        seeds (`int`): runs of PPO for each reward model.
        samples (`int`): responses to a test prompt before and after PPO.
        n (`int`), prompts (`int`): of best of n.

    Returns:
        `str`: the tables.

    Raises:
        ValueError: if the last step of PPO is not one of those that are measured.
    """
    recipe = yaml.safe_load(PPO_RECIPE.read_text().replace("runs/demo", str(run.root)))  # the same, where the run is
    recipe |= {"value_model": run.recipe.base_model, **changes}
    episodes = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
    if recipe["total_episodes"] % (episodes * recipe["monitor_every"]):
        raise ValueError(
            f"got {recipe['total_episodes']} episodes in steps of {episodes} and monitor_every={recipe['monitor_every']}, need "
            "the last step measured: make --steps a multiple of monitor_every, or `--set monitor_every=...`."
        )
    models = reward_models(run)
    outcome = best_of_n(run, models, recipe, work / "best_of_n", n, prompts, workers)
    print(outcome, flush=True)
    folders = train_policies(models, recipe, work / "ppo", seeds, workers)
    curves = {name: read_seeds(name, [path / "monitor.jsonl" for path in paths]) for name, paths in folders.items()}
    steps = next(iter(curves.values()))["step"][0].astype(int).tolist()
    gold = {name: np.stack([gold_of_prompts(path, steps) for path in paths]) for name, paths in folders.items()}
    common_kl = min(float(of_name["k3"].max(1).min()) for of_name in curves.values())
    before, ends = measure_policies(folders, recipe, work / "ppo", samples, workers)
    ppo = {name: summarise(curves[name]["k3"], gold[name], steps, common_kl, before, ends[name]) for name in models}
    for name, row in ppo.items():
        row["curve"] = {key: values.mean(0).tolist() for key, values in curves[name].items()}
    at = checkpoints(len(steps) - 1, 1 / 3, 2 / 3)
    rates = {
        "best_of_n": best_of_n_win_rates(outcome),
        "ppo": {steps[place]: win_rates({name: gold[name][:, place] for name in models}) for place in at},
    }
    result = {
        "settings": {
            "n": n,
            "prompts": prompts,
            "seeds": seeds,
            "samples": samples,
            "common_kl": common_kl,
            "recipe": recipe,
        },
        "best_of_n": {**outcome.curves.to_dict(), "distinct": outcome.distinct},
        "ppo": ppo,
        "win_rates": rates,
    }
    tables = [f"Best of n\n\n{outcome}", f"PPO, {seeds} seeds\n\n{ppo_table(ppo, common_kl)}\n"]
    tables += [
        "Win rates by gold",
        *(f"\n{win_rate_table(rates[way], u)}" for way, u in (("best_of_n", "n"), ("ppo", "step"))),
    ]
    text = "\n".join(tables) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2))
    file.with_suffix(".md").write_text(text)
    plot(outcome, curves, file.with_suffix(".png"))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result; .md and .png are put beside it")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo's training")
    parser.add_argument("--recipe", default=str(ROOT / RECIPE), help="the demo's recipe")
    parser.add_argument("--work", type=Path, default=Path("runs/overoptimisation"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of PPO for each reward model")
    parser.add_argument("--samples", type=int, default=4, help="responses to a test prompt before and after PPO")
    parser.add_argument("--steps", type=int, help="of PPO; the recipe's if absent")
    parser.add_argument("--n", type=int, default=1024, help="responses a prompt in best of n")
    parser.add_argument("--prompts", type=int, default=25, help="prompts of best of n, of all tasks in turn")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of ppo.yaml to change")
    options = parser.parse_args()

    changes = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    if options.steps is not None:
        recipe = yaml.safe_load(PPO_RECIPE.read_text()) | changes
        batch = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
        changes["total_episodes"] = options.steps * batch
    run = trained(options.recipe, options.run)
    sizes = {name: getattr(options, name) for name in ("seeds", "samples", "n", "prompts", "workers")}
    tables = compare(run, options.work, options.json, changes=changes, **sizes)
    print(f"{tables}\n{options.json}, and .md and .png beside it")


if __name__ == "__main__":
    main()
