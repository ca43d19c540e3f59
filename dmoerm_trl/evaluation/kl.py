"""
How far an optimised policy is from the policy it started from, in nats: the x-axis of the paper's figure 5.

Best of n has no log-probabilities of its own, so its KL is a function of n (equation 11) or of n and the winners'
probabilities (Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", arXiv 2401.01879). The
KL of a trained policy is estimated on its samples: k1 and k2 (equations 13 and 14) and k3 (Schulman 2020,
"Approximating KL divergence", http://joschu.net/blog/kl-approx.html).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def best_of_n_kl_bound(n: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
    """
    The KL of best of n as equation 11 has it: `log n - (n - 1) / n`.

    It is exact where no response has a probability worth speaking of and no two have the same score, and an upper
    bound otherwise (Beirami et al. 2024): it grows without end, while the true KL stays below `-log p(y)` of the best
    response y.

    Args:
        n (`int`, `Sequence[int]` or `torch.Tensor` of shape `(...)`): Responses to choose from, at least 1.

    Returns:
        `torch.Tensor` of shape `(...)`: Nats, in float64.

    Raises:
        ValueError: An n is below 1.
    """
    n = torch.as_tensor(n, dtype=torch.float64)
    if not (n >= 1).all():
        raise ValueError(f"got n {n.tolist()}, need at least 1 because best of n chooses among n responses.")
    return n.log() - (n - 1) / n


def best_of_n_kl_estimate(log_probs: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
    """
    The tighter estimate of Beirami et al. 2024, section 4, for winners y of best of n. With e = p(y | prompt),

        (1 - e)^n (log n + (n - 1) log(1 - e) - (n - 1) / n) + (1 - (1 - e)^n) log((1 - (1 - e)^n) / e)

    whose mean over winners is the estimate. One value is the exact KL where the best response has probability e and
    all the others are negligible; so it lies between 0 and equation 11, and falls as e grows. The mean over winners is
    an upper bound of the exact KL too, below equation 11; so is the one value of the best response there is.

    The exact mean over the winners of N sampled responses, rather than over one draw of winners, is
    `best_of_n(scores, best_of_n_kl_estimate(log_probs, n), [n])`, see
    [`~dmoerm_trl.evaluation.best_of_n_estimate.best_of_n`].

    Args:
        log_probs (`torch.Tensor` of shape `(...)`):
            log p(y | prompt), summed over the tokens, under the distribution that was sampled from: after temperature
            and top-p, where they were used.
        n (`int` or `torch.Tensor` that broadcasts with `log_probs`): Responses to choose from, at least 1.

    Returns:
        `torch.Tensor` of the broadcast shape: Nats, in float64.

    Raises:
        ValueError: An n is below 1, or a log-probability is above 0, NaN or infinite.
    """
    if not (log_probs.isfinite() & (log_probs <= 0)).all():
        raise ValueError(
            f"got log-probabilities from {log_probs.min().item()} to {log_probs.max().item()}, need finite numbers of "
            "at most 0: sum log_softmax over the tokens of the response."
        )
    bound = best_of_n_kl_bound(n).to(log_probs.device)  # log n - (n - 1) / n
    n = torch.as_tensor(n, dtype=torch.float64, device=log_probs.device)
    # What underflows is as good as the smallest normal number: both terms have reached their limit long before.
    p = log_probs.double().exp().clamp_min(torch.finfo(torch.float64).tiny)
    log_miss = n * torch.log1p(-p)  # none of the n responses is y
    hit = -torch.expm1(log_miss)
    return log_miss.exp() * bound + (n - 1) * torch.special.xlog1py(log_miss.exp(), -p) + torch.xlogy(hit, hit / p)


def k1(log_ratio: torch.Tensor) -> torch.Tensor:
    """
    `d = log pi - log pi_ref` itself, equation 13. Unbiased for KL(pi || pi_ref); often negative, of high variance.

    Args:
        log_ratio (`torch.Tensor` of shape `(...)`): d, on samples of pi (not of pi_ref).
    """
    return log_ratio


def k2(log_ratio: torch.Tensor) -> torch.Tensor:
    """
    `d^2 / 2`, equation 14. Never negative, of low variance, biased by the third order of d: for two Gaussians of one
    variance, whose KL is K, its mean is K + K^2 / 2.

    Args:
        log_ratio (`torch.Tensor` of shape `(...)`): d, on samples of pi (not of pi_ref).
    """
    return log_ratio.square() / 2


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """
    `exp(-d) - 1 + d`, Schulman 2020. Unbiased and never negative. Its variance is below k1's while d is small, and
    above it where pi has moved far: exp(-d) has a heavy tail.

    Args:
        log_ratio (`torch.Tensor` of shape `(...)`): d, on samples of pi (not of pi_ref). With the opposite sign the
            result would be biased and still look sound: positive, and 0 for equal policies.
    """
    return torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True)
class KLEstimate:
    """
    An estimate of KL(pi || pi_ref), in nats.

    Args:
        per_sequence (`torch.Tensor` of shape `(sequences,)`): One value a sampled sequence. Gather these across
            processes and build the estimate anew; means and errors cannot be gathered.
    """

    per_sequence: torch.Tensor

    @property
    def mean(self) -> float:
        """The estimate."""
        return self.per_sequence.mean().item()

    @property
    def standard_error(self) -> float:
        """Of the mean, for sequences drawn independently; NaN for one sequence, which says nothing of the spread."""
        if len(self.per_sequence) == 1:
            return math.nan
        return self.per_sequence.std().item() / math.sqrt(len(self.per_sequence))


def policy_kl(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask: torch.Tensor) -> dict[str, KLEstimate]:
    """
    Estimates KL(pi || pi_ref) of whole responses sampled from pi: [`k1`], [`k2`] and [`k3`] of every token, summed over
    the tokens of the response.

    The sum over tokens is unbiased wherever the estimator of one token is, because the KL of a response is the
    expected sum of its tokens' KL. Equation 14, read as the square of the whole response's log-ratio, is another
    number, with a bias that grows with the length: `k2(estimates["k1"].per_sequence)`.

    Letters: B sequences, T tokens at most.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`): log pi of each sampled token, under the same temperature as
            `ref_log_probs`.
        ref_log_probs (`torch.Tensor` of shape `(B, T)`): log pi_ref of the same tokens.
        mask (`torch.Tensor` of shape `(B, T)`): 1 or True for the tokens of the response, its end included; 0 or
            False for the prompt and the padding, where the log-probabilities may be anything.

    Returns:
        `dict[str, KLEstimate]`: Of `"k1"`, `"k2"` and `"k3"`, in float32 (in float64, if that is what was given).

    Raises:
        ValueError: The shapes differ, there is no sequence, or a log-probability under the mask is NaN or infinite.
    """
    if log_probs.ndim != 2 or len(log_probs) == 0 or not log_probs.shape == ref_log_probs.shape == mask.shape:
        raise ValueError(
            f"got log_probs of shape {tuple(log_probs.shape)}, ref_log_probs of shape {tuple(ref_log_probs.shape)} and "
            f"a mask of shape {tuple(mask.shape)}, need one shape (sequences, tokens) with at least one sequence: pass "
            "what both policies give to the same tokens."
        )
    mask = mask.bool()
    for name, values in (("log_probs", log_probs), ("ref_log_probs", ref_log_probs)):
        bad = (mask & ~values.isfinite()).nonzero()
        if len(bad) > 0:
            sequence, token = bad[0].tolist()
            raise ValueError(
                f"got {name} {values[sequence, token].item()} at sequence {sequence}, token {token}, need a finite "
                "number because that token was sampled: take log_softmax of the logits in float32, before top-k or "
                "top-p filter them, and mask the padding out."
            )
    dtype = torch.promote_types(torch.promote_types(log_probs.dtype, ref_log_probs.dtype), torch.float32)
    log_ratio = (log_probs.to(dtype) - ref_log_probs.to(dtype)).masked_fill(~mask, 0)  # every estimator is 0 at 0
    return {
        name: KLEstimate(estimator(log_ratio).sum(dim=-1)) for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3))
    }
