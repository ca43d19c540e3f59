"""
KL divergence of an optimised policy from its initial policy, in nats: the x-axis of the paper's figure 5.

Best of n has no log-probabilities of its own, so its KL is computed from n (equation 11), or from n and the winners'
probabilities (Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", arXiv 2401.01879). The
KL of a trained policy is estimated on its samples by k1 and k2 (equations 13 and 14) and k3 (Schulman 2020,
"Approximating KL divergence", http://joschu.net/blog/kl-approx.html).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def best_of_n_kl_bound(n: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
    """
    Compute the KL of best of n by equation 11: `log n - (n - 1) / n`.

    It is exact if every response has a negligible probability and no two have the same score, and an upper bound otherwise
    (Beirami et al. 2024): it grows without limit, while the true KL stays below `-log p(y)` of the best response y.

    Args:
        n (`int`, `Sequence[int]` or `torch.Tensor` of shape `(...)`): Number of responses to choose from, at least 1.

    Returns:
        `torch.Tensor` of shape `(...)`: KL in nats, in float64.

    Raises:
        ValueError: If an n is below 1.

    Example:

    ```python
    from dmoerm_trl import best_of_n_kl_bound

    assert round(float(best_of_n_kl_bound(4)), 3) == 0.636  # nats
    ```
    """
    n = torch.as_tensor(n, dtype=torch.float64)
    if not (n >= 1).all():
        raise ValueError(f"got n {n.tolist()}, need at least 1 because best of n chooses among n responses.")
    return n.log() - (n - 1) / n


def best_of_n_kl_estimate(log_probs: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
    """
    Compute the tighter estimate of Beirami et al. 2024, section 4, for winners y of best of n. With e = p(y | prompt), it is
    the mean over winners of

        (1 - e)^n (log n + (n - 1) log(1 - e) - (n - 1) / n) + (1 - (1 - e)^n) log((1 - (1 - e)^n) / e)

    A single value is the exact KL if the best response has probability e and all others are negligible. It lies between 0
    and equation 11, and falls as e grows. The mean over winners is an upper bound of the exact KL, and is below equation
    11. So is the single value of the best possible response.

    The exact mean over the winners of N sampled responses, instead of over one draw of winners, is
    `best_of_n(scores, best_of_n_kl_estimate(log_probs, n), [n])`, see
    [`~dmoerm_trl.evaluation.best_of_n_estimate.best_of_n`].

    Args:
        log_probs (`torch.Tensor` of shape `(...)`):
            log p(y | prompt), summed over the tokens, under the sampling distribution: after temperature and top-p, if
            they were used.
        n (`int` or `torch.Tensor` that broadcasts with `log_probs`): Number of responses to choose from, at least 1.

    Returns:
        `torch.Tensor` of the broadcast shape: Values in nats, in float64.

    Raises:
        ValueError: If an n is below 1, or a log-probability is above 0, NaN or infinite.

    Example:

    ```python
    import torch
    from dmoerm_trl import best_of_n_kl_estimate

    best_of_n_kl_estimate(torch.tensor([-20.0, -30.0]), 4)  # of two winners with these log-probabilities
    ```
    """
    if not (log_probs.isfinite() & (log_probs <= 0)).all():
        raise ValueError(
            f"got log-probabilities from {log_probs.min().item()} to {log_probs.max().item()}, need finite numbers of "
            "at most 0: sum log_softmax over the tokens of the response."
        )
    bound = best_of_n_kl_bound(n).to(log_probs.device)  # log n - (n - 1) / n
    n = torch.as_tensor(n, dtype=torch.float64, device=log_probs.device)
    # Replacing an underflow by the smallest normal number is harmless: both terms reach their limit long before.
    p = log_probs.double().exp().clamp_min(torch.finfo(torch.float64).tiny)
    log_miss = n * torch.log1p(-p)  # none of the n responses is y
    hit = -torch.expm1(log_miss)
    return log_miss.exp() * bound + (n - 1) * torch.special.xlog1py(log_miss.exp(), -p) + torch.xlogy(hit, hit / p)


def k1(log_ratio: torch.Tensor) -> torch.Tensor:
    """
    Return the log-ratio `d = log pi - log pi_ref` itself (equation 13). As an estimator of KL(pi || pi_ref), it is unbiased,
    but often negative and of high variance.

    Args:
        log_ratio (`torch.Tensor` of shape `(...)`): d, on samples of pi (not of pi_ref).
    """
    return log_ratio


def k2(log_ratio: torch.Tensor) -> torch.Tensor:
    """
    Compute the estimator `d^2 / 2` (equation 14). It is never negative and has a low variance. Its bias is of third order in d:
    for two Gaussians with the same variance and KL K, its mean is K + K^2 / 2.

    Args:
        log_ratio (`torch.Tensor` of shape `(...)`): d, on samples of pi (not of pi_ref).
    """
    return log_ratio.square() / 2


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """
    Compute the estimator `exp(-d) - 1 + d` (Schulman 2020), which is unbiased and never negative. Its variance is lower than
    that of k1 for small d, and higher if pi has moved far from pi_ref, because exp(-d) has a heavy tail.

    Args:
        log_ratio (`torch.Tensor` of shape `(...)`): d, on samples of pi (not of pi_ref). With the opposite sign, the result
            would be biased but look plausible: positive, and 0 for equal policies.
    """
    return torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True)
class KLEstimate:
    """
    Estimate of KL(pi || pi_ref), in nats.

    Args:
        per_sequence (`torch.Tensor` of shape `(sequences,)`): One value per sampled sequence. To combine
            processes, gather these and build a new estimate; means and errors cannot be gathered.
    """

    per_sequence: torch.Tensor

    @property
    def mean(self) -> float:
        """The estimate: the mean over sequences."""
        return self.per_sequence.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, for independently sampled sequences; NaN for a single sequence."""
        if len(self.per_sequence) == 1:
            return math.nan
        return self.per_sequence.std().item() / math.sqrt(len(self.per_sequence))


def policy_kl(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask: torch.Tensor) -> dict[str, KLEstimate]:
    """
    Estimate KL(pi || pi_ref) on complete responses sampled from pi: [`k1`], [`k2`] and [`k3`] of each token, summed over the
    tokens of the response.

    The sum over tokens is unbiased if the estimator for one token is, because the KL of a response is the expected sum of its
    tokens' KL. Applying equation 14 to the log-ratio of the entire response instead gives a different number,
    `k2(estimates["k1"].per_sequence)`, whose bias grows with the length.

    Notation: B sequences of at most T tokens.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`): log pi of each sampled token, at the same temperature as
            `ref_log_probs`.
        ref_log_probs (`torch.Tensor` of shape `(B, T)`): log pi_ref of the same tokens.
        mask (`torch.Tensor` of shape `(B, T)`): 1 or True for the tokens of the response, including its end token; 0
            or False for the prompt and the padding, where any log-probabilities are allowed.

    Returns:
        `dict[str, KLEstimate]`: Estimates `"k1"`, `"k2"` and `"k3"`, in float32 (in float64 for float64 inputs).

    Raises:
        ValueError: If the shapes differ, there is no sequence, or a log-probability under the mask is NaN or infinite.

    Example:

    ```python
    import torch
    from dmoerm_trl import policy_kl

    log_p, log_q, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]]), torch.ones(1, 2)
    estimates = policy_kl(log_p, log_q, mask)
    ```
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
