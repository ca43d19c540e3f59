"""The labeller with judges whose answers are known: what is asked, how often, what it costs, what becomes of it."""

import re
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import TASKS, ScriptedJudge, longer, noisy, row

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.data.rows import load_rows
from dmoerm_trl.labelling.answer_store import AnswerStore
from dmoerm_trl.labelling.budget import Budget, Prices
from dmoerm_trl.labelling.comparisons import Plan
from dmoerm_trl.labelling.judges import JudgeError, Question
from dmoerm_trl.labelling.labeller import Labeller
from dmoerm_trl.labelling.report import Report

ROWS = [
    row("aaaa", "bb", "c", "ddd", task="chitchat", prompt="Who are you?"),
    row("aaaa", "bb", task="maths"),
    row("a", "bb", "ccc", task="others", prompt="And now?"),
]
QUESTIONS = 2 * (2 * 6 + 1 + 2 * 3)


def labeller(rows, judge=None, *, budget=None, path=":memory:", stop_early=False, again=False, **plan) -> Labeller:
    judge = judge or ScriptedJudge()
    answers = AnswerStore(path, judge.identity, forget_unreadable=again)
    return Labeller(lambda: rows, Plan(TASKS, **plan), judge, answers, budget, stop_early=stop_early)


def written(labelling: Labeller, folder: Path) -> tuple[list[PreferenceRow], Report]:
    report = labelling.write(folder / "labelled.jsonl")
    return load_rows(folder / "labelled.jsonl", tasks=TASKS)[0], report


def texts(question: Question) -> tuple[str, str, str]:
    return question.point, question.first, question.second


# Which questions, and the labels.


def test_each_pair_is_asked_about_in_both_orders_at_each_point_of_the_task():
    judge = ScriptedJudge()
    assert labeller([ROWS[0], ROWS[2]], judge).ask() is None
    expected = [
        (point, first, second)
        for points, responses in (
            (("empathy ability", "logic"), ("aaaa", "bb", "c", "ddd")),
            (("logic", "readability"), ("a", "bb", "ccc")),
        )
        for point in points
        for pair in combinations(responses, 2)
        for first, second in (pair, pair[::-1])
    ]
    assert sorted(map(texts, judge.asked)) == sorted(expected)
    assert {question.task for question in judge.asked} == {"chitchat", "others"}


def test_a_label_is_kept_where_both_answers_agree(tmp_path):
    """Of a, b and c: both prefer b to a; both name position 1 for a and c; one answer for b and c cannot be read."""
    choices = {("a", "b"): 2, ("b", "a"): 1, ("a", "c"): 1, ("c", "a"): 1, ("b", "c"): 1, ("c", "b"): None}
    judge = ScriptedJudge(lambda question: choices[question.first, question.second])
    labelling = labeller([row("a", "b", "c")], judge)
    labelling.ask()
    (labelled,), report = written(labelling, tmp_path)
    assert labelled == row("a", "b", "c", capability_pairs={"correctness": [[1, 0]]})
    tally = report.points["maths", "correctness"]
    assert (tally.pairs, tally.agreed, tally.disagreed, tally.unreadable) == (3, 1, 1, 1)
    assert (tally.answers_first, tally.readable_answers) == (3, 4)
    assert (tally.ranked, tally.as_ranked) == (1, 0)  # the ranks have a before b
    assert report.spent == (6, 12, 6)


def test_rows_keep_what_they_have_and_those_without_labels_are_kept(tmp_path):
    rows = [
        row("aa", "b", task="chitchat", capability_ranks={"logic": [2, 1]}),
        row("aa", "b", task="chitchat", prompt="Again?", capability_pairs={"logic": [[1, 0]]}),
        row("a", "b", task="maths"),  # of equal length: no label
    ]
    labelling = labeller(rows)
    assert labelling.estimate().labelled == 2
    labelling.ask()
    labelled, report = written(labelling, tmp_path)
    assert labelled == [
        replace(rows[0], capability_pairs={"empathy ability": [[0, 1]]}),
        replace(rows[1], capability_pairs={"logic": [[1, 0]], "empathy ability": [[0, 1]]}),
        rows[2],
    ]
    assert list(report.points) == [("chitchat", "empathy ability"), ("maths", "correctness")]


