"""Labels from who wrote a response."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.labelling.sources import source_ranks, source_strength
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
