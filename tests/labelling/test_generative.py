"""The generative baseline: a judge as a row of the consistency table."""

import pytest
from scripted import ScriptedJudge, longer, row

from dmoerm_trl.evaluation.table import consistency_table
from dmoerm_trl.labelling.generative import generative_verdicts
from dmoerm_trl.labelling.judges import JudgeError, Question, judge_from_config


class SamplingJudge(ScriptedJudge):
    """One whose function may read the round."""

    samples = True


def first(question: Question) -> int:
    return 1


def test_pairs_won_are_the_scores():
    verdicts = generative_verdicts(SamplingJudge(longer), [row("aaa", "a"), row("a", "aaaa", "aa", "aaa")])
    assert verdicts.scores == [[1, 0], [0, 3, 1, 2]]
    assert (verdicts.pairs, verdicts.undecided) == (7, 0)


def test_a_pair_on_which_the_orders_disagree_is_half_a_win():
    verdicts = generative_verdicts(SamplingJudge(first), [row("aaa", "a"), row("a", "aa", "aaa")])
    assert verdicts.scores == [[0.5, 0.5], [1, 1, 1]]
    assert str(verdicts) == "4 pairs, 4 of them undecided"


def test_what_cannot_be_read_is_undecided():
    verdicts = generative_verdicts(
        SamplingJudge(lambda question: 1 if question.first == "a" else None), [row("a", "b")]
    )
    assert verdicts.scores == [[0.5, 0.5]]


def test_the_table_takes_the_scores_as_a_method():
    rows = [row("aaa", "a"), row("a", "bbb", prompt="And?"), row("x", "y", prompt="Or?")]
    judge = SamplingJudge(lambda question: longer(question) or 1)  # of equal lengths the first, whichever that is
    table = consistency_table({"judge": generative_verdicts(judge, rows).scores}, rows, ["maths"])
    assert table.cells["judge"]["maths"].mean == pytest.approx((1 + 0 + 0.5) / 3)


def test_a_text_twice_in_a_row_is_asked_once_and_scored_alike():
    judge = SamplingJudge(longer)
    assert generative_verdicts(judge, [row("aa", "a", "aa")]).scores == [[1, 0, 1]]
    assert len(judge.asked) == 2


def test_a_pair_is_asked_anew_until_the_orders_agree():
    judge = SamplingJudge(lambda question: longer(question) if question.round == 2 else 1)
    verdicts = generative_verdicts(judge, [row("aaa", "a")], max_rounds=5)
    assert verdicts.scores == [[1, 0]]
    asked = [(question.round, question.first, question.second) for question in judge.asked]
    assert asked == [(number, *pair) for number in range(3) for pair in (("aaa", "a"), ("a", "aaa"))]
    assert {question.point for question in judge.asked} == {None}


def test_rounds_end():
    judge = SamplingJudge(first)
    assert generative_verdicts(judge, [row("aaa", "a")], max_rounds=3).undecided == 1
    assert len(judge.asked) == 6


def test_rounds_need_a_judge_that_may_answer_otherwise():
    with pytest.raises(ValueError, match="got max_rounds=2, need 1, or more with a judge that samples"):
        generative_verdicts(ScriptedJudge(longer), [row("aaa", "a")], max_rounds=2)


def test_a_file_of_answers_is_gone_on_from(tmp_path):
    rows = [row("a" * count, "a", prompt=f"{count}?") for count in range(2, 22)]

    def gone(question: Question) -> int | Exception:
        return JudgeError("server gone") if question.prompt[0]["content"] == "12?" else longer(question)

    before, after = SamplingJudge(gone), SamplingJudge(longer)
    with pytest.raises(JudgeError, match=r"server gone\. \d+ of 20 rows are judged"):
        generative_verdicts(before, rows, answers=tmp_path / "answers.sqlite")
    verdicts = generative_verdicts(after, rows, answers=tmp_path / "answers.sqlite")
    assert verdicts.scores == [[1, 0]] * 20
    assert 0 < len(after.asked) < 40


@pytest.mark.parametrize("example", [None, "en"])
def test_zero_shot_and_one_shot_over_a_server(serve, example):
    server = serve("longer")
    settings = {"kind": "server", "base_url": server.url, "model": "judge", "api_key_env": None, "example": example}
    judge = judge_from_config({**settings, "temperature": 0.7, "seed": 0})
    assert generative_verdicts(judge, [row("long enough", "short")], max_rounds=2).scores == [[1, 0]]
    assert [len(request["messages"]) for request in server.requests] == [1 if example is None else 3] * 2
    assert {request["seed"] for request in server.requests} == {0}
