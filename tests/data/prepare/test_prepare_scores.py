"""Scores as ranks: numbers by hand, and what holds for any scores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.data.preference_row import RowError
from dmoerm_trl.data.ranks import capability_labels, number, overall_ranks, ranks_of


@pytest.mark.parametrize(
    ("scores", "margin", "ranks"),
    [
        ([3, 1, 2], 0, [1, 3, 2]),
        ([2, 2, 5], 0, [2, 2, 1]),
        ([-1.5, 0.0], 0, [2, 1]),
        ([4, 3.5, 3, 2.9], 0.5, [1, 1, 2, 2]),  # 3 is within the margin of 3.5, but not of 4
        ([4, 3.5, 3], 1, [1, 1, 1]),
        ([1], 0, [1]),
        ([], 0, []),
    ],
)
def test_ranks_by_hand(scores, margin, ranks):
    assert ranks_of(scores, margin) == ranks


@given(st.lists(st.integers(-20, 20)), st.integers(0, 10))
def test_ranks_keep_the_order_and_tie_only_within_the_margin(scores, margin):
    ranks = ranks_of(scores, margin)
    assert set(ranks) == set(range(1, len(set(ranks)) + 1))
    for score, rank in zip(scores, ranks, strict=True):
        for other, its_rank in zip(scores, ranks, strict=True):
            if score > other:
                assert rank <= its_rank
            if rank == its_rank:
                assert abs(score - other) <= margin
    assert margin or ranks == [1 + sum(other > score for other in set(scores)) for score in scores]


@pytest.mark.parametrize(
    ("value", "expected"), [("4", 4.0), (3, 3.0), ("N/A", None), (None, None), (float("nan"), None), ([], None)]
)
def test_what_is_a_number(value, expected):
    assert number(value) == expected


def test_a_response_without_an_overall_score_is_an_error():
    assert overall_ranks(["2", 3], 0) == [2, 1]
    with pytest.raises(RowError, match="got the score 'N/A', need a number for each response") as error:
        overall_ranks([1, "N/A"], 0)
    assert error.value.reason == "response without a score"


def test_partly_rated_points_become_pairs():
    ratings = {
        "all": [1, 3, 2],
        "some": ["5", "N/A", "4"],
        "tied": [2, None, 2],
        "one": [None, None, 3],
        "none": [None] * 3,
    }
    assert capability_labels(ratings, 0) == {
        "capability_ranks": {"all": [3, 1, 2]},
        "capability_pairs": {"some": [[0, 2]]},
    }
    assert capability_labels({"some": ["5", "N/A", "4"]}, 1) == {"capability_ranks": {}, "capability_pairs": {}}


@given(st.lists(st.none() | st.integers(1, 5), min_size=2, max_size=6))
def test_pairs_and_ranks_say_the_same(values):
    """Every two rated responses with different ratings are told apart, and no others."""
    labels = capability_labels({"point": values}, 0)
    if labels["capability_ranks"]:
        ranks = labels["capability_ranks"]["point"]
        told = {(i, j) for i, first in enumerate(ranks) for j, second in enumerate(ranks) if first < second}
    else:
        told = {tuple(pair) for pair in labels["capability_pairs"].get("point", [])}
    rated = [(index, value) for index, value in enumerate(values) if value is not None]
    assert told == {(i, j) for i, first in rated for j, second in rated if first > second}