def test_the_same_question_is_asked_once_and_labels_every_row(tmp_path):
    judge = ScriptedJudge(seconds=0.001)
    rows = [row("aa", "b"), row("b", "aa"), row("aa", "b", "b")]
    labelling = labeller(rows, judge)
    assert labelling.estimate().calls == labelling.estimate().questions == 2
    labelling.ask()
    assert len(judge.asked) == 2
    labelling.write(tmp_path / "labelled.jsonl")
    labels = [labelled.capability_pairs for labelled in labelling.labelled(Report())]
    assert labels == [{"correctness": [[0, 1]]}, {"correctness": [[1, 0]]}, {"correctness": [[0, 1]]}]


def test_a_judge_that_is_not_transitive_is_written_down_as_it_is(tmp_path):
    wins = {("a", "b"), ("b", "c"), ("c", "a")}
    judge = ScriptedJudge(lambda question: 1 if (question.first, question.second) in wins else 2)
    labelling = labeller([row("a", "b", "c")], judge)
    labelling.ask()
    (labelled,), _ = written(labelling, tmp_path)
    assert labelled.capability_pairs == {"correctness": [[0, 1], [2, 0], [1, 2]]}


def test_what_a_stopped_run_paid_for_is_reported(tmp_path):
    """Ten of the twelve questions of a row: the five pairs are in the report, though the row is not written."""
    labelling = labeller([row("aaaa", "bb", "c", "ddd")], ScriptedJudge(concurrency=1), budget=Budget(max_calls=10))
    labelling.ask()
    rows, report = written(labelling, tmp_path)
    assert (rows, report.rows, report.incomplete) == ([], 0, 1)
    assert report.total.pairs == report.total.agreed == 5


# At most so many pairs of a prompt.

OF_ONE_PROMPT = [row("aa", "b"), row("aa", "c"), row("b", "ccc", "dddd", task="others"), row("eee", "ff")]


@pytest.mark.parametrize(
    "limit, pairs",  # of the rows at correctness, of the third at logic and readability: the first rows take the pairs
    [(1, [1, 0, 2, 0]), (2, [1, 1, 4, 0]), (3, [1, 1, 6, 1]), (9, [1, 1, 6, 1])],
)
def test_max_pairs_counts_by_prompt_and_point(limit, pairs, tmp_path):
    judge = ScriptedJudge()
    rows = [*OF_ONE_PROMPT, row("aa", "b", prompt="And how many?")]
    labelling = labeller(rows, judge, max_pairs=limit, path=tmp_path / "a.sqlite", budget=Budget(max_calls=3))
    assert labelling.estimate().calls == 2 * (sum(pairs) + 1)
    labelling.ask()
    labelling.answers.close()
    labelling = labeller(rows, judge, max_pairs=limit, path=tmp_path / "a.sqlite")
    labelling.ask()
    assert len(judge.asked) == 2 * (sum(pairs) + 1)
    labelled, report = written(labelling, tmp_path)
    assert [sum(map(len, row.capability_pairs.values())) for row in labelled] == [*pairs, 1]
    assert report.incomplete == 0


