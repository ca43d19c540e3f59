"""
Best of n with several reward models. A policy generates N responses per prompt, and each reward model and the gold reward
score them. From these scores, the gold reward of each reward model's choice is estimated for every n <= N.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..files import file_digest, locked_folder, write_json, write_text
from ..generation.samplers import SamplerSpec
from ..markdown import escape, markdown_table
from ..scoring.aggregation import AGGREGATIONS
from ..scoring.reward_models import ScorerSpec, weights_digest
from ..tasks import slug
from .best_of_n_curves import BestOfNCurves, best_of_n_curves, default_grid, pooled_moments
from .response_files import import_responses
from .response_store import RESPONSES, ResponseStore, worker_pool, write_responses, write_scores

GOLD_OF_FILE = "file"


class Winner(NamedTuple):
    """Response with the highest score of a reward model among the first n to a prompt; the earliest one if scores are equal."""

    prompt: int
    reward_model: str
    n: int
    text: str
    proxy: float
    gold: float


@dataclass(frozen=True)
class BestOfN:
    """
    Outcome of [`run_best_of_n`].

    Args:
        curves (`BestOfNCurves`): Gold reward, win rate and proxy reward over n.
        winners (`list[Winner]`): Winners at some values of n for the first prompts.
        prompts (`list[str]`): Last turn of each of these prompts.
        distinct (`float`): Share of the responses that are not duplicates of an earlier response to the prompt. Only these are
            scored.
    """

    curves: BestOfNCurves
    winners: list[Winner]
    prompts: list[str]
    distinct: float

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `best_of_n.md`, `.json` and `.png`, and `winners.md` (table 11); return the folder."""
        folder = Path(folder)
        write_text(folder / "best_of_n.md", str(self))
        write_json(folder / "best_of_n.json", {**self.curves.to_dict(), "distinct": self.distinct})
        write_text(folder / "winners.md", self.winners_markdown())
        self.curves.plot(folder / "best_of_n.png")
        return folder

    def __str__(self) -> str:
        return (
            f"{self.curves.to_markdown()}\nDistinct texts: {self.distinct:.1%} of the responses to a prompt; each was scored "
            "once.\n"
        )

    def winners_markdown(self) -> str:
        """Render the winners' texts in Markdown, with one table per prompt as in the paper's table 11."""
        parts = []
        for number, prompt in enumerate(self.prompts):
            rows = [["reward model", "n", "proxy", "gold", "response"]]
            rows += [
                [escape(w.reward_model), f"{w.n:,}", f"{w.proxy:+.3f}", f"{w.gold:+.3f}", escape(w.text)]
                for w in self.winners
                if w.prompt == number
            ]
            parts.append(f"## {escape(prompt)}\n\n{markdown_table(rows, left=(0, 4), padded=False)}")
        return "\n\n".join(parts) + "\n"


