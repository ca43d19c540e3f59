"""The real data of real_text.py: read, cut to the encoder's means, labelled by weak functions, split by prompt."""

import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.labelling.heuristics import weak_ranks
from dmoerm_trl.labelling.system_strength import length_controlled_strength, system_ranks, system_strength
from dmoerm_trl.tasks import TaskTable

CUT = " ... "
"""Stands where a text was cut."""

GENERAL = "general"
"""The task of the prompts that the router calls others, and of those of rare tasks."""

SOURCE, SOURCE_AT_LENGTH = "source strength", "source strength at equal length"
"""The capability points that are labelled by who wrote a response; all others are labelled by functions of its text."""


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used, and of each text: an encoder of 512 positions takes what is here."""

    router_tokens: int = 96
    """Tokens of a prompt for the router."""
    prompt_tokens: int = 96
    """Tokens of a prompt's last turn for the reward models."""
    response_tokens: int = 384
    """Tokens of a response; the fewer, the less of what the weak points of the whole text say can be seen."""
    responses: int = 8
    """Responses of a training row, drawn from the prompt's about 48 without replacement."""
    ranked_rows: int = 1
    """Training rows a prompt with overall ranks by gold, from which all methods learn."""
    rows: int = 6
    """Training rows a prompt; those without overall ranks are for the experts on sources alone."""
    prompts: int | None = None
    """Arena prompts, drawn by the seed; all if None."""
    test_share: float = 0.12
    """Share of the arena's prompts for the test, with all their responses."""
    task_prompts: int = 30
    """A task with fewer training prompts has no inner model: its prompts are `general`."""
    labelled: float = 0.95
    """A capability point that tells responses apart in fewer of a task's training prompts is left out of the task."""
    pairs: int | None = 500
    """Pairs of each of the two sets of pairs, drawn once for all seeds; all if None, or if there are fewer."""
    router_rows: int | None = None
    """Labelled prompts for the router, 100 of them to watch its training; all if None."""


