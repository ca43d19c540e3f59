"""Consistency with the labels: hand-computed pairs, invariances, the bootstrap interval, bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoerm_trl.evaluation.consistency import Consistency, agreement, pair_agreement, pooled

finite = st.floats(allow_nan=False, allow_infinity=False)
ranked_rewards = st.integers(2, 5).flatmap(
    lambda k: st.tuples(st.lists(finite, min_size=k, max_size=k), st.lists(st.integers(1, 4), min_size=k, max_size=k))
)
prompts = st.lists(ranked_rewards, min_size=1, max_size=8).filter(lambda rows: any(len(set(r)) > 1 for _, r in rows))


def consistency(rows, **kwargs):
    return Consistency().compute(predictions=[r for r, _ in rows], references=[k for _, k in rows], **kwargs)


@pytest.mark.parametrize(
    ("rewards", "ranks", "expected"),
    [
        ([0.9, 0.1], [1, 2], (1.0, 1)),
        ([0.1, 0.9], [1, 2], (0.0, 1)),
        ([0.5, 0.5], [1, 2], (0.5, 1)),  # equal rewards: half
        ([0.9, 0.1], [1, 1], (0.0, 0)),  # equal ranks: no pair
        ([0.9, 0.1, 0.4], [1, 2, 3], (2.0, 3)),  # 1>2 right, 1>3 right, 2>3 wrong
        ([3.0, 2.0, 2.0, 5.0], [1, 2, 2, 3], (2.0, 5)),  # right: 1>2, 1>2'; wrong: the three against the last
        ([1e308, -1e308], [1, 2], (1.0, 1)),  # the difference overflows, the order does not
        ([0.3], [1], (0.0, 0)),
    ],
)
def test_pair_agreement_by_hand(rewards, ranks, expected):
    assert pair_agreement(rewards, ranks) == expected


def test_agreement_on_pairs_by_hand():
    assert agreement([1.0, 2.0, 2.0], [(0, 1), (1, 2), (2, 0)]) == (1.5, 3)  # a cycle, as of a judge
    assert agreement([1.0], []) == (0.0, 0)
    assert pooled([(1.5, 3), (0.0, 0), (1.0, 1)])["consistency"] == 2.5 / 4


@given(ranked_rewards)
def test_ranks_agree_as_the_pairs_that_they_imply(ranked):
    rewards, ranks = ranked
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    assert pair_agreement(rewards, ranks) == agreement(rewards, pairs)


def test_metric_pools_the_pairs_of_ragged_prompts():
    result = Consistency().compute(
        predictions=[[0.9, 0.1, 0.4], [1.0, 2.0], [5.0, 5.0]], references=[[1, 2, 3], [1, 2], [1, 1]]
    )
    assert result["consistency"] == 2 / 4  # 2 of 3, 0 of 1, no pair
    assert (result["pairs"], result["prompts"]) == (4, 2)
    assert 0 <= result["low"] <= 0.5 <= result["high"] <= 2 / 3


def test_metric_takes_batches_arrays_and_tensors():
    metric = Consistency()
    metric.add_batch(predictions=[torch.tensor([2.0, 1.0]), np.array([1.0, 2.0, 3.0])], references=[[1, 2], [3, 2, 1]])
    metric.add(prediction=[1.0, 2.0], reference=[1, 2])
    assert metric.compute()["consistency"] == 4 / 5
    assert metric.compute(predictions=[[1.0, 2.0]], references=[[1, 2]])["consistency"] == 0  # starts afresh


@settings(max_examples=40, deadline=None)
@given(prompts)
def test_monotone_transforms_of_the_rewards_change_nothing(rows):
    values = sorted({value for rewards, _ in rows for value in rewards})
    stretched = [([math.exp(values.index(value) / 7) for value in rewards], ranks) for rewards, ranks in rows]
    assert consistency(stretched) == consistency(rows)


@settings(max_examples=40, deadline=None)
@given(prompts)
def test_negated_rewards_and_reversed_ranks_give_the_complement(rows):
    share = consistency(rows)["consistency"]
    assert consistency([([-v for v in rewards], ranks) for rewards, ranks in rows])["consistency"] == pytest.approx(
        1 - share
    )
    assert consistency([(rewards, [-k for k in ranks]) for rewards, ranks in rows])["consistency"] == pytest.approx(
        1 - share
    )


@settings(max_examples=40, deadline=None)
@given(prompts)
def test_the_labels_own_order_is_perfect_and_a_constant_is_half(rows):
    best = consistency([([-k for k in ranks], ranks) for _, ranks in rows])
    assert (best["consistency"], best["low"], best["high"]) == (1, 1, 1)
    assert consistency([([0.0] * len(ranks), ranks) for _, ranks in rows])["consistency"] == 0.5


@settings(max_examples=40, deadline=None)
@given(prompts, st.randoms())
def test_the_order_of_prompts_and_responses_does_not_matter(rows, random):
    shuffled = [tuple(zip(*random.sample(list(zip(*row, strict=True)), len(row[0])), strict=True)) for row in rows]
    random.shuffle(shuffled)
    assert consistency(shuffled) == consistency(rows)


def test_interval_is_the_binomial_one_for_single_pairs():
    # 400 prompts of one pair each, 280 right: the share's standard error is sqrt(0.7 * 0.3 / 400) = 0.0229.
    rows = [([1.0, 0.0], [1, 2])] * 280 + [([0.0, 1.0], [1, 2])] * 120
    result = consistency(rows, resamples=20_000)
    assert result["low"] == pytest.approx(0.7 - 1.96 * 0.0229, abs=0.003)
    assert result["high"] == pytest.approx(0.7 + 1.96 * 0.0229, abs=0.003)


def test_pairs_of_one_prompt_are_resampled_together():
    # 50 prompts of six pairs, all right or all wrong: as uncertain as 50 pairs, not as 300.
    rows = [([4.0, 3.0, 2.0, 1.0], [1, 2, 3, 4])] * 25 + [([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])] * 25
    result = consistency(rows, resamples=20_000)
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 50), abs=0.03)


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(7)
    covered = 0
    for trial in range(200):  # each pair is right with probability 0.7
        right = random.random(150) < 0.7
        result = consistency([([float(r), 0.5], [1, 2]) for r in right], confidence=0.9, seed=trial)
        covered += result["low"] <= 0.7 <= result["high"]
    assert 165 <= covered <= 195  # 180 expected, standard deviation 4.2


def test_same_seed_same_interval():
    rows = [([1.0, 0.0, 0.5], [1, 2, 3]), ([0.0, 1.0], [1, 2]), ([2.0, 1.0], [1, 2])] * 30
    assert consistency(rows, seed=3) == consistency(rows, seed=3)
    assert consistency(rows, seed=3) != consistency(rows, seed=4)


def test_no_files_are_left_anywhere(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Consistency(cache_dir=str(tmp_path / "cache")).compute(predictions=[[1.0, 2.0]], references=[[1, 2]])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[1.0, 2.0], [1.0]], [[1, 2], [1, 2]], r"prompt 1: got rewards of shape \(1,\) and ranks of shape \(2,\)"),
        ([[1.0, 2.0]], [[1, 2], [1, 2]], r"Mismatch in the number of predictions \(1\) and references \(2\)"),
        ([[1.0, math.nan]], [[1, 2]], r"prompt 0: got rewards \[1.0, nan\], need finite numbers"),
        ([[1.0, -math.inf]], [[1, 2]], r"prompt 0: got rewards \[1.0, -inf\], need finite numbers"),
        ([[1.0, None]], [[1, 2]], r"prompt 0: got rewards \[1.0, nan\], need finite numbers"),
        ([[1.0, 2.0]], [[1, None]], r"prompt 0: got ranks \[1.0, nan\], need finite numbers"),
        ([[1.0, 2.0]], [[2, 2]], "got 1 prompts without a non-tied pair"),
        ([], [], "got 0 prompts without a non-tied pair"),
    ],
)
def test_bad_input_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        Consistency().compute(predictions=predictions, references=references)


@pytest.mark.parametrize(("option", "value"), [("confidence", 95), ("confidence", 0), ("resamples", 0)])
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"got {option} {value}"):
        Consistency().compute(predictions=[[1.0, 2.0]], references=[[1, 2]], **{option: value})