# Sorting.


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=8), min_size=1, max_size=4), st.integers(0, 3))
def test_a_sort_asks_no_more_than_counted_and_labels_only_what_was_asked(lengths, seed):
    rows = [row(*("x" * length for length in of_row), prompt=f"{number}") for number, of_row in enumerate(lengths)]
    judge, every = ScriptedJudge(), ScriptedJudge()
    sorting, all_pairs = labeller(rows, judge, order="sort", seed=seed), labeller(rows, every)
    counted = sorting.estimate()
    sorting.ask()
    all_pairs.ask()
    assert len(judge.asked) <= counted.calls <= all_pairs.estimate().questions
    asked = {(question.prompt[0]["content"], question.first, question.second) for question in judge.asked}
    for mine, theirs in zip(sorting.labelled(Report()), all_pairs.labelled(Report()), strict=True):
        for better, worse in mine.pairs_of("correctness"):
            assert (better, worse) in theirs.pairs_of("correctness")
            assert (mine.prompt[0]["content"], mine.responses[better], mine.responses[worse]) in asked
        if len({*mine.responses}) == len(mine.responses):
            order = sorted(range(len(mine.responses)), key=lambda index: -len(mine.responses[index]))
            assert {*zip(order, order[1:], strict=False)} <= {*mine.pairs_of("correctness")}


def test_a_sort_of_many_asks_a_fraction():
    judge = ScriptedJudge()
    labelling = labeller([row(*("x" * length for length in range(1, 13)))], judge, order="sort")
    assert labelling.estimate().calls == 2 * 33
    labelling.ask()
    assert len(judge.asked) <= 2 * 33 < 2 * 66
    assert labelling.estimate().calls == 0


def test_a_sort_goes_on_where_it_was(tmp_path):
    rows = [row(*("x" * length for length in range(1, 9)), prompt=f"{number}") for number in range(3)]
    judge = ScriptedJudge(noisy)
    whole = labeller(rows, judge, order="sort")
    whole.ask()
    again = ScriptedJudge(noisy)
    for calls in range(1, 200, 7):
        stopped = labeller(rows, again, order="sort", budget=Budget(calls), path=tmp_path / "a.sqlite")
        reason = stopped.ask()
        counted = stopped.estimate().calls
        stopped.answers.close()
        assert counted >= len(judge.asked) - len(again.asked)
    assert reason is None
    assert Counter(map(repr, again.asked)) == Counter(map(repr, judge.asked))


# Estimates.


@pytest.mark.parametrize("plan", [{}, {"max_pairs": 2}, {"overall_points": True}, {"points": ["logic"]}])
def test_the_estimate_is_what_is_asked(plan):
    judge = ScriptedJudge()
    labelling = labeller(ROWS, judge, **plan)
    estimate = labelling.estimate()
    assert judge.asked == []
    assert estimate.calls == estimate.questions
    labelling.ask()
    spent = labelling.answers.spent
    assert (estimate.rows, estimate.calls) == (3, len(judge.asked))
    assert (estimate.prompt_tokens, estimate.completion_tokens) == (
        2 * spent.prompt_tokens,
        2 * spent.completion_tokens,
    )
    after = labelling.estimate()
    assert (after.questions, after.calls, after.prompt_tokens) == (estimate.questions, 0, 0)


def test_the_estimate_in_words():
    estimate = labeller(ROWS).estimate()
    assert estimate.to_text(Prices(10_000, 20_000)) == (
        "3 rows, 38 questions, 38 of them still to be asked; 152 tokens of questions and at most 76 of answers; "
        "at most 3.04 to pay"
    )


# Budgets.


@pytest.mark.parametrize("batch_size", [1, 5])
def test_calls_end_exactly_at_the_budget_and_go_on_from_there(batch_size, tmp_path):
    judge = ScriptedJudge(batch_size=batch_size)
    first = labeller(ROWS, judge, budget=Budget(max_calls=26), path=tmp_path / "a.sqlite")
    assert "max_calls above 26: raise it to go on" in first.ask()
    assert len(judge.asked) == first.answers.spent.calls == 26
    rows, report = written(first, tmp_path)
    assert report.rows == len(rows) == 3 - report.incomplete in (1, 2) and rows[0].prompt == ROWS[0].prompt
    first.answers.close()
    again = labeller(ROWS, judge, budget=Budget(max_calls=QUESTIONS), path=tmp_path / "a.sqlite")
    assert again.ask() is None
    assert len(judge.asked) == len({*map(repr, judge.asked)}) == QUESTIONS
    assert written(again, tmp_path)[1].incomplete == 0