class Cutter:
    """Cuts long texts to their first two thirds and last third of so many tokens, and counts what it cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.texts, self.cut = Counter(), Counter()

    def __call__(self, text: str, tokens: int, what: str) -> str:
        self.texts[what] += 1
        offsets = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        if len(offsets) <= tokens:
            return text
        self.cut[what] += 1
        tail = tokens // 3
        return text[: offsets[tokens - tail - 1][1]] + CUT + text[offsets[-tail][0] :]

    def __str__(self) -> str:
        return "; ".join(f"{self.cut[what]} of {total} {what} were cut" for what, total in self.texts.items())


@dataclass
class TestSet:
    """
    Rows that are never trained on.

    Args:
        rows (`list[PreferenceRow]`): the texts as the models read them, cut.
        gold (`list[list[float]]`): what is true of each response, higher is better.
        lengths (`list[list[int]]`): characters of each response before it was cut.
        keys (`list[str]`): the prompt of each row; rows of one prompt in several seeds have one key.
        labels (`list[dict[str, list[int]]]`): weak ranks of the responses before they were cut, by overall point; empty where
            they are not asked for.
    """

    __test__ = False  # pytest collects classes by this name

    rows: list[PreferenceRow] = field(default_factory=list)
    gold: list[list[float]] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: list[dict[str, list[int]]] = field(default_factory=list)

    def add(self, row: PreferenceRow, gold: Sequence[float], responses: Sequence[str], key: str) -> None:
        self.rows.append(row)
        self.gold.append(list(gold))
        self.lengths.append([len(response) for response in responses])
        self.keys.append(key)

    def matched(self, row: int, share: float) -> list[tuple[int, int]]:
        """The pairs of a row whose lengths differ by at most this share of the longer."""
        lengths = self.lengths[row]
        pairs = combinations(range(len(lengths)), 2)
        return [(i, j) for i, j in pairs if abs(lengths[i] - lengths[j]) <= share * max(lengths[i], lengths[j])]


class ArenaPrompt(NamedTuple):
    key: str
    prompt: str
    responses: list[str]
    gold: list[float]
    sources: list[str]
    """The system that wrote each response."""


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prompt_row(prompt: str, task: str | None = None) -> PreferenceRow:
    """A prompt as `train_router` takes it, which does not read the responses."""
    return PreferenceRow(_turns(prompt), ["a", "b"], [1, 2], task)


def router_rows(path: Path, sizes: Sizes, cut: Cutter, label: str = "task") -> list[PreferenceRow]:
    """Prompts with a label of theirs as the task."""
    return [prompt_row(cut(row["prompt"], sizes.router_tokens, "prompts"), row[label]) for row in read_jsonl(path)]


def read_arena(path: Path) -> list[ArenaPrompt]:
    prompts: dict[int, ArenaPrompt] = {}
    for row in pq.read_table(path).to_pylist():
        key = row["prompt_id"]
        prompt = prompts.setdefault(key, ArenaPrompt(f"arena {key}", row["instruction"], [], [], []))
        prompt.responses.append(row["response"])
        prompt.gold.append(row["gold"])
        prompt.sources.append(row["generator"])
    return [prompts[key] for key in sorted(prompts)]


def arena_split(
    prompts: Sequence[ArenaPrompt], tasks: Sequence[str], table: TaskTable, sizes: Sizes, cut: Cutter, seed: int
) -> tuple[TaskTable, list[PreferenceRow], TestSet]:
    """
    Training rows of K responses with weak labels, and the test set, which share no prompt. How strong a source is, the ranked
    training rows alone tell.

    Args:
        tasks (`Sequence[str]`): the task of each prompt, by a router.

    Returns:
        The table without the tasks and points that have too few prompts, the training rows, and the test set.
    """
    draw = random.Random(seed)
    order = draw.sample(range(len(prompts)), sizes.prompts or len(prompts))
    tested = max(round(sizes.test_share * len(order)), 1)
    training = order[tested:]
    counts = Counter(tasks[index] for index in training)
    kept = {
        task: points for task, points in table.tasks.items() if task == GENERAL or counts[task] >= sizes.task_prompts
    }

    def row_of(prompt: ArenaPrompt, task: str, chosen: Sequence[int], ranks: list[int], labels: dict) -> PreferenceRow:
        return PreferenceRow(
            _turns(cut(prompt.prompt, sizes.prompt_tokens, "prompts")),
            [cut(prompt.responses[i], sizes.response_tokens, "responses") for i in chosen],
            ranks,
            task if task in kept else GENERAL,
            labels,
        )

    def gold_ranks(prompt: ArenaPrompt, chosen: Sequence[int]) -> list[int]:
        return [1 + sum(prompt.gold[other] > prompt.gold[i] for other in chosen) for i in chosen]

    drawn: list[tuple[int, list[int], list[int]]] = []  # a prompt, some of its responses, and their ranks
    tied = 0
    for index in training:
        prompt = prompts[index]
        shuffled = draw.sample(range(len(prompt.responses)), len(prompt.responses))
        starts = range(0, sizes.rows * sizes.responses, sizes.responses)
        groups = [shuffled[start : start + sizes.responses] for start in starts]
        compared, others = groups[: sizes.ranked_rows], groups[sizes.ranked_rows :]
        # without a better response and a worse one there is nothing to learn from the prompt
        if any(max(gold_ranks(prompt, chosen)) > 1 for chosen in compared):
            drawn += [(index, chosen, gold_ranks(prompt, chosen)) for chosen in compared]
            drawn += [(index, chosen, [1] * len(chosen)) for chosen in others if len(chosen) > 1]
        else:
            tied += 1
    ranked = [
        (ranks, [prompts[index].sources[i] for i in chosen], [len(prompts[index].responses[i]) for i in chosen])
        for index, chosen, ranks in drawn
        if max(ranks) > 1
    ]
    everyone = {source for prompt in prompts for source in prompt.sources}
    # Of a source in no ranked row it is that of the middle. The ridge is that of the kept seeds, whose experts learnt these labels.
    strengths = {
        SOURCE: dict.fromkeys(everyone, 0.5) | system_strength((ranks, sources) for ranks, sources, _ in ranked),
        SOURCE_AT_LENGTH: dict.fromkeys(everyone, 0.0) | length_controlled_strength(ranked, ridge=1e-3),
    }

    def labels_of(prompt: ArenaPrompt, chosen: Sequence[int], points: Iterable[str]) -> dict[str, list[int]]:
        """Of the whole texts."""
        responses, sources = [prompt.responses[i] for i in chosen], [prompt.sources[i] for i in chosen]
        return {
            point: system_ranks(strengths[point], sources)
            if point in strengths
            else weak_ranks(prompt.prompt, responses, point)
            for point in points
        }

    rows = []
    for index, chosen, ranks in drawn:
        task = tasks[index] if tasks[index] in kept else GENERAL
        points = dict.fromkeys([*kept[task], *table.overall])
        if max(ranks) == 1:
            points = [point for point in points if point in strengths]
        labels = labels_of(prompts[index], chosen, points)
        rows.append(row_of(prompts[index], task, chosen, ranks, labels))
    rows = [row for row in rows if any(row.pairs_of(point) for point in (None, *row.labelled_points))]
    read, there = sum(len(row.responses) for row in rows), sum(len(prompts[index].responses) for index in training)
    print(
        f"arena, seed {seed}: {len(training)} training prompts, {tied} of them left out because what was drawn to be compared is "
        f"tied; {read} of their {there} responses are in {len(rows)} rows"
    )
    table = TaskTable({task: _labelled(points, task, rows, sizes) for task, points in kept.items()}, table.overall)
    test = TestSet()
    for index in order[:tested]:
        prompt, everything = prompts[index], range(len(prompts[index].responses))
        row = row_of(prompt, tasks[index], everything, gold_ranks(prompt, everything), {})
        test.add(row, prompt.gold, prompt.responses, prompt.key)
        test.labels.append(labels_of(prompt, everything, table.overall))
    known = {task: {*points, *table.overall} for task, points in table.tasks.items()}
    rows = [
        replace(row, capability_ranks={p: ranks for p, ranks in row.capability_ranks.items() if p in known[row.task]})
        for row in rows
    ]
    return table, rows, test


def _labelled(points: Sequence[str], task: str, rows: Sequence[PreferenceRow], sizes: Sizes) -> tuple[str, ...]:
    """The points at which enough of a task's prompts have a better response and a worse one."""
    of_task = [row for row in rows if row.task == task]
    prompts = {row.prompt_id for row in of_task}
    enough = []
    for point in points:
        told_apart = {row.prompt_id for row in of_task if row.pairs_of(point)}
        if len(told_apart) >= sizes.labelled * len(prompts):
            enough.append(point)
        else:
            print(
                f"{task}: {point!r} is left out, it tells responses apart in {len(told_apart)} of {len(prompts)} prompts"
            )
    return tuple(enough)


