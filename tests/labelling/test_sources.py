"""Labels from who wrote a response."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.labelling.sources import length_controlled_strength, source_ranks, source_strength
from dmoerm_trl.labelling.weak import ranks_of

SOURCES = st.sampled_from("abcd")


def test_strength_is_the_share_of_comparisons_won():
    """
    a beats b and c, then ties b: 2.5 of 3. b beats c, ties a, loses to a: 1.5 of 3. c loses both. The two responses of d are
    not compared with each other, and with nothing else.
    """
    ranked = [([1, 2, 3], ["a", "b", "c"]), ([1, 1], ["a", "b"]), ([1, 2], ["d", "d"])]
    assert source_strength(ranked) == {"a": 2.5 / 3, "b": 1.5 / 3, "c": 0.0}


@given(st.lists(st.lists(st.tuples(st.integers(1, 3), SOURCES), min_size=2, max_size=5), max_size=5))
def test_comparisons_are_won_as_often_as_lost(rows):
    ranked = [([rank for rank, _ in row], [source for _, source in row]) for row in rows]
    strength = source_strength(ranked)
    assert all(0 <= share <= 1 for share in strength.values())
    compared = {
        source: sum(other != source for row in rows for _, own in row if own == source for _, other in row)
        for source in strength
    }
    wins = sum(strength[source] * count for source, count in compared.items())
    assert wins == pytest.approx(sum(compared.values()) / 2)


def test_at_equal_length_strength_is_the_log_odds_of_winning():
    """a wins three of four: s_a - s_b = log 3. A tie is half a win: three of four with two ties more are four of six."""
    won, lost, tied = ([1, 2], ["a", "b"], [7, 7]), ([2, 1], ["a", "b"], [7, 7]), ([1, 1], ["a", "b"], [7, 7])
    strength = length_controlled_strength([won, won, won, lost], ridge=1e-12)
    assert strength["a"] - strength["b"] == pytest.approx(math.log(3))
    strength = length_controlled_strength([won, won, won, lost, tied, tied], ridge=1e-12)
    assert strength["a"] - strength["b"] == pytest.approx(math.log(2))
    assert strength["a"] == pytest.approx(-strength["b"])


def test_what_length_wins_is_not_strength():
    """The longer response wins two of three, whoever wrote it, and a writes longer ones more often."""
    long_a, long_b = ["a", "b"], ["b", "a"]
    ranked = [(ranks, sources, [9, 4]) for sources in (long_a, long_a, long_b) for ranks in ([1, 2], [1, 2], [2, 1])]
    plain = source_strength((ranks, sources) for ranks, sources, _ in ranked)
    assert plain == {"a": pytest.approx(5 / 9), "b": pytest.approx(4 / 9)}
    controlled = length_controlled_strength(ranked, ridge=1e-12)
    assert controlled["a"] == pytest.approx(0, abs=1e-6) and controlled["b"] == pytest.approx(0, abs=1e-6)


def test_a_source_that_always_wins_has_a_finite_strength_by_the_ridge():
    """And one that is compared with none but itself has none."""
    strength = length_controlled_strength([([1, 2], ["a", "b"], [5, 5]), ([1, 2], ["c", "c"], [5, 9])])
    s = strength["a"]  # of least log(1 + e^-2s) + 2 r s^2: (1 + e^2s)^-1 = 2 r s
    assert set(strength) == {"a", "b"} and 1 / (1 + math.exp(2 * s)) == pytest.approx(2e-3 * s)
    assert length_controlled_strength([]) == {}


def test_ranks_by_strength_tie_what_is_close():
    strength = {"a": 0.9, "b": 0.89, "c": 0.2}
    assert source_ranks(strength, ["c", "a", "b", "a"]) == [4, 1, 1, 1]
    assert source_ranks(strength, ["c", "a", "b", "a"], tolerance=0.0) == [4, 1, 3, 1]
    assert ranks_of([0.2, 0.9, 0.89, 0.9], 0.0) == [4, 1, 3, 1]


def test_a_source_of_unknown_strength_is_an_error():
    with pytest.raises(
        ValueError, match="got the source 'x', need one of known strength because .* rank a response of it"
    ):
        source_ranks({"a": 0.5}, ["a", "x"])