@pytest.mark.parametrize(
    "budget, spent_tokens",
    [
        (Budget(max_tokens=40), 39),  # a question takes 2 + 1 tokens; at its dearest it may take 4 + 2
        (Budget(max_cost=0.04, prices=Prices(1000, 1000)), 39),
        (Budget(max_cost=0.04, prices=Prices(0, 4000)), 30),
    ],
)
def test_tokens_and_cost_never_pass_the_budget_and_come_as_near_as_they_can(budget, spent_tokens):
    """One more question could be too dear, but as long as others are under way they may turn out cheaper."""
    judge = ScriptedJudge(concurrency=7, seconds=0.001)
    labelling = labeller(ROWS, judge, budget=budget)
    reason = labelling.ask()
    spent = labelling.answers.spent
    limit = 40 if budget.prices is None or budget.prices.prompt else 30
    assert limit - 6 < spent.prompt_tokens + spent.completion_tokens <= spent_tokens <= limit
    assert "raise it to go on" in reason


def test_without_a_budget_for_calls_nothing_is_asked():
    judge = ScriptedJudge()
    labelling = labeller(ROWS, judge, budget=Budget(max_calls=0))
    assert "max_calls above 0" in labelling.ask()
    assert judge.asked == []


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"max_cost": 3.0}, "`max_cost`: got 3.0 without prices, need `price_per_million_prompt_tokens`"),
        ({"max_calls": -1}, "`max_calls`: got -1"),
    ],
)
def test_budgets_that_make_no_sense_are_errors(settings, says):
    with pytest.raises(ValueError, match=says):
        Budget(**settings)
    with pytest.raises(ValueError, match="prices 1.0 and -2.0"):
        Prices(1.0, -2.0)


@pytest.mark.parametrize("limit", ["max_calls", "max_tokens", "max_cost"])
def test_a_limit_that_is_no_number_is_an_error(limit):
    """No number is above NaN: it would be no limit."""
    with pytest.raises(ValueError, match=f"`{limit}`: got nan"):
        Budget(**{limit: float("nan")}, prices=Prices(1, 1))
    for price in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="got the prices"):
            Prices(price, 1.0)


# Stopping.

MANY = [row("aa", "b", prompt=f"Number {number}?") for number in range(300)]


@pytest.mark.parametrize("order", ["all", "sort"])
@pytest.mark.parametrize(
    "choice, says", [(1, "names the first response"), (2, "names the second"), (None, "cannot be read")]
)
def test_a_judge_that_always_says_the_same_is_found_out_early(choice, says, order):
    judge = ScriptedJudge(lambda question: choice)
    assert says in (reason := labeller(MANY, judge, stop_early=True, order=order).ask())
    assert "`stop_early: false` goes on" in reason
    assert len(judge.asked) <= 100
    goes_on = ScriptedJudge(lambda question: choice)
    assert labeller(MANY, goes_on, order=order).ask() is None
    assert len(goes_on.asked) == 600


def test_a_biased_judge_is_found_out_within_one_row():
    judge = ScriptedJudge(lambda question: 1, seconds=0.002)
    labelling = labeller([row(*("x" * length for length in range(1, 13)))], judge, stop_early=True)
    assert "names the first response, whatever it is, in 50 of 50 answers" in labelling.ask()
    assert len(judge.asked) <= 50 + 2 * judge.concurrency


def test_a_biased_judge_is_found_out_before_anything_is_asked_again(tmp_path):
    judge = ScriptedJudge(lambda question: 1)
    for _ in range(2):
        labelling = labeller(MANY, judge, stop_early=True, path=tmp_path / "a.sqlite")
        assert "names the first response" in labelling.ask()
        asked = len(judge.asked)
        labelling.answers.close()
    assert asked == len(judge.asked) <= 100