def run_best_of_n(
    output_dir: str | os.PathLike,
    rows: Sequence[dict],
    policy: SamplerSpec | str | os.PathLike,
    reward_models: Mapping[str, str | Mapping[str, Sequence[str]]],
    gold: str,
    *,
    n: int,
    grid: Sequence[int] | None = None,
    show: Sequence[int] = (1, 30, 1000, 6000, 60_000),
    show_prompts: int = 3,
    seed: int = 0,
    shard_size: int = 1000,
    workers: int = 1,
    max_length: int = 2048,
    dtype: str = "float32",
    processes: PartialState | None = None,
) -> BestOfN:
    """
    Generate responses, score them and estimate the curves, resuming from what is already in `output_dir`.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the responses and scores.
        rows (`Sequence[dict]`): The prompts, in the format of [`~dmoerm_trl.generation.prompts.read_prompts`].
        policy (`SamplerSpec` or path): Policy that generates the responses, or a file of responses (JSONL or Parquet) with
            `prompt`, `response` and optionally `gold`.
        reward_models (`Mapping`):
            Name -> the name of a [`~dmoerm_trl.scoring.reward_models.ScorerSpec`], or `{"mean": members}`, `{"WCO": members}`,
            `{"UWO": members}`. Scores of ensemble members other than a DMoERM have no common scale, so they are standardised by
            their mean and standard deviation over all responses.
        gold (`str`): Name of a scorer, or `"file"` for the column `gold` of the file of responses.
        n (`int`): N, the number of responses per prompt.
        grid (`Sequence[int]`, *optional*): Values of n; about 12 values up to N by default.
        show (`Sequence[int]`, *optional*, defaults to `(1, 30, 1000, 6000, 60000)`): Values of n whose winners are shown;
            values above N count as N.
        show_prompts (`int`, *optional*, defaults to 3): Number of prompts whose winners are shown.
        seed (`int`, *optional*, defaults to 0): Seed of the sampling and of the bootstrap.
        shard_size (`int`, *optional*, defaults to 1000): Responses per shard. If the run is killed, each worker loses at most
            one shard.
        workers (`int`, *optional*, defaults to 1): Number of worker processes on a CPU, which share its threads equally.
        max_length (`int`, *optional*, defaults to 2048): Maximum tokens of prompt and response for the reward models.
        dtype (`str`, *optional*, defaults to `"float32"`): Data type of the reward models.
        processes (`PartialState`, *optional*): Processes that share the work, see
            [`~dmoerm_trl.distributed.processes.launched_processes`]. Each of them calls this function and gets the outcome;
            only one should save it.

    Raises:
        ValueError: If the settings differ from those of existing responses or scores, another run writes to the folder, a score
            is NaN or infinite, there are too few responses, or several processes would each start workers.
        OSError: If the disk is full. Finished shards are kept.

    Example:

    ```python
    from dmoerm_trl import SamplerSpec, read_prompts, run_best_of_n

    rows = read_prompts("runs/demo/data/test.jsonl", count=2)
    policy = SamplerSpec("runs/demo/base", max_new_tokens=4)
    print(run_best_of_n("runs/bon", rows, policy, {"DMoERM": "runs/demo/model"}, gold="length", n=4))
    ```
    """
    if min(n, workers) < 1 or seed < 0:
        raise ValueError(
            f"got n={n}, workers={workers} and seed={seed}, need at least 1, 1 and 0: n is the number of responses per prompt."
        )
    if not os.fspath(output_dir).strip():
        raise ValueError("got an empty `output_dir`, need a folder for this run: name one.")
    members = {name: _members(name, spec) for name, spec in reward_models.items()}
    if not members:
        raise ValueError("got no `reward_models`, need at least one: name -> folder, hub name or 'length'.")
    if processes is not None and processes.num_processes > 1 and workers > 1:
        raise ValueError(
            f"got workers={workers} in each of {processes.num_processes} processes, need 1, because the processes share the "
            "work already: leave `workers` out, or start without the launcher."
        )
    from_file = not isinstance(policy, SamplerSpec)
    if gold == GOLD_OF_FILE and not from_file:
        raise ValueError(f"got gold {gold!r} without a file of responses, need one with the column `gold`.")
    if any(shown < 1 for shown in show) or show_prompts < 0:
        raise ValueError(
            f"got show={list(show)} and show_prompts={show_prompts}, need values of n from 1 and a number of prompts from 0: "
            "they select the winners to show."
        )
    grid = default_grid(n) if grid is None else sorted(grid)
    if not grid or not 1 <= grid[0] <= grid[-1] <= n:
        raise ValueError(f"got the grid {grid} for n={n}, need values from 1 to n: raise n or leave them out.")

    names = dict.fromkeys(member for model_members, _ in members.values() for member in model_members)
    if gold != GOLD_OF_FILE:
        names[gold] = None
    scorers = {name: ScorerSpec(name, max_length, dtype) for name in names}
    parts = {name: f"scores/{slug(name)}" for name in scorers}

    for scorer in scorers.values():
        scorer.check()
    store = ResponseStore(output_dir, len(rows), n, shard_size)
    if from_file:
        responses = {"file": os.fspath(policy), "gold": gold == GOLD_OF_FILE, "sha256": file_digest([Path(policy)])}
    else:
        responses = {**asdict(policy), "seed": seed, "sha256 of the weights": weights_digest(policy.name)}
    responses["sha256 of the prompts"] = _digest(row["prompt"] for row in rows)
    main_process_first = nullcontext if processes is None else processes.main_process_first
    with locked_folder(output_dir):
        with main_process_first():
            store.claim(RESPONSES, responses)
            for name, scorer in scorers.items():
                store.claim(
                    parts[name], {**scorer.settings(), "sha256 of rows and responses": _digest([*rows, responses])}
                )

        with worker_pool(workers) as run:
            if from_file:
                with main_process_first():
                    import_responses(store, rows, policy, gold=gold == GOLD_OF_FILE)
            else:
                write_responses(store, rows, policy, seed, run, processes)
            for name, scorer in scorers.items():
                write_scores(store, parts[name], rows, scorer, run, processes)

    scales = {
        member: _scale(store, parts[member])
        for model_members, combine in members.values()
        for member in model_members
        if combine is not None and not scorers[member].is_standardised
    }
    show = sorted({min(shown, n) for shown in show})
    winners: list[Winner] = []
    distinct_texts = 0

    def scored() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        nonlocal distinct_texts
        for prompt in tqdm(range(len(rows)), desc="estimating", unit=" prompts", delay=3):
            distinct = store.distinct(prompt)
            distinct_texts += int(distinct.max()) + 1
            columns = {name: store.scores(part, prompt, distinct) for name, part in parts.items()}
            if gold == GOLD_OF_FILE:
                columns[gold] = torch.from_numpy(store.column(RESPONSES, prompt, "gold")).float()
            proxies = {name: _combine(columns, scales, *model) for name, model in members.items()}
            if prompt < show_prompts:
                winners.extend(_winners(store, prompt, proxies, columns[gold], show))
            yield proxies, columns[gold]

    curves = best_of_n_curves(scored(), grid, seed=seed)
    shown = [row["prompt"][-1]["content"] for row in rows[:show_prompts]]
    return BestOfN(curves, winners, shown, distinct_texts / (n * len(rows)))


