"""The two fits of Gao et al.: curves that are recovered, the peak, standard errors, what cannot be fitted."""

import math

import pytest
import torch

from dmoerm_trl.evaluation.overoptimisation import OveroptimisationFit, fit_overoptimisation

KL = torch.tensor([0.0, 0.25, 1.0, 4.0, 9.0])  # d = 0, 1/2, 1, 2, 3


def test_best_of_n_by_hand():
    # R = d (2 - d/2): 0, 7/8, 3/2, 2, 3/2; R' = 2 - d = 0 at d = 2, KL 4.
    gain = torch.tensor([0, 7 / 8, 3 / 2, 2, 3 / 2])
    fit = fit_overoptimisation(KL, gain, "best_of_n")
    assert (fit.a, fit.b) == pytest.approx((2, 0.5), abs=1e-6)
    assert fit.peak_kl == pytest.approx(4, abs=1e-5)
    torch.testing.assert_close(fit.gain(KL), gain.double(), atol=1e-6, rtol=0)


def test_rl_by_hand():
    # R = d (1 - log d): 0, (1 + log 2) / 2, 1, 2 (1 - log 2), 3 (1 - log 3); R' = -log d = 0 at d = 1.
    gain = torch.tensor([0, (1 + math.log(2)) / 2, 1, 2 * (1 - math.log(2)), 3 * (1 - math.log(3))])
    fit = fit_overoptimisation(KL, gain, "rl")
    assert (fit.a, fit.b) == pytest.approx((1, 1), abs=1e-6)
    assert fit.peak_kl == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(fit.gain(KL), gain.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("optimiser", "a", "b", "peak"),
    [
        ("best_of_n", 3, 0.5, 9.0),
        ("best_of_n", 1, 0, math.inf),  # rises for ever
        ("best_of_n", 1, -0.1, math.inf),
        ("best_of_n", -1, 0.1, 0.0),  # falls from the start
        ("best_of_n", -1, 0, 0.0),
        ("rl", 2, 1, math.exp(2)),
        ("rl", -1, 1, math.exp(-4)),  # -d log d outweighs any slope near 0
        ("rl", 1, 0, math.inf),
        ("rl", 1, -1, math.inf),
        ("rl", -1, 0, 0.0),
        ("rl", 1, 1e-9, math.inf),  # finite in theory, beyond every float
    ],
)
def test_the_peak(optimiser, a, b, peak):
    fit = OveroptimisationFit(optimiser, a, b, math.nan, math.nan)
    assert fit.peak_kl == pytest.approx(peak)
    if 0 < peak < math.inf:
        around = fit.gain(torch.tensor([0.9 * peak, peak, 1.1 * peak]))
        assert around[1] > around[0] and around[1] > around[2]


@pytest.mark.parametrize("optimiser", ["best_of_n", "rl"])
def test_standard_errors_cover_the_truth(optimiser):
    """Over 2,000 sets of noisy points, a and b average to the truth and spread as their standard errors say."""
    generator = torch.Generator().manual_seed(0)
    kl = torch.linspace(0.1, 10, 12, dtype=torch.float64)
    truth = OveroptimisationFit(optimiser, 1.5, 0.3, 0, 0).gain(kl)
    noise = 0.1 * torch.randn(2_000, 12, dtype=torch.float64, generator=generator)
    fits = [fit_overoptimisation(kl, truth + row, optimiser) for row in noise]
    for value, error, exact in (("a", "a_error", 1.5), ("b", "b_error", 0.3)):
        values = torch.tensor([getattr(fit, value) for fit in fits], dtype=torch.float64)
        errors = torch.tensor([getattr(fit, error) for fit in fits], dtype=torch.float64)
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(fits))
        assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=0.1)


def test_points_at_kl_0_add_nothing():
    kl, gain = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 1.2, 0.9])
    for optimiser in ("best_of_n", "rl"):
        fit = fit_overoptimisation(kl, gain, optimiser)
        again = fit_overoptimisation(torch.cat([torch.zeros(2), kl]), torch.cat([torch.zeros(2), gain]), optimiser)
        for name in ("a", "b", "a_error", "b_error"):
            assert getattr(again, name) == pytest.approx(getattr(fit, name), rel=1e-9)
        assert fit.gain(torch.tensor(0.0)).item() == 0


def test_two_points_are_met_exactly_and_leave_no_error():
    kl, gain = torch.tensor([1.0, 4.0]), torch.tensor([1.0, -2.0])
    fit = fit_overoptimisation(kl, gain, "best_of_n")
    torch.testing.assert_close(fit.gain(kl), gain.double())
    assert math.isnan(fit.a_error) and math.isnan(fit.b_error)


@pytest.mark.parametrize(
    ("kl", "gain", "message"),
    [
        ([1.0, 2.0], [1.0], r"got kl of shape \(2,\) and gain of shape \(1,\)"),
        ([[1.0, 2.0]], [[1.0, 2.0]], r"need \(points,\)"),
        ([1.0, math.nan], [1.0, 2.0], "need finite numbers"),
        ([1.0, 2.0], [1.0, math.inf], "need finite numbers"),
        ([-0.5, 1.0, 2.0], [0.0, 1.0, 2.0], "got a KL of -0.5, need at least 0 .* k1 can be negative"),
        ([0.0, 1.0, 2.0], [0.7, 1.0, 2.0], "at KL 0, need 0 .* subtract the initial policy's gold"),
        ([0.0, 1.0, 1.0], [0.0, 1.0, 2.0], "need at least two distinct values above 0"),
        ([], [], "need at least two distinct values above 0"),
    ],
)
def test_bad_input(kl, gain, message):
    with pytest.raises(ValueError, match=message):
        fit_overoptimisation(torch.tensor(kl), torch.tensor(gain), "rl")


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ValueError, match=r"got optimiser 'ppo', need one of \['best_of_n', 'rl'\]"):
        fit_overoptimisation(KL, KL, "ppo")


def test_a_fit_has_the_same_digits_wherever_its_points_lie_in_memory():
    kl = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values
    gain = kl.sqrt() * (1 - kl)
    found = set()
    for number in range(200):
        held = [torch.empty(1 + (37 * number * size) % 99, dtype=torch.float64) for size in range(number % 9)]
        found.add(fit_overoptimisation(kl.clone(), gain.clone(), "best_of_n"))
        del held
    assert len(found) == 1