def test_a_fair_judge_of_rows_with_the_better_response_first_is_not_stopped():
    judge = ScriptedJudge()
    assert labeller(MANY, judge, stop_early=True).ask() is None
    assert len(judge.asked) == 600


def test_what_was_answered_before_a_judge_was_gone_is_not_asked_again(tmp_path):
    gone = JudgeError("server gone: go on later")
    first = ScriptedJudge(lambda question: gone if len(first.asked) > 100 else longer(question), concurrency=3)
    labelling = labeller(MANY, first, path=tmp_path / "a.sqlite")
    assert labelling.ask() == "server gone: go on later"
    answered = labelling.answers.spent.calls
    assert 98 <= answered <= 100
    labelling.answers.close()
    second = ScriptedJudge()
    labelling = labeller(MANY, second, path=tmp_path / "a.sqlite")
    assert labelling.ask() is None
    assert len(second.asked) == 600 - answered
    assert written(labelling, tmp_path)[1].rows == 300


@pytest.mark.parametrize("error", [KeyError("score"), OSError("disk full")])
def test_a_fault_of_the_judges_code_is_raised_when_the_answers_are_stored(error):
    judge = ScriptedJudge(lambda question: error if len(judge.asked) > 50 else longer(question), concurrency=3)
    labelling = labeller(MANY, judge)
    with pytest.raises(type(error), match=str(error)):
        labelling.ask()
    assert 48 <= labelling.answers.spent.calls <= 50


@pytest.mark.parametrize("rows", [1, 20])
def test_rows_that_cannot_be_read_any_more_cost_no_answer(rows):
    """The error of the reader comes when what was under way is stored."""
    judge = ScriptedJudge(concurrency=4, seconds=0.02)

    def break_off():
        yield from MANY[:rows]
        raise ValueError("line 7: broken")

    labelling = labeller([], judge)
    labelling.rows = break_off
    with pytest.raises(ValueError, match="line 7: broken"):
        labelling.ask(600)
    assert labelling.answers.spent.calls == len(judge.asked) and (rows == 1 or judge.asked)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_fault_in_counting_costs_no_answer(batch_size):
    def fail():
        raise OSError("settings.json: no space")

    judge = ScriptedJudge(concurrency=1, batch_size=batch_size)
    labelling = labeller(MANY, judge)
    with pytest.raises(OSError, match="no space"):
        labelling.ask(600, fail)
    assert labelling.answers.spent.calls == len(judge.asked) <= 2 * batch_size


def test_a_full_disk_stops_asking_and_keeps_what_was_under_way(monkeypatch):
    judge = ScriptedJudge(concurrency=4, seconds=0.01)
    labelling = labeller(MANY, judge)
    add = labelling.answers.add

    def filling(*given: object) -> None:
        add(*given)
        if labelling.answers.spent.calls > 20:
            labelling.answers.full = "answers.sqlite: the disk is full."

    monkeypatch.setattr(labelling.answers, "add", filling)
    assert labelling.ask() == "answers.sqlite: the disk is full"
    assert 20 < labelling.answers.spent.calls == len(judge.asked) < 30


def test_what_a_judge_said_is_shown_where_it_is_stopped():
    judge = ScriptedJudge(lambda question: None)
    judge.wanted = "one or two"
    reason = labeller(MANY, judge, stop_early=True).ask()
    assert re.search(r"It said 'None' \([0-9]+ times\); wanted: one or two\.", reason)
    bias = labeller(MANY, ScriptedJudge(lambda question: 1), stop_early=True).ask()
    assert re.search(r"It said '1' \([0-9]+ times\)", bias) and "asks again" not in bias


