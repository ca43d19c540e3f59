"""The generative baseline: a judge as a row of the consistency table."""

import signal

import pytest
from scripted import ScriptedJudge, longer, row

from dmoerm_trl.evaluation.table import consistency_table
from dmoerm_trl.labelling.answer_store import AnswerStore
from dmoerm_trl.labelling.generative import generative_verdicts
from dmoerm_trl.labelling.judges import JudgeError, Question, Tie, judge_from_config


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
    assert str(verdicts) == "4 pairs, 4 of them undecided; 8 answers, 0 unreadable"


def test_what_cannot_be_read_is_undecided():
    judge = SamplingJudge(lambda question: 1 if question.first == "a" else None)
    verdicts = generative_verdicts(judge, [row("a", "b")], max_rounds=3)
    assert verdicts.scores == [[0.5, 0.5]]
    assert (verdicts.answers, verdicts.unreadable) == (6, 3)


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


class FaltersOnce(SamplingJudge):
    """Takes its time, for each question more, but at the sixth says at once that it is gone, or has Ctrl-C pressed."""

    closed = False

    def __init__(self, interrupted: bool):
        super().__init__(concurrency=6)
        self.interrupted = interrupted

    async def ask(self, questions):
        if len(self.asked) == 5:
            if not self.interrupted:
                raise JudgeError("server gone.")
            signal.raise_signal(signal.SIGINT)
        self.seconds += 0.1
        return await super().ask(questions)

    async def close(self):
        self.closed = True


@pytest.mark.parametrize("interrupted, says", [(False, "server gone"), (True, "interrupted")])
@pytest.mark.parametrize("responses, questions", [(2, 2), (9, 72)])
def test_whatever_stops_it_no_answer_is_paid_for_twice(responses, questions, interrupted, says, tmp_path):
    rows = [row(*("a" * length for length in range(responses, 0, -1)), prompt=f"{n}?") for n in range(4)]
    before, after, path = FaltersOnce(interrupted), SamplingJudge(longer), tmp_path / "answers.sqlite"
    with pytest.raises(JudgeError, match=rf"^{says}\. \d+ of 4 rows are judged\.$"):
        generative_verdicts(before, rows, answers=path)
    assert before.closed
    with AnswerStore(path, before.identity) as store:
        assert 5 <= store.spent.calls == len(before.asked) <= 6
    verdicts = generative_verdicts(after, rows, answers=path)
    assert verdicts.scores == [[*range(responses - 1, -1, -1)]] * 4
    assert len(before.asked) + len(after.asked) == 4 * questions == verdicts.answers


@pytest.mark.parametrize(
    "choice, says", [(1, "names the first response"), (2, "names the second"), (None, "cannot be read")]
)
def test_a_judge_that_always_says_the_same_is_found_out_early(choice, says):
    rows = [row("aaa", "a", prompt=f"{number}?") for number in range(200)]
    judge = SamplingJudge(lambda question: choice)
    with pytest.raises(JudgeError, match=f"{says}.*`stop_early: false` goes on"):
        generative_verdicts(judge, rows, max_rounds=5)
    assert len(judge.asked) <= 100
    goes_on = SamplingJudge(lambda question: choice)
    verdicts = generative_verdicts(goes_on, rows, max_rounds=5, stop_early=False)
    assert len(goes_on.asked) == 2000
    assert "Warning: the judge" in str(verdicts) and says in verdicts.fault


def test_rounds_about_hard_pairs_do_not_make_a_fair_judge_look_biased():
    """Of 100 pairs 30 are close: the first is named in 70 + 600 * 2 of 1340 answers, but in 65% of those of the first round."""
    rows = [row("aaa", "a" if number % 10 < 7 else "bbb", prompt=f"{number}?") for number in range(100)]
    verdicts = generative_verdicts(SamplingJudge(lambda question: longer(question) or 1), rows, max_rounds=20)
    assert (verdicts.undecided, verdicts.answers, verdicts.fault) == (30, 1340, None)


@pytest.mark.parametrize("example", [None, "en"])
def test_zero_shot_and_one_shot_over_a_server(serve, example):
    server = serve("longer")
    settings = {"kind": "server", "base_url": server.url, "model": "judge", "api_key_env": None, "example": example}
    judge = judge_from_config({**settings, "temperature": 0.7, "seed": 0})
    assert generative_verdicts(judge, [row("long enough", "short")], max_rounds=2).scores == [[1, 0]]
    assert [len(request["messages"]) for request in server.requests] == [1 if example is None else 3] * 2
    assert {request["seed"] for request in server.requests} == {0}


def test_unreadable_answers_at_which_it_stopped_are_asked_again(tmp_path):
    rows = [row("aaa", "a", prompt=f"{number}?") for number in range(100)]
    with pytest.raises(JudgeError, match="cannot be read.*It said 'None'"):
        generative_verdicts(SamplingJudge(lambda question: None), rows, answers=tmp_path / "a.sqlite")
    judge = SamplingJudge(longer)
    assert generative_verdicts(judge, rows, answers=tmp_path / "a.sqlite").scores == [[1, 0]] * 100
    assert len(judge.asked) == 200


def test_ties_are_undecided_and_not_unreadable():
    class TyingJudge(SamplingJudge):
        async def ask(self, questions):
            return [Tie(None, "scores 1 and 1") for _ in questions]

    verdicts = generative_verdicts(TyingJudge(), [row("aaa", "a")])
    assert (verdicts.undecided, verdicts.unreadable, verdicts.scores) == (1, 0, [[0.5, 0.5]])


def test_failed_requests_are_told(serve):
    server = serve("longer", faults=["500"])
    settings = {"kind": "server", "base_url": server.url, "model": "judge", "api_key_env": None, "first_wait": 0.01}
    verdicts = generative_verdicts(judge_from_config(settings), [row("long enough", "short")])
    assert "failed and were made again: status 500 1" in str(verdicts)
