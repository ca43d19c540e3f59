"""Weak labels: the better text wins at each point, any text gets a number, and ranks keep ties within the tolerance."""

import asyncio
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import TrlParser

from dmoerm_trl.labelling.heuristics import WEAK_POINTS, weak, weak_ranks
from dmoerm_trl.labelling.judges import Question, judge_from_config
from dmoerm_trl.tasks import TaskTable
from dmoerm_trl.training.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "real_text"
PROMPT = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi. What is it?"},
    {"role": "user", "content": "How do bees find their way home?"},
]

BETTER_AND_WORSE = {
    "readability": (
        "Bees use the sun. They know where it stands. So they find the way home.",
        "Navigational capabilities of honeybees presumably incorporate polarisation perception, landmark "
        "recognition, and continuous integration of distances travelled.",
    ),
    "content richness": (
        "Bees use the sun, the light of the sky, smells, and what they remember of trees and hills.",
        "Bees use the sun, the sun, the sun, the sun, and the sun, and then they use the sun again.",
    ),
    "question specific": ("Bees find their home by the sun.", "Ants follow a trail of scent."),
    "conversational sense": ("I like that you ask me this!", "Bees navigate by the sun."),
    "proactivity": ("By the sun. Do you keep bees? What kind?", "By the sun. They see it. It moves."),
    "lexical variety": ("Bees look for the sun and smell their nest.", "Bees fly and fly and fly and bees fly home."),
    "conciseness": (
        "Bees use the sun.",
        "Well, as to bees, well, bees, as you know, well, they use, as you know, the sun.",
    ),
    "structure": ("Bees use:\n\n1. the sun\n2. smells\n- and landmarks", "Bees use the sun, smells, and landmarks."),
}


@pytest.mark.parametrize("point", WEAK_POINTS)
def test_the_better_text_wins(point):
    better, worse = (WEAK_POINTS[point](prompt=PROMPT, response=text) for text in BETTER_AND_WORSE[point])
    assert better > worse
    assert weak_ranks(PROMPT, BETTER_AND_WORSE[point], point) == [1, 2]


@pytest.mark.parametrize(
    ("point", "better", "worse"),
    [
        (
            "readability",
            "蜜蜂看太阳。它们认路。它们回家。",
            "蜜蜂看着太阳并且记住一路上的树木和山丘然后沿着这条路飞回家里",
        ),
        ("question specific", "蜜蜂回家靠太阳。", "蚂蚁闻气味。"),
        ("conversational sense", "我想你会喜欢。", "蜜蜂看太阳。"),
        ("proactivity", "看太阳。你养蜜蜂吗？", "看太阳。然后回家。"),
        ("content richness", "太阳、气味、树木和山丘", "太阳太阳太阳太阳太阳"),
    ],
)
def test_the_better_chinese_text_wins(point, better, worse):
    assert weak_ranks("蜜蜂怎么回家？", [worse, better], point) == [2, 1]


# Numbers worked out by hand.


@pytest.mark.parametrize(
    ("point", "response", "value"),
    [
        (
            "readability",
            "The yellow bee sees. Signals help.",
            100 - (6 / 2 + 100 * 1 / 6),
        ),  # "signals" has seven letters
        ("content richness", "a b c, A b c c", 2.0),  # log2(1 + 3)
        ("lexical variety", "one two one", 2 / 3),
        ("lexical variety", " ".join(["w"] * 50 + ["x"]), (1 / 50 + 2 / 50) / 2),  # two windows of 50 words
        ("conciseness", "the bee, the sun", 3 / 4),
        ("structure", "So:\n- one\n- two", math.log2(1 + 3 + 2)),
        ("question specific", "They find the way.", 2 / 7),  # of how, do, bees, find, their, way, home
        ("conversational sense", "I see you, bee", 2 / 4),
        ("proactivity", "Yes. Why? How?", 2 / 3),
    ],
)
def test_by_hand(point, response, value):
    assert WEAK_POINTS[point](prompt=PROMPT, response=response) == pytest.approx(value)


def test_long_words_and_sentences_are_no_worse_than_the_worst():
    assert WEAK_POINTS["readability"](prompt="", response="incomprehensibilities " * 300) == 0


def test_only_the_last_turn_is_the_question():
    assert WEAK_POINTS["question specific"](prompt=PROMPT, response="Hello! Hi. What is it?") == 0
    assert WEAK_POINTS["question specific"](prompt=PROMPT[-1]["content"], response="bees") == 1 / 7


