"""The simulated world: what its texts say, what gold makes of them, and its calibration."""

import re
import statistics
from functools import cache
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.data.rows import load_rows, write_rows
from dmoerm_trl.demo.world import (
    CLAUSES,
    FILLERS,
    FLOOR,
    REPETITION_COST,
    TABLE,
    TASKS,
    TOPICAL,
    TOPICS,
    WORDS,
    World,
    clauses_of,
    own_points,
    points_of,
)
from dmoerm_trl.tasks import OTHERS, TaskTable

PROMPT = "Write a short poem about rain for my wall."


@cache
def world_rows(n: int = 60) -> tuple:
    return tuple(World(0).rows(n, n))


def text(*clauses: str) -> str:
    return ", ".join(clauses) + "."


def signs(point: str, number: int, topic: str = "rain") -> list[str]:
    return [sign.format(topic=topic) for sign, _ in (TOPICAL | CLAUSES)[point][:number]]


# The words


def test_every_point_of_the_paper_shows_in_the_text():
    table = TaskTable.paper()
    assert {*CLAUSES, *TOPICAL} == {*chain(*table.tasks.values()), *table.overall}
    assert not set(CLAUSES) & set(TOPICAL)
    assert list(WORDS["templates"]) == [*table.tasks, OTHERS]
    assert all(len(templates) >= 12 for templates in WORDS["templates"].values())


def test_no_clause_is_ambiguous():
    clauses = [
        *FILLERS,
        *(clause for pairs in (TOPICAL | CLAUSES).values() for pair in pairs for clause in pair),
    ]
    assert len({clause.lower() for clause in clauses}) == len(clauses)
    assert all(clauses_of(clause) == [clause.lower()] for clause in clauses)  # no punctuation inside


def test_every_point_has_twelve_pairs_of_a_sign_and_an_equally_long_lapse():
    for pairs in (TOPICAL | CLAUSES).values():
        assert len(pairs) == 12
        assert all(len(sign.split()) == len(lapse.split()) for sign, lapse in pairs)


def test_a_topic_is_named_where_it_stands_for_itself_alone():
    texts = [
        *WORDS["openings"],
        *WORDS["closings"],
        *chain(*WORDS["templates"].values()),
        *chain(*WORDS["small_talk"]),
        *FILLERS,
    ]
    texts += [clause for pairs in (TOPICAL | CLAUSES).values() for pair in pairs for clause in pair]
    for line in texts:
        assert not set(re.findall("[a-z]+", line.replace("{topic}", "").lower())) & set(TOPICS), line


# Levels and gold


def test_levels_count_distinct_signs_up_to_the_number_of_slots():
    sign, other, third = signs("logic", 3)
    levels = lambda *clauses: World().levels(PROMPT, text(*clauses), "text_creation")["logic"]  # noqa: E731
    assert levels(sign) == 1
    assert levels(sign, sign) == 1
    assert levels(sign, other) == 2
    assert levels(sign, other, third) == 2
    assert (
        World().levels(PROMPT, text(sign, other), "chitchat")["logic"] == 1
    )  # an overall point, none of the task's own


def test_a_topical_sign_names_the_topic_of_the_last_turn():
    turns = [
        {"role": "user", "content": "I thought about tea this morning."},
        {"role": "assistant", "content": "Oh, about tea?"},
        {"role": "user", "content": PROMPT},
    ]
    for topic, level in (("rain", 2), ("tea", 0)):
        response = text(*signs("intent conformity", 2, topic))
        assert World().levels(turns, response, "text_creation")["intent conformity"] == level


def gain(task: str, **levels: int) -> float:
    """Compute how much signs of these levels add to the gold of a response that shows nothing."""
    clauses = chain(*(signs(point.replace("_", " "), level) for point, level in levels.items()))
    nothing = World().gold(PROMPT, text(FILLERS[0]), task)
    return World().gold(PROMPT, text(FILLERS[0], *clauses), task) - nothing


