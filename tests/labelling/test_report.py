"""The report, on numbers worked out by hand."""

import json
import re

import pytest

from dmoerm_trl.labelling.answer_store import Spent
from dmoerm_trl.labelling.report import Report, Tally

# (choices in both orders) -> what it is: agreed on the first or the second response, the same position twice, unreadable
PAIRS = [(1, 2), (1, 2), (2, 1), (1, 1), (1, 1), (2, 2), (None, 1), (None, None)]


def tally(choices=PAIRS, ranked=frozenset({(0, 1)})) -> Tally:
    result = Tally()
    for of_pair in choices:
        result.add((0, 1), of_pair, ranked)
    return result


def test_counts():
    """Of 12 answers that can be read in pairs, 1 + 1 + 1 + 2 + 2 name the first position."""
    counted = tally()
    assert (counted.pairs, counted.agreed, counted.disagreed, counted.unreadable) == (8, 3, 3, 2)
    assert (counted.answers_first, counted.readable_answers) == (7, 12)
    assert (counted.ranked, counted.as_ranked) == (3, 2)  # the ranks prefer response 0, one label prefers response 1


def test_a_pair_that_the_ranks_do_not_order_says_nothing_about_them():
    counted = tally(ranked=set())
    assert (counted.agreed, counted.ranked, counted.as_ranked) == (3, 0, 0)


def test_add_returns_the_better_response():
    assert [Tally().add((1, 4), choices) for choices in PAIRS[:4]] == [1, 1, 4, None]


def test_an_unbiased_judge_names_the_first_position_in_half_of_its_answers():
    assert tally([(1, 2)] * 30).answers_first == 30
    assert tally([(1, 2)] * 30).fault() is None


@pytest.mark.parametrize(
    "choices, says",
    [
        ([(1, 1)] * 25, "names the first response, whatever it is, in 50 of 50 answers (100%)"),
        ([(2, 2)] * 25, "names the second response, whatever it is, in 50 of 50 answers (100%)"),
        ([(1, 1)] * 98 + [(1, 2)] * 2, "names the first response, whatever it is, in 198 of 200 answers (99%)"),
        ([(None, 1)] * 40, "cannot be read, or prefers neither response, in 40 of 40 pairs"),
        ([(1, 1)] * 24 + [(1, 2)], None),  # 49 of 50: Wilson's lower bound is 0.895
        ([(1, 1)] * 8 + [(2, 1)] * 2, None),
        ([], None),
    ],
)
def test_a_judge_without_worth_is_told_from_chance(choices, says):
    fault = tally(choices).fault()
    assert fault is None if says is None else says in fault


def test_a_fault_is_early_when_there_are_fifty_answers():
    assert [tally([(None, 1)] * pairs).early_fault() is None for pairs in (24, 36)] == [True, False]
    assert [tally([(1, 1)] * pairs).early_fault() is None for pairs in (24, 25)] == [True, False]
    assert tally([(1, 1)] * 24).fault() is not None


@pytest.fixture
def report() -> Report:
    result = Report(rows=9, incomplete=1, spent=Spent(4321, 123_456, 4321), cost=1.5, stopped="interrupted")
    result.points["chitchat", "logic"] += tally(PAIRS * 50)
    result.points["maths", "logic"] += tally([(None, None)] * 3)
    result.points["maths", "correctness"] += tally([(1, 1)] * 150 + [(1, 2)])
    return result


def test_the_table(report):
    lines = report.to_markdown().splitlines()
    assert "| chitchat | logic | 400 | 150 (38%) | 150 (38%) | 100 (25%) | 350 (58%) | 100 (67%) |" in lines
    assert "| maths | logic | 3 | 0 (0%) | 0 (0%) | 3 (100%) | 0 | 0 |" in lines
    assert "| all |  | 554 | 151 (27%) | 300 (54%) | 103 (19%) | 651 (72%) | 101 (67%) |" in lines
    assert "9 rows written, 1 left out because questions of theirs are not answered." in lines
    assert "The judge's answers so far: 4,321 answers, 123,456 + 4,321 tokens, cost 1.50." in lines
    assert "Asking stopped: interrupted." in lines


def test_warnings_have_the_numbers(report):
    unread, biased, few = report.warnings()
    assert unread == "Task 'maths', point 'logic': no answer could be read in any of 3 pairs."
    assert "'correctness': the judge names the first response, whatever it is, in 301 of 302 answers" in biased
    assert few.endswith("less than 100: maths, logic: 0; maths, correctness: 1.")
    assert all(f"**Warning.** {warning}" in report.to_markdown() for warning in report.warnings())


def test_a_judge_that_always_says_one_is_warned_of_over_all_points():
    report = Report()
    report.points["chitchat", "logic"] += tally([(1, 1)] * 200)
    assert report.warnings()[0].startswith("All points: the judge names the first response")


def test_json(report, tmp_path):
    report.save(tmp_path)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["points"][0] == {
        "task": "chitchat", "point": "logic", "pairs": 400, "agreed": 150, "disagreed": 150, "unreadable": 100,
        "answers_first": 350, "readable_answers": 600, "ranked": 150, "as_ranked": 100,
    }  # fmt: skip
    assert read["all"]["pairs"] == 554 and len(read["warnings"]) == 3
    assert read["spent"] == {"calls": 4321, "prompt_tokens": 123_456, "completion_tokens": 4321, "cost": 1.5}
    assert (read["rows"], read["incomplete"], read["stopped"]) == (9, 1, "interrupted")
    assert (tmp_path / "report.md").read_text() == report.to_markdown()


def test_ties_are_no_unreadable_answers():
    counted = tally([(0, 0), (0, 0), (1, 2), (None, 0)])
    assert (counted.pairs, counted.ties, counted.unreadable, counted.agreed, counted.disagreed) == (4, 2, 1, 1, 0)
    assert (counted.answers_first, counted.readable_answers) == (1, 2)
    result = Report()
    result.points["maths", "logic"] += counted
    table = result.to_markdown()
    assert "| task | point | pairs | agreed | disagreed | ties | unreadable | first position | as ranked |" in table
    assert "| maths | logic | 4 | 1 (25%) | 0 (0%) | 2 (50%) | 1 (25%) | 1 (50%) | 1 (100%) |" in table
    assert result.to_dict()["points"][0]["ties"] == 2


def test_a_judge_that_ties_all_is_told_so():
    assert "gives both responses the same score in 40 of 40 pairs (100%)" in tally([(0, 0)] * 40).early_fault()


def test_nothing_in_the_report_is_html_or_steers_a_terminal():
    nasty = "a|b\n# c <script>alert(1)</script> ![x](http://y) \x1b[2J\u202e`*"
    result = Report(stopped=nasty, failures={nasty: 2})
    result.points[nasty, nasty] += tally([(None, None)] * 3)
    table = result.to_markdown()
    assert table.replace("\n", "").isprintable()
    assert "<" not in table and "](" not in table and "\n# c" not in table
    row = next(line for line in table.splitlines() if line.startswith("| a"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 9


def test_failed_requests_are_counted(report):
    assert "failed" not in report.to_markdown()
    report.failures = {"time-out": 2, "broken reply": 1}
    line = "Requests of this run that failed and were made again: broken reply 1, time-out 2."
    assert line in report.to_markdown().splitlines()
    assert report.to_dict()["failed_requests"] == {"time-out": 2, "broken reply": 1}


def test_its_owner_alone_may_read_a_report(report, tmp_path):
    report.save(tmp_path)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