def _members(name: str, spec: str | Mapping[str, Sequence[str]]) -> tuple[list[str], str | None]:
    """Parse a reward model into its scorers and the aggregation of their scores, None for a single scorer."""
    if isinstance(spec, str):
        return [spec], None
    if isinstance(spec, Mapping) and len(spec) == 1 and (combine := next(iter(spec))) in AGGREGATIONS:
        members = spec[combine]
        if isinstance(members, list | tuple) and members and all(isinstance(member, str) for member in members):
            return list(members), combine
    raise ValueError(
        f"reward model {name!r}: got {spec}, need a folder, a hub name, 'length', 'module:function', or one of "
        f"{list(AGGREGATIONS)} with a list of members."
    )


def _combine(columns: dict, scales: dict, members: list[str], combine: str | None) -> torch.Tensor:
    if combine is None:
        return columns[members[0]]
    scaled = ((columns[m], *scales.get(m, (0.0, 1.0))) for m in members)
    return AGGREGATIONS[combine](torch.stack([(scores - mean) / deviation for scores, mean, deviation in scaled]))


def _scale(store: ResponseStore, part: str) -> tuple[float, float]:
    """Compute the mean and standard deviation of the scores of all responses."""
    moments = []
    for prompt in range(store.prompts):
        variance, mean = torch.var_mean(store.scores(part, prompt, store.distinct(prompt)).double(), correction=0)
        moments.append((float(mean), float(variance)))
    mean, deviation = pooled_moments(moments)
    return mean, deviation or 1.0


def _winners(
    store: ResponseStore, prompt: int, proxies: dict[str, torch.Tensor], gold: torch.Tensor, show: Sequence[int]
) -> Iterator[Winner]:
    for n in show:
        for name, proxy in proxies.items():
            best = int(proxy[:n].argmax())
            yield Winner(prompt, name, n, store.text(prompt, best), float(proxy[best]), float(gold[best]))


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values), sort_keys=True, default=str).encode()).hexdigest()