# Any text.


@pytest.mark.parametrize("point", WEAK_POINTS)
@pytest.mark.parametrize("prompt", ["", "Why?", PROMPT])
@pytest.mark.parametrize(
    "response", ["", " \n", "?!", "Yes", "🙂", "是的。", "def f(x):\n    return x ** 2\n", "- \n- \n#", "a" * 5000]
)
def test_any_text_has_a_number_and_text_without_a_word_the_worst(point, prompt, response):
    value = WEAK_POINTS[point](prompt=prompt, response=response, task=None, point=point)
    assert isinstance(value, float) and math.isfinite(value) and value >= 0
    if response in ("", " \n", "?!", "🙂", "- \n- \n#"):
        assert value == 0


@given(st.text(), st.text(), st.sampled_from(sorted(WEAK_POINTS)))
def test_any_unicode_has_a_finite_number(prompt, response, point):
    value = WEAK_POINTS[point](prompt=prompt, response=response)
    assert math.isfinite(value) and value >= 0


# Ranks.


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.sampled_from(sorted(WEAK_POINTS)))
def test_ranks_follow_the_scores(responses, point):
    scores = [WEAK_POINTS[point](prompt="", response=response) for response in responses]
    ranks = weak_ranks("", responses, point, tolerance=0)
    assert ranks == [1 + sum(other > score for other in scores) for score in scores]


def test_scores_within_the_tolerance_tie():
    responses = [" ".join(["w"] * count + [f"v{i}" for i in range(20 - count)]) for count in (1, 2, 11, 20)]
    # shares of different words 20/20, 19/20, 10/20, 1/20; their standard deviation is 0.39
    assert weak_ranks("", responses, "conciseness", tolerance=0) == [1, 2, 3, 4]
    assert weak_ranks("", responses, "conciseness") == [1, 2, 3, 4]
    assert weak_ranks("", responses, "conciseness", tolerance=0.15) == [1, 1, 3, 4]
    assert weak_ranks("", responses, "conciseness", tolerance=1.3) == [1, 1, 1, 4]  # 1/20 is too far from the best


@pytest.mark.parametrize("point", ["logic", None])
def test_a_point_without_a_function_is_an_error(point):
    for judge in (lambda: weak_ranks("", ["a", "b"], point), lambda: weak(prompt="", response="a", point=point)):
        with pytest.raises(ValueError, match=f"got the point {point!r}, need one of .*readability.* ask a judge"):
            judge()


# All points by one function, as a judge.


def test_one_judge_for_all_points():
    judge = judge_from_config({"kind": "function", "function": "dmoerm_trl.labelling.heuristics:weak"})
    questions = [Question(PROMPT, *BETTER_AND_WORSE[point], point, "chitchat") for point in WEAK_POINTS]
    same = Question(PROMPT, "By the sun.", "By the sun!", "structure", None)
    answers = asyncio.run(judge.ask([*questions, same]))
    assert [answer.choice for answer in answers] == [1] * len(WEAK_POINTS) + [None]


# The recipe.


def test_the_task_tables_are_the_papers_tasks_with_points_that_have_labels():
    """Of the first all points have a function, and each function a point."""
    tables = [
        TaskTable.load(str(path))
        for path in (RECIPES.parent / "label" / "tasks" / "weak.yaml", RECIPES / "tasks.yaml")
    ]
    weak_points, points = ({p for of_task in [*t.tasks.values(), t.overall] for p in of_task} for t in tables)
    assert all(list(table.tasks) == [*TaskTable.paper().tasks, "general"] for table in tables)
    assert weak_points == set(WEAK_POINTS)
    of_sources = {"source strength", "source strength at equal length"}
    assert points <= {*WEAK_POINTS, *of_sources}
    assert all(of_sources < set(of_task) for of_task in [*tables[1].tasks.values(), tables[1].overall])


def test_the_recipe_is_one_of_dmoerm_train():
    parser = TrlParser((Recipe,))
    arguments = ["--config", str(RECIPES / "train.yaml"), "--tasks", str(RECIPES / "tasks.yaml")]
    (recipe,) = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    assert recipe.share_base and recipe.lora_target_modules == ["query", "value"]
    assert recipe.task_table.overall == ("lexical variety", "source strength", "source strength at equal length")
