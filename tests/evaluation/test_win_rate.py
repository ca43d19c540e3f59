"""Win rates: the count of wins, ties and losses, the order in which a judge is asked, and the interval."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.evaluation.win_rate import WinRate, reward_judge, wilson_interval, win_rate

PROMPTS = [[{"role": "user", "content": str(number)}] for number in range(4)]


def length(prompts, responses) -> list[float]:
    return [float(len(response)) for response in responses]


def test_the_longer_response_wins_by_a_judge_of_length():
    found = win_rate(reward_judge(length), PROMPTS, ["aaa", "a", "aa", "aaaa"], ["a", "a", "aaa", "aa"])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.rate == 2.5 / 4 and found.prompts == 4
    assert str(found).startswith("62.5% [") and str(found).endswith("(2 wins, 1 ties, 1 losses on 4 prompts)")


def test_a_small_difference_is_a_tie_where_asked_for():
    found = win_rate(reward_judge(length, tie=1.0), PROMPTS, ["aaa", "a", "aa", "aaaa"], ["a", "a", "aaa", "aa"])
    assert (found.wins, found.ties, found.losses) == (2, 2, 0)


def test_a_judge_that_always_prefers_the_first_calls_ties_when_asked_in_both_orders():
    def first(prompts, firsts, seconds):
        return [1] * len(prompts)

    both = win_rate(first, PROMPTS, ["a"] * 4, ["b"] * 4)
    once = win_rate(first, PROMPTS, ["a"] * 4, ["b"] * 4, both_orders=False)
    assert (both.wins, both.ties, both.losses) == (0, 4, 0) and (once.wins, once.ties, once.losses) == (4, 0, 0)


def test_a_verdict_counts_only_where_both_orders_agree():
    """A judge that prefers the first unless the second is longer by two."""

    def biased(prompts, firsts, seconds):
        return [-1 if len(second) >= len(first) + 2 else 1 for first, second in zip(firsts, seconds, strict=True)]

    found = win_rate(biased, PROMPTS, ["aaa", "a", "aa", "a"], ["a", "aaa", "a", "aa"])
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)


def test_wilsons_interval_of_hand_computed_numbers():
    """8 of 10, z = 1.96: (0.8 + 0.19207 +- 1.96 sqrt(0.016 + 0.0096040)) / 1.38415 = (0.99207 +- 0.31362) / 1.38415."""
    low, high = wilson_interval(0.8, 10)
    assert (low, high) == (pytest.approx(0.49016, abs=1e-4), pytest.approx(0.94331, abs=1e-4))
    assert WinRate(8, 0, 2).interval() == (low, high)
    assert WinRate(8, 0, 2).shares()["wins"] == (0.8, low, high)
    assert WinRate(10, 0, 0).interval()[1] == 1.0 and 0.7 < WinRate(10, 0, 0).interval()[0] < 0.75


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_the_two_sides_see_the_same_outcome(wins, ties, losses):
    if wins + ties + losses == 0:
        return
    one, other = WinRate(wins, ties, losses), WinRate(losses, ties, wins)
    low, high = one.interval()
    assert one.rate == pytest.approx(1 - other.rate) and 0 <= low <= one.rate <= high <= 1
    assert other.interval() == (pytest.approx(1 - high), pytest.approx(1 - low))
    assert WinRate(10 * wins, 10 * ties, 10 * losses).interval()[0] >= low - 1e-12


@pytest.mark.parametrize("judge", [lambda *_: [1.0, math.nan, 0, 0], lambda *_: [1.0]])
def test_a_missing_verdict_is_an_error(judge):
    with pytest.raises(ValueError, match=r"got \d verdicts on 4 pairs, \d of them NaN, need a number for each"):
        win_rate(judge, PROMPTS, ["a"] * 4, ["b"] * 4)


@pytest.mark.parametrize("prompts, a, b", [([], [], []), (PROMPTS, ["a"] * 4, ["b"] * 3)])
def test_pairs_that_are_not_pairs_are_an_error(prompts, a, b):
    with pytest.raises(ValueError, match="need the same number of each and at least one"):
        win_rate(reward_judge(length), prompts, a, b)