def human_pairs(path: Path, sizes: Sizes, cut: Cutter, trained: Collection[str]) -> TestSet:
    """Pairs labelled by people, without their ties and without the prompts that something is trained on (`prompt_id`)."""
    rows = [
        (row["prompt"], [row["response_1"], row["response_2"]], [row["preferred"] == 1, row["preferred"] == 2])
        for row in read_jsonl(path)
        if row["preferred"]
    ]
    unseen = [row for row in rows if prompt_row(row[0]).prompt_id not in trained]
    print(
        f"human pairs: {len(rows) - len(unseen)} of {len(rows)} left out, because something is trained on their prompts"
    )
    return _pairs(unseen, "human", sizes, cut)


def harmless_pairs(path: Path, sizes: Sizes, cut: Cutter) -> TestSet:
    """Pairs of last turns of a conversation, labelled by people for harmlessness."""
    rows = [
        (row["prompt"], [row["chosen"][-1]["content"], row["rejected"][-1]["content"]], [True, False])
        for row in read_jsonl(path)
    ]
    return _pairs(rows, "harmless", sizes, cut)


def _pairs(rows: Sequence[tuple], name: str, sizes: Sizes, cut: Cutter) -> TestSet:
    test = TestSet()
    usable = [index for index, (_, responses, _) in enumerate(rows) if all(text.strip() for text in responses)]
    print(f"{name} pairs: {len(rows)} without ties, {len(rows) - len(usable)} of them left out for an empty response")
    for index in random.Random(0).sample(usable, min(sizes.pairs or len(usable), len(usable))):
        prompt, responses, gold = rows[index]
        turns = _turns(prompt) if isinstance(prompt, str) else prompt
        last = cut(turns[-1]["content"], sizes.prompt_tokens, f"{name} prompts")
        row = PreferenceRow(
            [*turns[:-1], {**turns[-1], "content": last}],
            [cut(response, sizes.response_tokens, f"{name} responses") for response in responses],
            [1 if better else 2 for better in gold],
        )
        test.add(row, [float(better) for better in gold], responses, f"{name} {index}")
    return test


def _turns(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]
