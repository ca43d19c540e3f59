"""Labels from who wrote a response."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.labelling.heuristics import tied_ranks
from dmoerm_trl.labelling.system_strength import length_controlled_strength, system_ranks, system_strength

SOURCES = st.sampled_from("abcd")


def test_strength_is_the_share_of_comparisons_won():
    """
    a beats b and c, then ties b: 2.5 of 3. b beats c, ties a, loses to a: 1.5 of 3. c loses both. The two responses of d are
    not compared with each other, and with nothing else.
    """
    ranked = [([1, 2, 3], ["a", "b", "c"]), ([1, 1], ["a", "b"]), ([1, 2], ["d", "d"])]
    assert system_strength(ranked) == {"a": 2.5 / 3, "b": 1.5 / 3, "c": 0.0}


@given(st.lists(st.lists(st.tuples(st.integers(1, 3), SOURCES), min_size=2, max_size=5), max_size=5))
def test_comparisons_are_won_as_often_as_lost(rows):
    ranked = [([rank for rank, _ in row], [source for _, source in row]) for row in rows]
    strength = system_strength(ranked)
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
    plain = system_strength((ranks, sources) for ranks, sources, _ in ranked)
    assert plain == {"a": pytest.approx(5 / 9), "b": pytest.approx(4 / 9)}
    controlled = length_controlled_strength(ranked, ridge=1e-12)
    assert controlled["a"] == pytest.approx(0, abs=1e-6) and controlled["b"] == pytest.approx(0, abs=1e-6)


def test_many_sources_are_told_apart_at_equal_length():
    """Of 30 sources the stronger write longer, and length wins too: neither is taken for the other."""
    draw = random.Random(0)
    true = {f"source {n}": 2 * n / 29 - 1 for n in range(30)}
    ranked = []
    for _ in range(800):
        sources = draw.sample(sorted(true), 8)
        lengths = [round(math.exp(5 + true[source] + draw.gauss(0, 0.5))) for source in sources]
        noise = [-math.log(-math.log(draw.random())) for _ in sources]  # their difference is logistic
        quality = [
            true[source] + math.log(length) + n for source, length, n in zip(sources, lengths, noise, strict=True)
        ]
        ranked.append(([1 + sum(other > own for other in quality) for own in quality], sources, lengths))
    found = length_controlled_strength(ranked)
    assert statistics.linear_regression(
        list(true.values()), [found[source] for source in true]
    ).slope == pytest.approx(1, abs=0.12)
    assert max(abs(found[source] - true[source]) for source in true) < 0.35


def test_a_source_that_always_wins_has_a_finite_strength_by_the_ridge():
    """And one that is compared with none but itself has none."""
    strength = length_controlled_strength([([1, 2], ["a", "b"], [5, 5]), ([1, 2], ["c", "c"], [5, 9])], ridge=1e-3)
    s = strength["a"]  # of least log(1 + e^-2s) + 2 r s^2: (1 + e^2s)^-1 = 2 r s
    assert set(strength) == {"a", "b"} and 1 / (1 + math.exp(2 * s)) == pytest.approx(2e-3 * s)
    assert length_controlled_strength([]) == {}


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 3), SOURCES, st.integers(0, 10**9)), min_size=2, max_size=5),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([1e-2, 1e-5, 1e-9]),
)
def test_every_source_that_is_compared_has_a_finite_strength(rows, ridge):
    """And their sum is 0: to add the same to all would only raise the ridge's part of the loss."""
    ranked = [tuple(zip(*row, strict=True)) for row in rows]
    strength = length_controlled_strength(ranked, ridge)
    assert all(map(math.isfinite, strength.values())) and abs(sum(strength.values())) < 1e-3
    assert set(strength) == {s for row in rows for _, s, _ in row if any(other != s for _, other, _ in row)}


def test_wrong_input_for_strength_at_equal_length_is_an_error():
    with pytest.raises(ValueError, match="shorter|longer"):
        length_controlled_strength([([1, 2], ["a", "b"], [5])])
    with pytest.raises(ValueError, match="got ridge=0, need a positive number because"):
        length_controlled_strength([([1, 2], ["a", "b"], [5, 6])], ridge=0)


def test_ranks_by_strength_tie_what_is_close():
    strength = {"a": 0.9, "b": 0.89, "c": 0.2}
    assert system_ranks(strength, ["c", "a", "b", "a"]) == [4, 1, 1, 1]
    assert system_ranks(strength, ["c", "a", "b", "a"], tolerance=0.0) == [4, 1, 3, 1]
    assert tied_ranks([0.2, 0.9, 0.89, 0.9], 0.0) == [4, 1, 3, 1]


def test_a_source_of_unknown_strength_is_an_error():
    with pytest.raises(
        ValueError, match="got the system 'x', need one of known strength because .* rank a response of it"
    ):
        system_ranks({"a": 0.5}, ["a", "x"])
