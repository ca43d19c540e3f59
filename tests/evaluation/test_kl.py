"""The KL estimators: hand-computed numbers, the exact KL of small discrete policies, closed forms of Gaussians."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.evaluation.kl import KLEstimate, best_of_n_kl_bound, best_of_n_kl_estimate, k1, k2, k3, policy_kl


@st.composite
def policies(draw):
    """Probabilities of 1 to 8 responses, in ascending order of their score."""
    weights = draw(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8))
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def winner_probabilities(p: torch.Tensor, n: int) -> torch.Tensor:
    """Exactly: response i wins where all n are at most i, but not all below i."""
    cumulative = torch.cat([torch.zeros(1), p.cumsum(0).clamp(max=1)])
    return cumulative[1:] ** n - cumulative[:-1] ** n


def exact_kl(winners: torch.Tensor, p: torch.Tensor) -> float:
    return torch.xlogy(winners, winners / p).sum().item()


def test_equation_11_by_hand():
    expected = torch.tensor([0.0, math.log(2) - 1 / 2, math.log(4) - 3 / 4, 10.002], dtype=torch.float64)
    torch.testing.assert_close(best_of_n_kl_bound([1, 2, 4, 60_000]), expected, rtol=0, atol=5e-4)
    assert best_of_n_kl_bound(2).item() == pytest.approx(math.log(2) - 1 / 2, abs=1e-15)


def test_the_tighter_estimate_by_hand():
    # e = 1/2, n = 2: 1/4 (log 2 + log(1/2) - 1/2) + 3/4 log(3/4 / 1/2) = -1/8 + 3/4 log(3/2).
    estimate = best_of_n_kl_estimate(torch.tensor(0.5, dtype=torch.float64).log(), 2)
    assert estimate.item() == pytest.approx(-1 / 8 + 3 / 4 * math.log(3 / 2), abs=1e-15)


@given(policies(), st.integers(1, 5_000))
def test_the_exact_kl_lies_below_the_estimate_and_the_estimate_below_equation_11(p, n):
    winners = winner_probabilities(p, n)
    exact, bound = exact_kl(winners, p), best_of_n_kl_bound(n).item()
    of_each = best_of_n_kl_estimate(p.log().clamp(max=0), n)
    for estimate in ((winners * of_each).sum().item(), of_each[-1].item()):  # mean over winners; the best response
        assert exact - 1e-9 <= estimate <= bound + 1e-9


@pytest.mark.parametrize("best", [0.001, 0.1, 0.7])
def test_the_estimate_is_exact_where_all_but_the_best_response_are_negligible(best):
    p = torch.tensor([(1 - best) / 200_000] * 200_000 + [best], dtype=torch.float64)
    exact = exact_kl(winner_probabilities(p, 64), p)
    assert best_of_n_kl_estimate(p[-1].log(), 64).item() == pytest.approx(exact, abs=1e-6)


def test_equation_11_is_loose_where_outcomes_are_few_and_the_estimate_is_not():
    p = torch.full((4,), 0.25, dtype=torch.float64)
    exact = exact_kl(winner_probabilities(p, 1_000), p)
    assert exact == pytest.approx(math.log(4), abs=1e-12)  # the best response wins always
    assert best_of_n_kl_estimate(p.log(), 1_000).mean().item() == pytest.approx(math.log(4), abs=1e-12)
    assert best_of_n_kl_bound(1_000).item() > 5.9


def test_the_estimate_at_the_ends_of_its_range():
    log_probs = torch.tensor([0.0, -1e-12, -500.0, -1e6])  # certain, nearly certain, negligible, below any float64
    estimate = best_of_n_kl_estimate(log_probs, 60_000)
    bound = best_of_n_kl_bound(60_000).item()
    torch.testing.assert_close(
        estimate, torch.tensor([0, 1e-12, bound, bound], dtype=torch.float64), atol=1e-9, rtol=0
    )
    assert best_of_n_kl_estimate(log_probs, 1).abs().max() == 0  # best of one is the policy itself
    grid = best_of_n_kl_estimate(torch.tensor([-3.0, -9.0]), torch.tensor([[2], [64], [4_096]]))
    assert grid.shape == (3, 2)
    assert (grid.diff(dim=0) > 0).all() and (grid.diff(dim=1) > 0).all()  # grows with n, falls with the probability


def test_bad_input_to_the_kl_of_best_of_n():
    with pytest.raises(ValueError, match=r"got n \[4.0, 0.0\], need at least 1"):
        best_of_n_kl_bound([4, 0])
    for bad in (0.1, math.nan, -math.inf):
        with pytest.raises(ValueError, match="need finite numbers of at most 0: sum log_softmax"):
            best_of_n_kl_estimate(torch.tensor([-1.0, bad]), 4)


def test_k1_k2_and_k3_by_hand():
    # Two tokens, the third masked. d = (log 2, -log 2): k1 = 0; k2 = log(2)^2; k3 = (1/2 - 1) + (2 - 1) = 1/2.
    log_probs = torch.tensor([[0.5, 0.25, 0.1], [0.3, 0.2, 0.1]]).log()
    ref_log_probs = torch.tensor([[0.25, 0.5, 0.9], [0.3, 0.2, 0.9]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    estimates = policy_kl(log_probs, ref_log_probs, mask)
    expected = {"k1": 0.0, "k2": math.log(2) ** 2, "k3": 0.5}
    assert list(estimates) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(estimates[name].per_sequence, torch.tensor([value, 0.0]))
        assert estimates[name].mean == pytest.approx(value / 2, abs=1e-6)
        assert estimates[name].standard_error == pytest.approx(value / 2, abs=1e-6)  # std of (v, 0) is v / sqrt(2)


def test_the_exact_mean_over_a_discrete_policy():
    # Over all outcomes of pi, weighted by pi, k1 and k3 give KL(pi || pi_ref), not KL(pi_ref || pi); k2 does not.
    pi, ref = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.3, 0.5]], dtype=torch.float64)
    d = pi.log() - ref.log()
    exact, reverse = exact_kl(pi, ref), exact_kl(ref, pi)
    assert (pi * k1(d)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (pi * k3(d)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert abs((pi * k2(d)).sum().item() - exact) > 0.05
    assert abs(exact - reverse) > 0.05
    assert (k3(d) >= 0).all() and (k2(d) >= 0).all()


@pytest.mark.parametrize("shift", [0.1, 0.5, 1.0])
def test_bias_and_variance_are_the_closed_forms_of_gaussians(shift):
    """pi = N(m, 1), pi_ref = N(0, 1): d ~ N(m^2 / 2, m^2), KL = m^2 / 2 a token; 8 independent tokens a sequence."""
    sequences, tokens, kl = 50_000, 8, shift**2 / 2
    samples = shift + torch.randn(sequences, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_probs, ref_log_probs = (
        torch.distributions.Normal(mean, 1.0).log_prob(samples).float() for mean in (shift, 0.0)
    )
    estimates = policy_kl(log_probs, ref_log_probs, torch.ones(sequences, tokens))
    means = {"k1": kl, "k2": kl + kl**2 / 2, "k3": kl}
    variances = {
        "k1": 2 * kl,
        "k2": (2 * kl) ** 2 * (1 / 2 + kl / 2),  # Var(d^2) / 4 with Var(d^2) = 2 s^4 + 4 m^2 s^2
        "k3": math.expm1(2 * kl) - 2 * kl,
    }
    for name, estimate in estimates.items():
        assert estimate.per_sequence.dtype == torch.float32
        assert abs(estimate.mean - tokens * means[name]) < 4 * estimate.standard_error, name
        assert estimate.standard_error == pytest.approx(math.sqrt(tokens * variances[name] / sequences), rel=0.1)
    assert abs(estimates["k2"].mean - tokens * kl) > 4 * estimates["k2"].standard_error or shift < 0.2
    # Equation 14 on the whole response: d ~ N(K, 2 K) with K the response's KL, so its mean is K + K^2 / 2.
    whole = KLEstimate(k2(estimates["k1"].per_sequence))
    assert abs(whole.mean - (tokens * kl + (tokens * kl) ** 2 / 2)) < 4 * whole.standard_error


def test_half_precision_is_lifted_before_anything_is_subtracted():
    log_probs = torch.full((1, 1024), -1.0, dtype=torch.bfloat16)
    ref_log_probs = torch.full((1, 1024), -1.0078125, dtype=torch.bfloat16)  # one step of bfloat16 further
    estimates = policy_kl(log_probs, ref_log_probs, torch.ones(1, 1024))
    assert estimates["k1"].per_sequence.dtype == torch.float32
    assert estimates["k1"].mean == pytest.approx(1024 * 0.0078125, rel=1e-6)
    assert estimates["k3"].mean == pytest.approx(1024 * (math.expm1(-0.0078125) + 0.0078125), rel=1e-2)
    assert policy_kl(log_probs.double(), ref_log_probs, torch.ones(1, 1024))["k3"].per_sequence.dtype == torch.float64


def test_k3_of_a_tiny_step_keeps_its_digits():
    torch.testing.assert_close(k3(torch.tensor([1e-3, -1e-3])), torch.tensor([5e-7, 5e-7]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf, 1.0])
def test_what_stands_under_the_padding_does_not_matter(filler):
    mask = torch.tensor([[True, True, False]])
    log_probs, ref_log_probs = torch.tensor([[-1.0, -2.0, filler]]), torch.tensor([[-1.5, -2.0, -3.0]])
    estimates = policy_kl(log_probs, ref_log_probs, mask)
    assert estimates["k1"].per_sequence.tolist() == [0.5]
    assert estimates["k2"].per_sequence.tolist() == [0.125]
    assert math.isnan(estimates["k1"].standard_error)  # one sequence


def test_bad_input_to_the_policy_s_kl():
    log_probs, mask = torch.full((2, 3), -1.0), torch.ones(2, 3)
    for shapes in (
        (log_probs, log_probs[:, :2], mask),
        (log_probs, log_probs, mask[:1]),
        (log_probs[0], log_probs[0], mask[0]),
        (log_probs[:0], log_probs[:0], mask[:0]),
    ):
        with pytest.raises(ValueError, match="need one shape .sequences, tokens. with at least one sequence"):
            policy_kl(*shapes)
    for bad in (math.nan, -math.inf):
        broken = log_probs.clone()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match=rf"got ref_log_probs {bad} at sequence 1, token 2, need a finite"):
            policy_kl(log_probs, broken, mask)
