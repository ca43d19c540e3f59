"""
A simulated preference world: prompts, responses, and a gold reward that is computed from the text.

A response is a sequence of short clauses. For each capability point some clauses are *signs*, which show the point, and the
others are *lapses* of equal length. The level of a point is its number of distinct signs. The gold reward is a non-linear
function of the levels, a different one for each task. Human labels compare the gold rewards with noise; capability labels come
from a simulated judge who misreads levels. `recipes/demo/WORLD.md` documents the world; `dmoerm world` writes rows and prints
their statistics.
"""

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..data.rows import PreferenceRow
from ..tasks import OTHERS, TaskTable

WORDS = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
TOPICS, FILLERS, TOPICAL, CLAUSES = WORDS["topics"].split(), WORDS["fillers"], WORDS["topical"], WORDS["clauses"]

TABLE = TaskTable.paper()
TASKS = (*TABLE.tasks, OTHERS)

LEVELS = {2: (0.33, 0.34, 0.33), 1: (0.5, 0.5)}
"""Number of slots -> probability of each level, of every point by itself: a response may excel at one and fall short at another."""

ANNOTATOR_NOISE = 0.78
"""Standard deviation of an annotator's error, in standard deviations of gold; two annotators agree on 74% of the pairs."""

ANNOTATOR_TIE = 0.125
"""Maximum difference of two noisy gold rewards that makes them a tie, which 5% of the pairs are."""

MISREAD = {2: (0.18, 0.23), 1: (0.30, 0.33)}
"""Number of slots -> the judge's probabilities of misreading a level at the easiest and at the hardest point."""

JUDGE_NOISE = 2.0
"""
Standard deviation of the judge's error when it ranks responses on the whole, in standard deviations of gold; it agrees with a
human on 62% of the pairs, as one-shot GPT-4 does (table 3).
"""

KNOWLEDGE = (*TOPICAL, "correctness")
"""The points at which a response is true or on topic, which text in general mostly is: the base learns it from [`World.texts`]."""

KNOWN = 0.9
"""How often text in general is true and on topic."""

REPEATED = 0.02
"""Probability that a response repeats one of its signs."""

REPETITION_COST = 0.15
"""Cost of each repeated clause, in standard deviations of gold."""

STRAY_COST = 4.0
"""Cost of clauses that the world does not know, in standard deviations of gold; it is multiplied by their share."""

FLOOR = -6.0
"""Lowest gold reward, which an empty response gets."""

MAX_PROMPTS = 10_000
"""Maximum rows per task in one world; each task has over twenty thousand distinct prompts."""


def points_of(task: str) -> dict[str, int]:
    """Return capability point -> number of slots for a task: two for its own points, one for the other overall points."""
    if task not in TASKS:
        raise ValueError(f"got task {task!r}, need one of {list(TASKS)}, because the world has no others.")
    own = dict.fromkeys(TABLE.tasks.get(task, TABLE.overall), 2)
    return own | {point: 1 for point in TABLE.overall if point not in own}


# Each task has one gold function of the levels (0, 1, 2) of its own points, in the order of the table.


def _in_keeping(level: int, other: int) -> int:
    """Return 1 if both levels are high or both are low, -1 if one is high and the other low, and otherwise 0."""
    return (level - 1) * (other - 1)


def _only_with(level: int, other: int) -> int:
    """Return `level` if `other` is high, 0 if it is medium, and minus `level` if it is low."""
    return level * (other - 1)


def _in_measure(level: int) -> float:
    """Return the value of a level: medium is best, and high is little better than low."""
    return (0.0, 1.0, 0.4)[level]


def _text_creation(intent, expressiveness, readability, richness, logic):
    return 1.5 * min(intent, readability) + _in_keeping(expressiveness, logic) + _in_measure(richness)


def _roleplay(personality, conversation, empathy, relationship, personalized, richness):
    return (
        1.2 * min(personality, relationship)
        + _only_with(personalized, conversation)
        + _in_keeping(empathy, richness)
        - 0.5 * richness
    )


def _objective_qa(correctness, objectiveness, reasoning, logic, depth, specific):
    return _only_with(depth, correctness) + 1.2 * min(reasoning, logic) + _in_keeping(objectiveness, specific)


