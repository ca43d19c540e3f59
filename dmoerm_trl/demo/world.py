"""
A simulated preference world: prompts, responses, and a gold reward that a program reads off the text.

A response is a row of short clauses. For each capability point some of them are *signs* (the point is shown), the others
*lapses* of equal length; how many distinct signs there are is the point's level. Gold is a non-linear function of the
levels that differs from task to task. Human labels are a noisy comparison of gold, capability labels a judge who misreads
levels. `recipes/demo/WORLD.md` documents it; `dmoerm world` writes rows and prints their
statistics.
"""

import itertools
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..data.rows import PreferenceRow
from ..tasks import OTHERS, TaskTable

WORDS = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
TOPICS, FILLERS, TOPICAL, CLAUSES = WORDS["topics"].split(), WORDS["fillers"], WORDS["topical"], WORDS["clauses"]

TABLE = TaskTable.paper()
TASKS = (*TABLE.tasks, OTHERS)

LEVELS = {"poor": {2: (0.45, 0.33, 0.22), 1: (0.6, 0.4)}, "good": {2: (0.22, 0.33, 0.45), 1: (0.4, 0.6)}}
"""Day on which a response was written (one is as likely as the other) -> number of slots -> probability of each level."""

ANNOTATOR_NOISE = 0.78
"""Standard deviation of an annotator's error, in standard deviations of gold: two of them agree on 74% of the pairs."""

ANNOTATOR_TIE = 0.125
"""Utilities closer than this are a tie: 5% of the pairs."""

MISREAD = {2: (0.18, 0.23), 1: (0.30, 0.33)}
"""Number of slots -> the judge's probability of misreading a level, at the easiest and at the hardest point."""

REPEATED = 0.02
"""Share of the responses that say a sign twice."""

REPETITION_COST = 0.15
"""Cost in gold of each clause said again, in standard deviations of gold."""

STRAY_COST = 4.0
"""Cost in gold of text that is no clause of the world, times its share of the clauses."""

FLOOR = -6.0
"""The lowest gold reward: that of an empty response."""

MAX_PROMPTS = 10_000
"""Rows a task that one world gives: there are over twenty thousand distinct prompts of each."""


def points_of(task: str) -> dict[str, int]:
    """The capability points labelled in a task -> number of slots: two for the task's own, one for the overall ones."""
    if task not in TASKS:
        raise ValueError(f"got task {task!r}, need one of {list(TASKS)}: the world knows no other.")
    own = dict.fromkeys(TABLE.tasks.get(task, TABLE.overall), 2)
    return own | {point: 1 for point in TABLE.overall if point not in own}


# Gold: one function a task, of the levels (0, 1, 2) of the task's own points in the order of the table.


def _in_keeping(level: int, other: int) -> int:
    """Two points that suit each other: good when both are high or both low, bad when one is high and the other low."""
    return (level - 1) * (other - 1)


def _only_with(level: int, other: int) -> int:
    """`level` counts when `other` is high, nothing when it is middling, and against the response when it is low."""
    return level * (other - 1)


def _in_measure(level: int) -> float:
    """Some is best; much is little better than none."""
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


_GOLD = {
    "text_creation": _text_creation,
    "roleplay": _roleplay,
    "objective_qa": _objective_qa,
    "subjective_qa": _subjective_qa,
    "chitchat": _chitchat,
    OTHERS: _others,
}


def _moments(task: str) -> tuple[float, float]:
    """Mean and standard deviation of a task's gold over the responses of the world, by counting them out."""
    mean = square = 0.0
    for levels in itertools.product(range(3), repeat=sum(size == 2 for size in points_of(task).values())):
        probability = sum(math.prod(LEVELS[day][2][level] for level in levels) for day in LEVELS) / len(LEVELS)
        value = _GOLD[task](*levels)
        mean += probability * value
        square += probability * value**2
    return mean, math.sqrt(square - mean**2)


_SCALE = {task: _moments(task) for task in TASKS}

_SIGNS = {sign.lower(): point for point, pairs in CLAUSES.items() for sign, _ in pairs}
_TOPICAL_CLAUSES = {
    frame.format(topic=topic): (point, topic)
    for point, frames in TOPICAL.items()
    for frame in frames
    for topic in TOPICS
}
_KNOWN = {
    *_TOPICAL_CLAUSES,
    *FILLERS,
    *(clause.lower() for pairs in CLAUSES.values() for pair in pairs for clause in pair),
}
_ALL_POINTS = sorted({*CLAUSES, *TOPICAL})


