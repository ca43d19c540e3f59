"""
Best of n against several reward models: a policy writes N responses a prompt, each reward model and gold score all of them,
and for every n <= N the gold reward of what each would have chosen is estimated.
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

from ..files import file_digest, write_json, write_text
from ..folders import held
from ..rl.rollout import PolicySource
from ..tasks import slug
from .best_of_n_curves import BestOfNCurves, best_of_n_curves, default_grid, pooled_moments
from .explain import cell
from .response_files import import_responses
from .response_store import RESPONSES, ResponseStore, worker_pool, write_responses, write_scores
from .scorers import AGGREGATIONS, ScorerSource, weights_digest

GOLD_OF_FILE = "file"


class Winner(NamedTuple):
    """What a reward model chose for one prompt among the first n responses; the earliest, where scores are equal."""

    prompt: int
    reward_model: str
    n: int
    text: str
    proxy: float
    gold: float


@dataclass(frozen=True)
class BestOfN:
    """
    The outcome of [`run_best_of_n`].

    Args:
        curves (`BestOfNCurves`): gold, win rate and proxy over n.
        winners (`list[Winner]`): what was chosen at some n for the first prompts.
        prompts (`list[str]`): the last turn of those prompts.
        distinct (`float`): share of the responses whose text no earlier response to the prompt has: those that were scored.
    """

    curves: BestOfNCurves
    winners: list[Winner]
    prompts: list[str]
    distinct: float

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `best_of_n.md`, `.json` and `.png`, and `winners.md` (table 11); returns the folder."""
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
        """The chosen texts, a table a prompt, as in the paper's table 11."""
        parts = []
        for number, prompt in enumerate(self.prompts):
            lines = [f"## {cell(prompt)}", "", "| reward model | n | proxy | gold | response |"]
            lines.append("| --- | ---: | ---: | ---: | --- |")
            lines += [
                f"| {cell(w.reward_model)} | {w.n:,} | {w.proxy:+.3f} | {w.gold:+.3f} | {cell(w.text)} |"
                for w in self.winners
                if w.prompt == number
            ]
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"


def run_best_of_n(
    output_dir: str | os.PathLike,
    rows: Sequence[dict],
    policy: PolicySource | str | os.PathLike,
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
    Generates, scores and evaluates, all that is not done yet in `output_dir`.

    Args:
        rows (`Sequence[dict]`): the prompts, as [`~dmoerm_trl.evaluation.response_files.read_prompts`] gives
            them.
        policy (`PolicySource` or path): what writes the responses, or a file of them: `prompt`, `response` and
            maybe `gold`, as JSONL or Parquet.
        reward_models (`Mapping`):
            Name -> a [`~dmoerm_trl.evaluation.scorers.ScorerSource`]'s name, or `{"mean": members}`, `{"WCO": members}`,
            `{"UWO": members}`. Members that are no DMoERM have no scale of their own: they are standardised by mean and
            deviation over all the responses.
        gold (`str`): a scorer's name too, or `"file"` for the column `gold` of the file of responses.
        n (`int`): N, responses a prompt.
        grid (`Sequence[int]`, *optional*): values of n; about 12 up to N if absent.
        show (`Sequence[int]`): values of n whose winners are shown; N in the place of those above it.
        show_prompts (`int`): prompts whose winners are shown.
        shard_size (`int`): responses that are lost when the run is killed, for each worker.
        workers (`int`): processes on a CPU, each with its share of the threads.
        max_length, dtype: of the reward models.
        processes (`PartialState`, *optional*): those that share the work, see
            [`~dmoerm_trl.workers.launched_processes`]. Each calls this and gets the outcome, which one of them saves.

    Raises:
        ValueError: The settings differ from those of the responses or scores that are there, another run writes the folder, a reward model's score is NaN or infinite,
            there are too few responses, or each of several processes would start workers of its own.
        OSError: The disk is full; what was written is kept.
    """
    if min(n, workers) < 1 or seed < 0:
        raise ValueError(
            f"got n={n}, workers={workers} and seed={seed}, need at least 1, 1 and 0: n is the responses to a prompt."
        )
    if not os.fspath(output_dir).strip():
        raise ValueError("got an empty `output_dir`, need a folder of the run's own: name it.")
    members = {name: _members(name, spec) for name, spec in reward_models.items()}
    if not members:
        raise ValueError("got no `reward_models`, need at least one: name -> folder, hub name or 'length'.")
    if processes is not None and processes.num_processes > 1 and workers > 1:
        raise ValueError(
            f"got workers={workers} in each of {processes.num_processes} processes, need 1, because the processes share the "
            "work already: leave `workers` out, or start without the launcher."
        )
    from_file = not isinstance(policy, PolicySource)
    if gold == GOLD_OF_FILE and not from_file:
        raise ValueError(f"got gold {gold!r} without a file of responses, need one with the column `gold`.")
    if any(shown < 1 for shown in show) or show_prompts < 0:
        raise ValueError(
            f"got show={list(show)} and show_prompts={show_prompts}, need values of n from 1 and a number of prompts from 0: they "
            "say whose winners are shown."
        )
    grid = default_grid(n) if grid is None else sorted(grid)
    if not grid or not 1 <= grid[0] <= grid[-1] <= n:
        raise ValueError(f"got the grid {grid} for n={n}, need values from 1 to n: raise n or leave them out.")

    names = dict.fromkeys(member for of_model, _ in members.values() for member in of_model)
    if gold != GOLD_OF_FILE:
        names[gold] = None
    sources = {name: ScorerSource(name, max_length, dtype) for name in names}
    parts = {name: f"scores/{slug(name)}" for name in sources}

    for source in sources.values():
        source.check()
    store = ResponseStore(output_dir, len(rows), n, shard_size)
    if from_file:
        responses = {"file": os.fspath(policy), "gold": gold == GOLD_OF_FILE, "sha256": file_digest([Path(policy)])}
    else:
        responses = {**asdict(policy), "seed": seed, "sha256 of the weights": weights_digest(policy.name)}
    responses["sha256 of the prompts"] = _digest(row["prompt"] for row in rows)
    one_before_the_others = nullcontext if processes is None else processes.main_process_first
    with held(output_dir):
        with one_before_the_others():
            store.claim(RESPONSES, responses)
            for name, source in sources.items():
                store.claim(
                    parts[name], {**source.settings(), "sha256 of rows and responses": _digest([*rows, responses])}
                )

        with worker_pool(workers) as run:
            if from_file:
                with one_before_the_others():
                    import_responses(store, rows, policy, gold=gold == GOLD_OF_FILE)
            else:
                write_responses(store, rows, policy, seed, run, processes)
            for name, source in sources.items():
                write_scores(store, parts[name], rows, source, run, processes)

    scales = {
        member: _scale(store, parts[member])
        for of_model, combine in members.values()
        for member in of_model
        if combine is not None and not sources[member].is_standardised
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
            proxies = {name: _combine(columns, scales, *of_model) for name, of_model in members.items()}
            if prompt < show_prompts:
                winners.extend(_winners(store, prompt, proxies, columns[gold], show))
            yield proxies, columns[gold]

    curves = best_of_n_curves(scored(), grid, seed=seed)
    shown = [row["prompt"][-1]["content"] for row in rows[:show_prompts]]
    return BestOfN(curves, winners, shown, distinct_texts / (n * len(rows)))


def _members(name: str, spec: str | Mapping[str, Sequence[str]]) -> tuple[list[str], str | None]:
    """The scorers of a reward model, and how their scores are made into one."""
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
    """Mean and standard deviation of the scores of all responses."""
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