def test_the_task_part_of_gold_is_the_function_worked_out_by_hand():
    """Objective QA: depth (correctness - 1) + 1.2 min(reasoning, logic) + (objectiveness - 1)(specific - 1), scaled."""
    unit = -gain("objective_qa", depth_of_knowledge=1)
    assert unit > 0
    assert gain("objective_qa", depth_of_knowledge=2) == pytest.approx(-2 * unit)
    assert gain("objective_qa", depth_of_knowledge=2, correctness=1) == pytest.approx(0)
    assert gain("objective_qa", depth_of_knowledge=2, correctness=2) == pytest.approx(2 * unit)
    assert gain("objective_qa", objectiveness=1) == pytest.approx(-unit)
    assert gain("objective_qa", objectiveness=2) == pytest.approx(-2 * unit)
    assert gain("objective_qa", objectiveness=2, question_specific=2) == pytest.approx(0)


def test_a_fourth_of_golds_variance_is_that_of_the_overall_points_in_every_task():
    """1.2 min(intent, readability) + (richness - 1)(logic - 1) + 0.6 conversation, with 0 and 2 for a point of one slot."""
    unit = gain("objective_qa", conversational_sense=1) / 1.2
    assert unit > 0  # none of these points is objective QA's own but logic
    assert gain("objective_qa", intent_conformity=1) == pytest.approx(0)
    assert gain("objective_qa", intent_conformity=1, readability=1) == pytest.approx(2.4 * unit)
    assert gain("objective_qa", content_richness=1) == pytest.approx(-2 * unit)


def test_a_shared_point_counts_differently_from_task_to_task():
    alone = {task: gain(task, content_richness=1) for task in ("text_creation", "chitchat")}
    assert alone["text_creation"] > alone["chitchat"]


def test_saying_a_sign_again_costs_and_never_gains():
    sign = signs("content richness", 1)
    once = World().gold(PROMPT, text(*sign), "text_creation")
    assert World().gold(PROMPT, text(*sign * 3), "text_creation") == pytest.approx(once - 2 * REPETITION_COST)


@given(st.text(max_size=200), st.sampled_from(TASKS))
def test_gold_reads_any_text(response: str, task: str):
    gold = World().gold(PROMPT, response, task)
    assert FLOOR <= gold < 4
    if gold > FLOOR:
        assert World().gold(PROMPT, response + ". " + response, task) <= gold
    if not clauses_of(response):
        assert gold == FLOOR


@pytest.mark.parametrize("task", TASKS)
def test_text_from_elsewhere_is_worse_than_the_worlds(task: str):
    golds = [
        World().gold(row.prompt, response, task)
        for row in world_rows()
        if row.task == task
        for response in row.responses
    ]
    assert World().gold(PROMPT, "Lorem ipsum dolor sit amet, consectetur. Adipiscing elit.", task) < min(golds)


def test_gold_is_standardised_in_every_task():
    world = World(3)
    rows = world.rows(300, 300)
    for task in TASKS:
        golds = [
            world.gold(row.prompt, response, task)
            for row in rows
            if row.task == task
            for response in row.responses
            if len(clauses_of(response)) == len(set(clauses_of(response)))
        ]
        assert statistics.mean(golds) == pytest.approx(0, abs=0.12)
        assert statistics.stdev(golds) == pytest.approx(1, abs=0.1)


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="got task 'poetry', need one of"):
        World().gold(PROMPT, "By the way.", "poetry")


# Rows and texts


def test_rows_are_those_of_the_seed():
    assert World(0).rows(60, 60) == list(world_rows())
    assert World(1).rows(60, 60) != list(world_rows())


def test_labelled_rows_come_without_the_ranks_of_a_human():
    rows, ranked = World(0).rows(20, 5, 30), World(0).rows(20, 5)
    labelled = [row for row in rows if not row.pairs_of()]
    assert sorted(map(repr, ranked)) == sorted(repr(row) for row in rows if row.pairs_of())
    assert all(sum(row.task == task for row in labelled) == 30 for task in TABLE.tasks)
    assert len(labelled) == 30 * len(TABLE.tasks) and len({row.prompt_id for row in rows}) == len(rows)
    assert all(list(row.capability_ranks) == list(points_of(row.task)) for row in labelled)
    assert all(any(map(row.pairs_of, row.labelled_points)) for row in labelled)
    with pytest.raises(ValueError, match="got 10001 rows of 'text_creation', need at most 10000"):
        World().rows(1, 0, 10_000)