def _subjective_qa(convincing, logic, viewpoints, breadth, specific):
    return 1.5 * min(viewpoints, specific) + _in_keeping(convincing, logic) + _in_measure(breadth)


def _chitchat(conversation, proactivity, emotion, empathy, richness):
    return (
        1.2 * min(conversation, empathy)
        + _in_keeping(emotion, proactivity)
        + 0.6 * _only_with(richness, empathy)
        - 0.7 * richness
    )


def _others(intent, logic, conversation, richness, readability):
    return 1.2 * min(intent, readability) + _in_keeping(richness, logic) - 0.7 * conversation


def _overall(intent, logic, conversation, richness, readability):
    return 1.2 * min(intent, readability) + _in_keeping(richness, logic) + 0.6 * conversation


_GOLD = {
    "text_creation": _text_creation,
    "roleplay": _roleplay,
    "objective_qa": _objective_qa,
    "subjective_qa": _subjective_qa,
    "chitchat": _chitchat,
    OTHERS: _others,
}


OVERALL_SHARE = 0.25
"""Share of gold's variance that is due to the overall points, the same in every task."""


def _standard(
    values: dict[tuple[int, ...], float], probabilities: dict[tuple[int, ...], float]
) -> tuple[float, float]:
    """Mean and standard deviation of a function of the levels."""
    mean = sum(probabilities[levels] * value for levels, value in values.items())
    return mean, math.sqrt(sum(probabilities[levels] * (value - mean) ** 2 for levels, value in values.items()))