def clauses_of(text: str) -> list[str]:
    """The clauses of a text: what stands between punctuation marks, in lower case."""
    return [" ".join(clause.lower().split()) for clause in re.split(r"[.,;:!?\n]", text) if clause.strip()]


def _topic_of(prompt: str | list[dict]) -> str | None:
    """The topic that the prompt's last turn names; `None` for a prompt from elsewhere."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return next((word for word in re.findall("[a-z]+", text.lower()) if word in TOPICS), None)


class World:
    """
    The simulated preference world of one seed.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of everything drawn. Clauses, templates and gold are the same in every world.

    Example:

    ```python
    from dmoerm_trl import World

    world = World(seed=0)
    row = world.rows(1, 0)[0]
    world.gold(row.prompt, row.responses[0], row.task)
    ```
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    # Reading a text

    def levels(self, prompt: str | list[dict], response: str, task: str) -> dict[str, int]:
        """
        The level of each capability point labelled in `task`: how many distinct signs of it `response` has, at most 2
        (at most 1 for an overall point that is not the task's own). A sign said twice counts once.
        """
        topic = _topic_of(prompt)
        slots = points_of(task)
        levels = dict.fromkeys(slots, 0)
        for clause in set(clauses_of(response)):
            point = _SIGNS.get(clause)
            if clause in _TOPICAL_CLAUSES and _TOPICAL_CLAUSES[clause][1] == topic:
                point = _TOPICAL_CLAUSES[clause][0]
            if point in levels:
                levels[point] = min(levels[point] + 1, slots[point])
        return levels

    def gold(self, prompt: str | list[dict], response: str, task: str) -> float:
        """
        The gold reward, for any text: the task's function of the levels, with zero mean and unit variance over the
        world's responses, less [`REPETITION_COST`] for each clause said again and [`STRAY_COST`] times the share of
        clauses that the world does not know. An empty response gets [`FLOOR`], the lowest.
        """
        clauses = clauses_of(response)
        if not clauses:
            return FLOOR
        levels = self.levels(prompt, response, task)
        mean, deviation = _SCALE[task]
        value = (_GOLD[task](*(levels[point] for point in own_points(task))) - mean) / deviation
        repeated = len(clauses) - len(set(clauses))
        stray = sum(clause not in _KNOWN for clause in clauses) / len(clauses)
        return max(value - REPETITION_COST * repeated - STRAY_COST * stray, FLOOR)

    # Writing

    def rows(self, n_per_task: int, n_others: int = 0) -> list[PreferenceRow]:
        """
        `n_per_task` rows of each task and `n_others` of none, in random order, no prompt twice. A row has 2 to 4
        responses, the ranks of one human annotator (never all tied), and the judge's ranks for [`points_of`] its task.
        """
        rng = random.Random(f"rows of world {self.seed}")
        seen, rows = set(), []
        for task in TASKS:
            wanted = n_others if task == OTHERS else n_per_task
            if wanted > MAX_PROMPTS:
                raise ValueError(
                    f"got {wanted} rows of {task!r}, need at most {MAX_PROMPTS}: the prompts would run out."
                )
            for _ in range(wanted):
                prompt, topic = _write_prompt(rng, task)
                while (key := tuple(turn["content"] for turn in prompt)) in seen:
                    prompt, topic = _write_prompt(rng, task)
                seen.add(key)
                rows.append(self._row(rng, prompt, topic, task))
        rng.shuffle(rows)
        return rows

    def texts(self, n: int) -> list[list[dict]]:
        """
        `n` conversations, each ending with a response as in the rows: text to train a language model on. Four in
        five have an earlier exchange: from those a small model learns within a minute that a topic comes back.
        """
        rng = random.Random(f"texts of world {self.seed}")
        texts = []
        for _ in range(n):
            task = rng.choice(TASKS)
            prompt, topic = _write_prompt(rng, task, earlier=0.8)
            texts.append([*prompt, {"role": "assistant", "content": _write_response(rng, task, topic)}])
        return texts

    def _row(self, rng: random.Random, prompt: list[dict], topic: str, task: str) -> PreferenceRow:
        ranks = [1]
        while max(ranks) == 1:  # without two distinct ranks there is nothing to learn from
            responses = [_write_response(rng, task, topic) for _ in range(rng.randint(2, 4))]
            ranks = _annotate(rng, [self.gold(prompt, response, task) for response in responses])
        levels = [self.levels(prompt, response, task) for response in responses]
        capability_ranks = {
            point: _ranks([_misread(rng, level[point], slots, point) for level in levels])
            for point, slots in points_of(task).items()
        }
        return PreferenceRow(prompt, responses, ranks, task, capability_ranks)

    # Calibration

    def statistics(self, rows: Sequence[PreferenceRow]) -> dict:
        """
        What `recipes/demo/WORLD.md` states about the rows. Shares of pairs of responses of one prompt:

        - `annotator_agreement`: two annotators order it alike, of the pairs that both order (20 simulated pairs of them);
        - `ceiling`: gold orders it as `ranks` do, of the pairs that `ranks` order;
        - `length_only`: so does the number of characters (a tie counts half);
        - `ties`: `ranks` do not order it;
        - `repeated`: share of the responses that say a clause twice;
        - `judge`: point -> `agreement` with the order of the levels (of the pairs that both order), `labelled` (ordered by
          the judge, of those that the levels order) and `tied` (of those whose levels are equal).
        """
        rng = random.Random(f"statistics of world {self.seed}")
        agreed, ceiling, length, tied, repeated = [], [], [], [], []
        judge = {point: ([], [], []) for point in _ALL_POINTS}
        for row in rows:
            golds = [self.gold(row.prompt, response, row.task) for response in row.responses]
            levels = [self.levels(row.prompt, response, row.task) for response in row.responses]
            lengths = [len(response) for response in row.responses]
            repeated += [len(clauses) > len(set(clauses)) for clauses in map(clauses_of, row.responses)]
            annotators = [(_annotate(rng, golds), _annotate(rng, golds)) for _ in range(20)]
            pairs = {point: set(row.pairs_of(point)) for point in row.labelled_points}
            for i, j in itertools.combinations(range(len(golds)), 2):
                label = _sign(row.ranks[j] - row.ranks[i])  # 1 where i is the better
                tied.append(label == 0)
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
            "ties": _mean(tied),
            "repeated": _mean(repeated),
            "judge": {
                point: dict(zip(("agreement", "labelled", "tied"), map(_mean, counts), strict=True))
                for point, counts in judge.items()
            },
        }