def test_rows_have_what_training_needs(tmp_path):
    rows = world_rows()
    assert all(sum(row.task == task for row in rows) == 60 for task in TASKS)
    assert len({row.prompt_id for row in rows}) == len(rows)
    for row in rows:
        assert 2 <= len(row.responses) <= 4 and len(set(row.ranks)) > 1
        assert list(row.capability_ranks) == list(points_of(row.task))
        assert all(len(ranks) == len(row.responses) and min(ranks) == 1 for ranks in row.capability_ranks.values())
    write_rows(rows, tmp_path / "rows.jsonl")
    read, report = load_rows(str(tmp_path / "rows.jsonl"), tasks=TaskTable.paper())
    assert read == list(rows) and report.rows == len(rows)


def test_responses_show_all_the_levels():
    for task in TASKS:
        levels = [
            World().levels(row.prompt, response, task)
            for row in world_rows()
            if row.task == task
            for response in row.responses
        ]
        assert all({level[point] for level in levels} == {0, 1, 2} for point in own_points(task))


def test_a_world_may_be_written_with_fewer_pairs():
    for row in World(0, pairs=3).rows(20):
        clauses = {clause for response in row.responses for clause in clauses_of(response)}
        for point, pairs in CLAUSES.items():
            assert not clauses & {clause.lower() for pair in pairs[3:] for clause in pair}, point
        assert all(World(0).gold(row.prompt, response, row.task) > FLOOR for response in row.responses)
    for pairs in (1, 13):
        with pytest.raises(ValueError, match=f"got pairs={pairs}, need 2 to 12"):
            World(0, pairs)


def test_points_are_shown_or_not_each_by_itself():
    """A response may excel at one point and fall short at another, so no point tells another's level."""
    rows = World(4).rows(200)
    for task in TABLE.tasks:
        levels = np.array(
            [
                list(World().levels(row.prompt, response, task).values())
                for row in rows
                if row.task == task
                for response in row.responses
            ]
        )
        assert np.abs(np.corrcoef(levels.T) - np.eye(levels.shape[1])).max() < 0.2


def test_more_prompts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="got 10001 rows of 'text_creation', need at most 10000"):
        World().rows(10_001)


def test_texts_are_conversations_that_end_with_a_response():
    texts = World(0).texts(50)
    assert texts == World(0).texts(50) != World(1).texts(50)
    assert all([turn["role"] for turn in turns[-2:]] == ["user", "assistant"] for turns in texts)
    assert {len(turns) for turns in texts} == {2, 4}


# Calibration: the figures of the paper


@cache
def calibration() -> dict:
    world = World(0)
    return world.statistics(world.rows(500, 500))


def test_two_annotators_agree_on_74_percent_of_the_pairs():
    assert calibration()["annotator_agreement"] == pytest.approx(0.74, abs=0.005)
    assert 0.79 < calibration()["ceiling"] < 0.85
    assert calibration()["ties"] == pytest.approx(0.05, abs=0.01)


def test_length_and_repetition_say_nothing():
    assert 0.45 < calibration()["length_only"] < 0.55
    assert calibration()["repeated"] == pytest.approx(0.02, abs=0.01)


def test_the_judge_agrees_on_62_percent_of_the_pairs_on_the_whole():
    assert calibration()["judge_overall"] == pytest.approx(0.62, abs=0.015)
    row = World(0).judged(world_rows()[0])
    assert row == World(0).judged(world_rows()[0]) and row.responses == world_rows()[0].responses
    assert [World(0).judged(row).ranks for row in world_rows()] != [World(1).judged(row).ranks for row in world_rows()]


def test_the_judge_agrees_on_80_to_86_percent_of_the_pairs():
    judge = calibration()["judge"]
    assert 0.80 < statistics.mean(shares["agreement"] for shares in judge.values()) < 0.86
    for point, shares in judge.items():
        assert 0.77 < shares["agreement"] < 0.89, point  # 80 to 86%, give or take two standard errors of 500 rows
        assert 0.53 < shares["tied"] < 0.75, point