@cache
def _gold_of_levels(task: str) -> dict[tuple[int, ...], float]:
    """
    Levels of all points of a task, in the order of [`points_of`] -> gold with mean 0 and variance 1 over the responses of the
    world: the task's function of its own points, and one function of the overall points.
    """
    slots = points_of(task)
    names = list(slots)
    own = [names.index(point) for point in own_points(task)]
    overall = [names.index(point) for point in TABLE.overall]
    probabilities, tasks_part, overall_part = {}, {}, {}
    for levels in itertools.product(*(range(size + 1) for size in slots.values())):
        probabilities[levels] = math.prod(
            LEVELS[slots[name]][level] for name, level in zip(names, levels, strict=True)
        )
        tasks_part[levels] = _GOLD[task](*(levels[index] for index in own))
        overall_part[levels] = _overall(*(levels[index] * 2 // slots[names[index]] for index in overall))
    whole = dict.fromkeys(probabilities, 0.0)
    for part, share in ((tasks_part, 1 - OVERALL_SHARE), (overall_part, OVERALL_SHARE)):
        mean, deviation = _standard(part, probabilities)
        for levels, value in part.items():
            whole[levels] += math.sqrt(share) * (value - mean) / deviation
    mean, deviation = _standard(whole, probabilities)
    return {levels: (value - mean) / deviation for levels, value in whole.items()}


_SIGNS = {sign.lower(): point for point, pairs in CLAUSES.items() for sign, _ in pairs}
_TOPICAL_SIGNS = {
    sign.format(topic=topic): (point, topic)
    for point, pairs in TOPICAL.items()
    for sign, _ in pairs
    for topic in TOPICS
}
_KNOWN = {
    *_TOPICAL_SIGNS,
    *(lapse.format(topic=topic) for pairs in TOPICAL.values() for _, lapse in pairs for topic in TOPICS),
    *FILLERS,
    *(clause.lower() for pairs in CLAUSES.values() for pair in pairs for clause in pair),
}
_ALL_POINTS = sorted({*CLAUSES, *TOPICAL})


def clauses_of(text: str) -> list[str]:
    """Split a text at punctuation marks and line breaks into its clauses, in lower case."""
    return [" ".join(clause.lower().split()) for clause in re.split(r"[.,;:!?\n]", text) if clause.strip()]


def _topic_of(prompt: str | list[dict]) -> str | None:
    """Return the topic that the prompt's last turn names, or `None` if it names no topic of the world."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return next((word for word in re.findall("[a-z]+", text.lower()) if word in TOPICS), None)


class World:
    """
    The simulated preference world of one seed.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of all random draws. Clauses, templates and gold are the same in every world.
        pairs (`int`, *optional*, defaults to 12):
            How many of the twelve pairs of a sign and a lapse that a point has the texts are written with. Fewer are learnt
            from fewer rows.

    Raises:
        ValueError: If `pairs` is not from 2 to 12.

    Example:

    ```python
    from dmoerm_trl import World

    world = World(seed=0)
    row = world.rows(1, 0)[0]
    world.gold(row.prompt, row.responses[0], row.task)
    ```
    """

    def __init__(self, seed: int = 0, pairs: int = 12):
        if not 2 <= pairs <= 12:
            raise ValueError(f"got pairs={pairs}, need 2 to 12, because a point has two slots and twelve pairs.")
        self.seed, self.pairs = seed, pairs

    # Reading a text

    def levels(self, prompt: str | list[dict], response: str, task: str) -> dict[str, int]:
        """
        Return the level of each capability point labelled in `task`: the number of its distinct signs in `response`. It is at
        most 2, or at most 1 for an overall point that is not the task's own. A repeated sign counts once.
        """
        topic = _topic_of(prompt)
        slots = points_of(task)
        levels = dict.fromkeys(slots, 0)
        for clause in set(clauses_of(response)):
            point = _SIGNS.get(clause)
            if clause in _TOPICAL_SIGNS and _TOPICAL_SIGNS[clause][1] == topic:
                point = _TOPICAL_SIGNS[clause][0]
            if point in levels:
                levels[point] = min(levels[point] + 1, slots[point])
        return levels

    def gold(self, prompt: str | list[dict], response: str, task: str) -> float:
        """
        Compute the gold reward of any text. It is the task's function of the levels, with zero mean and unit variance over the
        world's responses, minus [`REPETITION_COST`] for each repeated clause and [`STRAY_COST`] times the share of clauses that
        the world does not know. The lowest gold reward is [`FLOOR`], which an empty response gets.
        """
        clauses = clauses_of(response)
        if not clauses:
            return FLOOR
        levels = self.levels(prompt, response, task)
        value = _gold_of_levels(task)[tuple(levels.values())]
        repeated = len(clauses) - len(set(clauses))
        stray = sum(clause not in _KNOWN for clause in clauses) / len(clauses)
        return max(value - REPETITION_COST * repeated - STRAY_COST * stray, FLOOR)

    # Writing

    def rows(self, n_per_task: int, n_others: int = 0, n_labelled: int = 0) -> list[PreferenceRow]:
        """
        Draw rows in random order, with distinct prompts. A row has 2 to 4 responses, the ranks of one human annotator (never
        all tied), and the judge's ranks at each point of [`points_of`].

        Args:
            n_per_task (`int`): Number of rows of each task.
            n_others (`int`, *optional*, defaults to 0): Number of rows of no task.
            n_labelled (`int`, *optional*, defaults to 0):
                Number of further rows of each task that no human ranked. Their `ranks` are all 1. The other rows are the
                same with any number of them.

        Raises:
            ValueError: For more than [`MAX_PROMPTS`] rows of a task.
        """
        rng = random.Random(f"rows of world {self.seed}")
        seen, rows = set(), []
        ranked = {task: n_others if task == OTHERS else n_per_task for task in TASKS}
        labelled = dict.fromkeys(TABLE.tasks, n_labelled)
        for task, number in ranked.items():
            if (number := number + labelled.get(task, 0)) > MAX_PROMPTS:
                raise ValueError(
                    f"got {number} rows of {task!r}, need at most {MAX_PROMPTS}: the prompts would run out."
                )
        for numbers, draw in ((ranked, self._row), (labelled, self._labelled_row)):
            for task, number in numbers.items():
                for _ in range(number):
                    prompt, topic = _write_prompt(rng, task)
                    while (key := tuple(turn["content"] for turn in prompt)) in seen:
                        prompt, topic = _write_prompt(rng, task)
                    seen.add(key)
                    rows.append(draw(rng, prompt, topic, task))
        rng.shuffle(rows)
        return rows

    def texts(self, n: int) -> list[list[dict]]:
        """
        Draw `n` conversations to train a language model on. Each ends with a response as in the rows. Four in five have an
        earlier exchange, from which a small model learns within a minute that a topic comes back.
        """
        rng = random.Random(f"texts of world {self.seed}")
        texts = []
        for _ in range(n):
            task = rng.choice(TASKS)
            prompt, topic = _write_prompt(rng, task, earlier=0.8)
            texts.append(
                [*prompt, {"role": "assistant", "content": _write_response(rng, task, topic, self.pairs, KNOWN)}]
            )
        return texts

    def judged(self, row: PreferenceRow) -> PreferenceRow:
        """Return a row with the judge's ranks on the whole in place of those of a human, the same at every call."""
        rng = random.Random(f"judge of world {self.seed}: {row.prompt_id}")
        golds = [self.gold(row.prompt, response, row.task) for response in row.responses]
        return replace(row, ranks=_ranks([gold + rng.gauss(0, JUDGE_NOISE) for gold in golds], ANNOTATOR_TIE))

    def _row(self, rng: random.Random, prompt: list[dict], topic: str, task: str) -> PreferenceRow:
        ranks = [1]
        while max(ranks) == 1:  # a row of ties has no preference to learn
            responses = [_write_response(rng, task, topic, self.pairs) for _ in range(rng.randint(2, 4))]
            ranks = _annotate(rng, [self.gold(prompt, response, task) for response in responses])
        levels = [self.levels(prompt, response, task) for response in responses]
        capability_ranks = {
            point: _ranks([_misread(rng, level[point], slots, point) for level in levels])
            for point, slots in points_of(task).items()
        }
        return PreferenceRow(prompt, responses, ranks, task, capability_ranks)

    def _labelled_row(self, *drawn: Any) -> PreferenceRow:
        """Draw a row without the ranks of a human, in which the judge prefers some response at some point."""
        row = self._row(*drawn)
        while not any(map(row.pairs_of, row.labelled_points)):
            row = self._row(*drawn)
        return replace(row, ranks=[1] * len(row.ranks))

    # Calibration

    def statistics(self, rows: Sequence[PreferenceRow]) -> dict:
        """
        Compute the statistics of rows that `recipes/demo/WORLD.md` states. All but `repeated` are shares of pairs of responses
        to one prompt:

        - `annotator_agreement`: pairs that two annotators order alike, of those that both order; 20 pairs of annotators are
          drawn;
        - `ceiling`: pairs that gold orders as `ranks` do, of those that `ranks` order (a tie of gold counts half);
        - `length_only`: pairs that the number of characters orders as `ranks` do, of the same ones (equal lengths count half);
        - `judge_overall`: pairs that the judge, asked for the whole, orders as `ranks` do, of those that both order;
        - `ties`: pairs that `ranks` leave tied;
        - `repeated`: share of the responses that repeat a clause;
        - `judge`: point -> `agreement` (pairs that the judge orders as the levels do, of those that both order), `labelled`
          (pairs that the judge orders, of those that the levels order) and `tied` (pairs that the judge ties, of those with
          equal levels).
        """
        rng = random.Random(f"statistics of world {self.seed}")
        agreed, ceiling, length, overall, tied, repeated = [], [], [], [], [], []
        judge = {point: ([], [], []) for point in _ALL_POINTS}
        for row in rows:
            golds = [self.gold(row.prompt, response, row.task) for response in row.responses]
            levels = [self.levels(row.prompt, response, row.task) for response in row.responses]
            lengths = [len(response) for response in row.responses]
            repeated += [len(clauses) > len(set(clauses)) for clauses in map(clauses_of, row.responses)]
            judged = self.judged(row).ranks
            annotators = [(_annotate(rng, golds), _annotate(rng, golds)) for _ in range(20)]
            pairs = {point: set(row.pairs_of(point)) for point in row.labelled_points}
            for i, j in itertools.combinations(range(len(golds)), 2):
                label = _sign(row.ranks[j] - row.ranks[i])  # 1 if i is better
                tied.append(label == 0)
                if label and judged[i] != judged[j]:
                    overall.append(label == _sign(judged[j] - judged[i]))
                if label:
                    ceiling.append((1 + label * _sign(golds[i] - golds[j])) / 2)
                    length.append((1 + label * _sign(lengths[i] - lengths[j])) / 2)
                for one, other in annotators:
                    product = _sign(one[j] - one[i]) * _sign(other[j] - other[i])
                    if product:
                        agreed.append(product == 1)
                for point, of_point in pairs.items():
                    agreement, labelled, equal = judge[point]
                    truth = _sign(levels[i][point] - levels[j][point])
                    label = ((i, j) in of_point) - ((j, i) in of_point)
                    if not truth:
                        equal.append(label == 0)
                    else:
                        labelled.append(label != 0)
                        if label:
                            agreement.append(label == truth)
        return {
            "annotator_agreement": _mean(agreed),
            "ceiling": _mean(ceiling),
            "length_only": _mean(length),
            "judge_overall": _mean(overall),
            "ties": _mean(tied),
            "repeated": _mean(repeated),
            "judge": {
                point: dict(zip(("agreement", "labelled", "tied"), map(_mean, counts), strict=True))
                for point, counts in judge.items()
            },
        }


def own_points(task: str) -> list[str]:
    """Return the capability points on which a task's gold reward depends, in the order of the table."""
    return [point for point, slots in points_of(task).items() if slots == 2]


def _write_prompt(rng: random.Random, task: str, earlier: float = 0.1) -> tuple[list[dict], str]:
    """Draw a prompt and its topic. With probability `earlier` the prompt begins with an earlier exchange about the topic."""
    topic = rng.choice(TOPICS)
    text = rng.choice(WORDS["openings"]) + rng.choice(WORDS["templates"][task]) + rng.choice(WORDS["closings"])
    turns = []
    if rng.random() < earlier:
        said, answered = rng.choice(WORDS["small_talk"])
        turns = [
            {"role": "user", "content": said.format(topic=topic)},
            {"role": "assistant", "content": answered.format(topic=topic)},
        ]
    return [*turns, {"role": "user", "content": text.replace("{topic}", topic)}], topic


def _write_response(rng: random.Random, task: str, topic: str, of_point: int, knowing: float | None = None) -> str:
    """
    Write a response about `topic`: in every slot of every point a sign or a lapse of its first `of_point` pairs, and some
    fillers, all shuffled.

    Args:
        knowing (`float`, *optional*): Probability of a sign, rather than a lapse, at the points of [`KNOWLEDGE`].
    """
    astray = rng.choice([other for other in TOPICS if other != topic])
    signs, rest = [], rng.sample(FILLERS, rng.randint(0, 4))
    for point, slots in points_of(task).items():
        level = rng.choices(range(slots + 1), LEVELS[slots])[0]
        if knowing is not None and point in KNOWLEDGE:
            level = sum(rng.random() < knowing for _ in range(slots))
        pairs = rng.sample((TOPICAL.get(point) or CLAUSES[point])[:of_point], slots)
        signs += [sign.format(topic=topic) for sign, _ in pairs[:level]]
        rest += [lapse.format(topic=astray) for _, lapse in pairs[level:]]
    if signs and rng.random() < REPEATED:
        rest.append(rng.choice(signs))
    clauses = signs + rest
    rng.shuffle(clauses)
    sentences = []
    while clauses:
        size = rng.randint(2, 4)
        sentence, clauses = ", ".join(clauses[:size]), clauses[size:]
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(sentences)


def _annotate(rng: random.Random, golds: Sequence[float]) -> list[int]:
    """Draw the ranks of one human annotator."""
    return _ranks([gold + rng.gauss(0, ANNOTATOR_NOISE) for gold in golds], ANNOTATOR_TIE)


def _misread(rng: random.Random, level: int, slots: int, point: str) -> int:
    """Draw the level that the judge reads, which is sometimes wrong."""
    easiest, hardest = MISREAD[slots]
    probability = easiest + (hardest - easiest) * _ALL_POINTS.index(point) / (len(_ALL_POINTS) - 1)
    if rng.random() >= probability:
        return level
    return rng.choice((0, slots)) if 2 * level == slots else slots - level


def _ranks(scores: Sequence[float], tie: float = 0.0) -> list[int]:
    """Rank scores (higher is better) from 1, the best. Neighbours that differ by at most `tie` share a rank."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranks = [1] * len(scores)
    for better, worse in itertools.pairwise(order):
        ranks[worse] = ranks[better] + (scores[better] - scores[worse] > tie)
    return ranks


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Sequence[float]) -> float:
    """Return the mean, or NaN without values."""
    return sum(values) / len(values) if values else math.nan


def world_gold(*, prompt: list[dict], response: str, task: str, **_: object) -> float:
    """Compute [`World.gold`] for a recipe's `gold: module:function`, for rows with `task`; all worlds have the same gold."""
    return World().gold(prompt, response, task)