@pytest.mark.parametrize("stop_early", [True, False])
def test_unreadable_answers_of_a_stopped_run_are_asked_again_unless_they_are_taken(stop_early, tmp_path):
    bad = ScriptedJudge(lambda question: None)
    labelling = labeller(MANY, bad, stop_early=True, path=tmp_path / "a.sqlite")
    labelling.ask()
    asked = len(bad.asked)
    labelling.answers.close()
    good = ScriptedJudge()
    labelling = labeller(MANY, good, stop_early=stop_early, path=tmp_path / "a.sqlite")
    assert labelling.estimate().calls == (600 if stop_early else 600 - asked)
    assert labelling.ask() is None
    assert len(good.asked) == (600 if stop_early else 600 - asked)
    assert written(labelling, tmp_path)[1].total.unreadable == (0 if stop_early else asked // 2)


def test_a_judge_that_answers_too_little_is_an_error():
    judge = ScriptedJudge()
    judge.ask = lambda questions, ask=judge.ask: ask(questions[1:])
    with pytest.raises(ValueError, match="shorter"):
        labeller(ROWS, judge).ask()


@pytest.mark.parametrize("again", [False, True])
def test_unreadable_answers_are_asked_again_on_request_only(again, tmp_path):
    judge = ScriptedJudge(lambda question: None)
    labelling = labeller(MANY[:5], judge, path=tmp_path / "a.sqlite")
    labelling.ask()
    assert written(labelling, tmp_path)[1].total.unreadable == 5
    labelling.answers.close()
    better = ScriptedJudge()
    labelling = labeller(MANY[:5], better, path=tmp_path / "a.sqlite", again=again)
    assert labelling.estimate().calls == (10 if again else 0)
    labelling.ask()
    assert len(better.asked) == (10 if again else 0)
    assert written(labelling, tmp_path)[1].total.agreed == (5 if again else 0)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["maths", "chitchat", "others"]), st.integers(2, 5)), min_size=1, max_size=5),
    st.lists(st.integers(0, 60), max_size=4),
    st.sampled_from([{}, {"order": "sort"}, {"max_pairs": 2}]),
    st.integers(1, 4),
)
def test_however_often_it_is_stopped_the_labels_are_those_of_an_unbroken_run(shape, stops, plan, batch_size):
    rows = [row(*"abcde"[:count], task=task, prompt=f"{place}") for place, (task, count) in enumerate(shape)]
    whole_judge = ScriptedJudge(noisy)
    whole = labeller(rows, whole_judge, **plan)
    whole.ask()
    judge = ScriptedJudge(noisy, batch_size=batch_size)
    broken = labeller(rows, judge, **plan)
    for calls in sorted(stops):
        broken.budget = Budget(calls)
        broken.budget.spend(*broken.answers.spent)
        broken.ask()
    broken.budget = Budget()
    assert broken.ask() is None
    assert Counter(map(repr, judge.asked)) == Counter(map(repr, whole_judge.asked))
    assert [*broken.labelled(Report())] == [*whole.labelled(Report())]


# Speed and memory.


def test_as_many_are_under_way_as_the_judge_takes():
    judge = ScriptedJudge(concurrency=16, seconds=0.01)
    start = time.perf_counter()
    labeller(MANY, judge).ask()
    assert judge.most_at_once == 16
    assert time.perf_counter() - start < 600 * 0.01 / 4  # at once; in turn it takes 6 s


def test_a_judge_that_works_in_batches_gets_whole_ones():
    judge = ScriptedJudge(concurrency=1, batch_size=32)
    labeller(MANY, judge).ask()
    assert max(judge.batches) == 32 and len(judge.batches) <= 600 / 32 * 1.3


def test_rows_are_read_as_they_are_needed():
    """A row is let go when its questions are answered, so that few are in memory at any time."""
    read = []

    def rows():
        for number in range(300):
            read.append(number)
            yield MANY[number]

    ahead = []
    judge = ScriptedJudge(
        lambda question: ahead.append(len(read) - len(judge.asked) / 2) or longer(question), seconds=0.001
    )
    labelling = labeller([], judge)
    labelling.rows = rows
    labelling.ask(600)
    assert len(judge.asked) == 600 and max(ahead) <= 2 * judge.concurrency
