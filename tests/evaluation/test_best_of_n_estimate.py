"""The unbiased estimates of best of n: brute force over all subsets, ties, the order statistics of Gaussians."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoerm_trl.evaluation.best_of_n_estimate import best_of_n, best_of_n_weights, win_share


def brute_force(scores: list[float], values: list[float], n: int) -> float:
    """The mean over all subsets of n of the winner's value; of all the winners' mean, where several share the top."""
    means = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[index] for index in subset)
        winners = [values[index] for index in subset if scores[index] == top]
        means.append(sum(winners) / len(winners))
    return math.fsum(means) / len(means)


@st.composite
def prompts(draw):
    """Scores with many ties or with few, gold values, and the gold values of other responses of the base policy."""
    responses = draw(st.integers(1, 9))
    score = draw(st.sampled_from([st.integers(0, 2).map(float), st.floats(-1e3, 1e3, width=32)]))
    gold = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3))
    exactly = {"min_size": responses, "max_size": responses}
    return draw(st.lists(score, **exactly)), draw(st.lists(gold, **exactly)), draw(st.lists(gold, min_size=1))


def test_by_hand():
    # Ranks 1 to 4 win 0, 1, 2, 3 of the 6 pairs; the gold values of those ranks are 5, 1, 7, 3.
    scores, gold = torch.tensor([0.3, -1.0, 2.0, 0.5]), torch.tensor([1.0, 5.0, 3.0, 7.0])
    assert best_of_n_weights(4, 2).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6], abs=1e-15)
    expected = [(1 + 5 + 3 + 7) / 4, (1 * 1 + 2 * 7 + 3 * 3) / 6, 3.0]
    assert best_of_n(scores, gold, [1, 2, 4]).tolist() == pytest.approx(expected, abs=1e-15)
    assert best_of_n(scores, gold, [4, 1]).tolist() == pytest.approx(expected[::-2], abs=1e-15)


def test_ties_are_averaged_by_hand():
    # Pairs: {a, b} tie, mean 5; {a, c} and {b, c} are won by c, 1.
    assert best_of_n(torch.tensor([2.0, 2.0, 3.0]), torch.tensor([0.0, 10.0, 1.0]), [2]).item() == pytest.approx(7 / 3)
    # Nothing but ties: best of n is the mean, whatever n; the first or the last would be an arbitrary choice.
    constant = best_of_n(torch.zeros(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]), [1, 3, 5])
    assert constant.tolist() == pytest.approx([22.0] * 3)


@settings(deadline=None)
@given(prompts())
def test_the_estimate_is_the_mean_over_all_subsets(prompt):
    scores, gold, base = prompt
    beaten = [sum((own > other) + (own == other) / 2 for other in base) / len(base) for own in gold]
    scores_, gold_, base_ = (torch.tensor(numbers, dtype=torch.float64) for numbers in prompt)
    wins = win_share(gold_, base_)
    assert wins.tolist() == pytest.approx(beaten, abs=1e-12)
    grid = list(range(1, len(scores) + 1))
    curves = best_of_n(scores_, torch.stack([gold_, scores_, wins]), grid)
    for curve, values in zip(curves.tolist(), (gold, scores, beaten), strict=True):
        expected = [brute_force(scores, values, n) for n in grid]
        assert curve == pytest.approx(expected, abs=1e-9, rel=1e-12)


@settings(deadline=None)
@given(st.integers(1, 60_000).flatmap(lambda N: st.tuples(st.just(N), st.integers(1, N))))
def test_the_weights_sum_to_one(size):
    weights = best_of_n_weights(*size)
    assert weights.shape == size[:1]
    assert abs(weights.sum().item() - 1) < 1e-12
    assert (weights.diff() >= 0).all() and weights[0] >= 0


@pytest.mark.parametrize("n", [1, 2, 37, 8_000, 59_999, 60_000])
def test_stable_at_sixty_thousand_responses(n):
    # The mean rank of the best of n among 1..N without replacement is n (N + 1) / (n + 1), exactly.
    ranks = torch.arange(1, 60_001)
    shuffled = ranks[torch.randperm(60_000, generator=torch.Generator().manual_seed(0))]
    assert best_of_n(shuffled, shuffled, [n]).item() == pytest.approx(n * 60_001 / (n + 1), rel=1e-12)


def test_weights_agree_with_integer_binomials():
    exact = [math.comb(i - 1, 499) / math.comb(2_000, 500) for i in range(1, 2_001)]  # integers divided correctly
    assert best_of_n_weights(2_000, 500).tolist() == pytest.approx(exact, rel=1e-11, abs=1e-300)


def test_unbiased_for_the_best_of_gaussians():
    """Proxy = N(0, 1), gold = 0.6 proxy + 0.8 noise. E max of 1, 2, 3 normals is 0, 1/sqrt(pi), 3/(2 sqrt(pi))."""
    generator = torch.Generator().manual_seed(0)
    proxy, noise, base = (torch.randn(20_000, 8, generator=generator) for _ in range(3))
    gold = 0.6 * proxy + 0.8 * noise
    values = torch.stack([proxy, gold, win_share(proxy, base), win_share(noise, base)])
    curves = best_of_n(proxy, values, [1, 2, 3])  # (4, prompts, 3)
    best = torch.tensor([0, 1 / math.sqrt(math.pi), 3 / (2 * math.sqrt(math.pi))], dtype=torch.float64)
    beats_base = torch.tensor([1 / 2, 2 / 3, 3 / 4], dtype=torch.float64)  # n / (n + 1)
    expected = torch.stack([best, 0.6 * best, beats_base, torch.full((3,), 0.5, dtype=torch.float64)])
    errors = curves.std(dim=1) / math.sqrt(20_000)
    assert ((curves.mean(dim=1) - expected).abs() < 4 * errors).all()


def test_the_win_rate_against_the_very_samples_is_off_by_less_than_the_documented_bound():
    # Gold = proxy, no ties: the best of n has mean rank n (N+1) / (n+1), and beats its rank - 1/2 of the N.
    responses, grid = 40, [1, 2, 8, 40]
    gold = torch.arange(float(responses))
    estimate = best_of_n(gold, win_share(gold, gold), grid)
    n = torch.tensor(grid, dtype=torch.float64)
    torch.testing.assert_close(estimate, (n * (responses + 1) / (n + 1) - 1 / 2) / responses)
    assert ((estimate - n / (n + 1)).abs() < 1.5 / responses).all()


def test_prompts_are_estimated_side_by_side_and_extra_dimensions_kept():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (3, 6), generator=generator)  # ties, integers
    values = torch.randn(2, 3, 6, generator=generator)
    curves = best_of_n(scores, values, [1, 3, 5, 6])
    assert curves.shape == (2, 3, 4) and curves.dtype == torch.float64
    for extra in range(2):
        for prompt in range(3):
            alone = best_of_n(scores[prompt], values[extra, prompt], [1, 3, 5, 6])
            torch.testing.assert_close(curves[extra, prompt], alone)


@given(st.permutations(range(6)))
def test_the_order_of_the_responses_does_not_matter(order):
    scores, gold = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 2.0]), torch.tensor([3.0, 9.0, -4.0, 0.5, 7.0, 1.0])
    torch.testing.assert_close(best_of_n(scores[order], gold[order], [2, 4]), best_of_n(scores, gold, [2, 4]))


def test_bad_input():
    scores = torch.tensor([[0.1, 0.2, 0.3]])
    for n in (4, 0):
        with pytest.raises(
            ValueError, match=f"got n {n} for 3 responses, need n from 1 to 3 .* sample more responses"
        ):
            best_of_n(scores, scores, [1, n])
    with pytest.raises(ValueError, match="need .* at least one response: a prompt without a response"):
        best_of_n(scores[:, :0], scores[:, :0], [1])
    with pytest.raises(ValueError, match=r"got values of shape \(1, 2\) and scores of shape \(1, 3\), need one value"):
        best_of_n(scores, scores[:, :2], [1])
    with pytest.raises(ValueError, match="got an empty grid"):
        best_of_n(scores, scores, [])
    for bad in (math.nan, math.inf, -math.inf):
        broken = torch.tensor([[0.1, bad, 0.3]])
        with pytest.raises(ValueError, match=rf"got scores\[0, 1\] = {bad} \(1 such of 3\), need finite"):
            best_of_n(broken, scores, [1])
        with pytest.raises(ValueError, match=rf"got values\[0, 1\] = {bad}"):
            best_of_n(scores, broken, [1])
        with pytest.raises(ValueError, match=rf"got base rewards\[0, 1\] = {bad}"):
            win_share(scores, broken)
    for base in (scores[:, :0], scores[0], torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="for the same prompts, with at least one response of the base"):
            win_share(scores, base)
