"""
Fits of the gold reward, which rises and falls as a policy moves away from its initial policy. The equations for best of n and
for reinforcement learning are those of Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", ICML.

Notation: d = sqrt(KL(pi || pi_init)); R(d) is the gain in gold reward over the initial policy, so that R(0) = 0.
"""

import math
from dataclasses import dataclass

import torch

_BENDS = {
    "best_of_n": lambda d: d.square(),  # R = a d - b d^2
    "rl": lambda d: torch.xlogy(d, d),  # R = a d - b d log d, 0 at d = 0
}


@dataclass(frozen=True)
class OveroptimisationFit:
    """
    Fitted curve of the gain in gold reward: `R(d) = d (a - b d)` for best of n, `R(d) = d (a - b log d)` for RL.

    Args:
        optimiser (`str`): `"best_of_n"` or `"rl"`.
        a (`float`): Initial rise of the gold reward: the slope at d = 0 for best of n, R(1) for RL.
        b (`float`): Strength of the downward bend; b > 0 indicates overoptimisation.
        a_error (`float`): Standard error of `a` by ordinary least squares, which assumes independent points of equal
            variance: it is too small for points from the same samples or the same run. NaN for only two points.
        b_error (`float`): Standard error of `b`, likewise.
    """

    optimiser: str
    a: float
    b: float
    a_error: float
    b_error: float

    def gain(self, kl: torch.Tensor) -> torch.Tensor:
        """Compute R at the given KL, of shape `(...)` in nats; in float64."""
        d = torch.as_tensor(kl, dtype=torch.float64).sqrt()
        return self.a * d - self.b * _BENDS[self.optimiser](d)

    @property
    def peak_kl(self) -> float:
        """
        The KL, in nats, at which R is greatest: `(a / 2b)^2` for best of n, `exp(2 (a/b - 1))` for RL. It is 0 if R falls
        from the start, and infinite if R never stops rising. Beyond the largest fitted KL, it is an extrapolation.
        """
        if self.b < 0 or (self.b == 0 and self.a > 0):
            return math.inf
        if self.b == 0 or (self.optimiser == "best_of_n" and self.a <= 0):
            return 0.0
        if self.optimiser == "best_of_n":
            return (self.a / (2 * self.b)) ** 2
        return torch.tensor(2 * (self.a / self.b - 1), dtype=torch.float64).exp().item()  # inf where math.exp raises


def fit_overoptimisation(kl: torch.Tensor, gain: torch.Tensor, optimiser: str) -> OveroptimisationFit:
    """
    Fit the curve of Gao et al. by least squares. Both curves are linear in a and b, so the solution is exact and needs no
    starting point.

    Args:
        kl (`torch.Tensor` of shape `(points,)`): KL in nats, not negative, with at least two distinct values above 0.
        gain (`torch.Tensor` of shape `(points,)`): Mean gold reward minus that of the initial policy. A point at KL
            0 has gain 0 and does not affect the fit.
        optimiser (`str`): `"best_of_n"` or `"rl"`, which selects the curve.

    Returns:
        [`OveroptimisationFit`]: The fitted curve.

    Raises:
        ValueError: If the shapes differ, a number is NaN or infinite, a KL is negative, a gain at KL 0 is not 0, or there
            are fewer than two distinct KL above 0.
    """
    if optimiser not in _BENDS:
        raise ValueError(f"got optimiser {optimiser!r}, need one of {sorted(_BENDS)}.")
    kl, gain = (torch.as_tensor(tensor, dtype=torch.float64, device="cpu") for tensor in (kl, gain))
    if kl.ndim != 1 or kl.shape != gain.shape:
        raise ValueError(f"got kl of shape {tuple(kl.shape)} and gain of shape {tuple(gain.shape)}, need (points,).")
    if not (kl.isfinite() & gain.isfinite()).all():
        raise ValueError(f"got kl {kl.tolist()} and gain {gain.tolist()}, need finite numbers: leave out the others.")
    if (kl < 0).any():
        raise ValueError(
            f"got a KL of {kl.min().item()}, need at least 0 because the fit takes its root: k1 can be negative, k2 "
            "and k3 cannot."
        )
    if (gain[kl == 0].abs() > 1e-6 * gain.abs().sum()).any():
        raise ValueError(
            f"got gain {gain[kl == 0].tolist()} at KL 0, need 0 because both curves start there: subtract the initial "
            "policy's gold reward from every point."
        )
    moved = kl > 0
    if len(kl[moved].unique()) < 2:
        raise ValueError(
            f"got kl {kl.tolist()}, need at least two distinct values above 0 because the curve has two unknowns."
        )
    # Gram-Schmidt in plain sums, because the last digits of LAPACK's solution depend on memory alignment
    gain, first = gain[moved], kl[moved].sqrt()
    second = -_BENDS[optimiser](first)
    share = (first * second).sum() / first.square().sum()
    rest = second - share * first
    b = (rest * gain).sum() / rest.square().sum()
    a = (first * gain).sum() / first.square().sum() - share * b
    degrees = len(first) - 2
    residual = (gain - a * first - b * second).square().sum() / degrees if degrees > 0 else math.nan
    inverse = torch.stack([1 / first.square().sum() + share**2 / rest.square().sum(), 1 / rest.square().sum()])
    return OveroptimisationFit(optimiser, float(a), float(b), *(residual * inverse).sqrt().tolist())