def own_points(task: str) -> list[str]:
    """The capability points that a task's gold reward rests on, in the order of the table."""
    return [point for point, slots in points_of(task).items() if slots == 2]


def _write_prompt(rng: random.Random, task: str, earlier: float = 0.1) -> tuple[list[dict], str]:
    """A prompt and its topic, with an earlier exchange about the topic in a share `earlier` of the cases."""
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


def _write_response(rng: random.Random, task: str, topic: str) -> str:
    """A response about `topic`: every slot of every point a sign or a lapse, some fillers, all shuffled."""
    day = rng.choice(list(LEVELS))
    astray = rng.choice([other for other in TOPICS if other != topic])
    signs, rest = [], rng.sample(FILLERS, rng.randint(0, 4))
    for point, slots in points_of(task).items():
        level = rng.choices(range(slots + 1), LEVELS[day][slots])[0]
        if point in TOPICAL:
            frames = rng.sample(TOPICAL[point], slots)
            signs += [frame.format(topic=topic) for frame in frames[:level]]
            rest += [frame.format(topic=astray) for frame in frames[level:]]
        else:
            pairs = rng.sample(CLAUSES[point], slots)
            signs += [sign for sign, _ in pairs[:level]]
            rest += [lapse for _, lapse in pairs[level:]]
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
    """The ranks of one human annotator."""
    return _ranks([gold + rng.gauss(0, ANNOTATOR_NOISE) for gold in golds], ANNOTATOR_TIE)


def _misread(rng: random.Random, level: int, slots: int, point: str) -> int:
    """The level that the judge reads: now and then the opposite one."""
    easiest, hardest = MISREAD[slots]
    probability = easiest + (hardest - easiest) * _ALL_POINTS.index(point) / (len(_ALL_POINTS) - 1)
    if rng.random() >= probability:
        return level
    return rng.choice((0, slots)) if 2 * level == slots else slots - level


def _ranks(scores: Sequence[float], tie: float = 0.0) -> list[int]:
    """Ranks (1 is best) of scores (more is better); neighbours that are no more than `tie` apart share a rank."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranks = [1] * len(scores)
    for better, worse in itertools.pairwise(order):
        ranks[worse] = ranks[better] + (scores[better] - scores[worse] > tie)
    return ranks


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def world_gold(*, prompt: list[dict], response: str, task: str, **_: object) -> float:
    """[`World.gold`] as a recipe's `gold: module:function` takes it, for rows with `task`; it is the same in every world."""
    return World().gold(prompt, response, task)
