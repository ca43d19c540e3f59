"""
What best of n is expected to give, for many n at once, from N >= n sampled responses a prompt.

Best of n draws n responses and keeps the one with the highest proxy score. One draw of n wastes N - n responses and is
noisy; the mean over all C(N, n) subsets is unbiased and uses every response (Nakano et al. 2021, "WebGPT", arXiv
2112.09332; Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization", appendix B). It needs no
enumeration: the response of rank i by proxy score, 1 the lowest, wins in C(i-1, n-1) subsets.
"""

from collections.abc import Sequence

import torch


def best_of_n_weights(responses: int, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """
    The chance that the response of each rank wins, in a subset of n drawn without replacement:
    `w_i = C(i-1, n-1) / C(N, n)` for the ranks i = 1..N, by the recurrence `w_N = n / N`, `w_i = w_{i+1} (i+1-n) / i`.

    Args:
        responses (`int`): N.
        n (`int`): Size of the subset, from 1 to N.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the weights are wanted.

    Returns:
        `torch.Tensor` of shape `(N,)`: Ascending by rank, sum 1, in float64. Those of ranks below n are 0, and those
        far below the top may underflow to 0.

    Raises:
        ValueError: n is below 1 or above N.
    """
    if not 1 <= n <= responses:
        raise ValueError(
            f"got n {n} for {responses} responses, need n from 1 to {responses} because the estimate draws n of them "
            "without replacement: sample more responses or leave this n out."
        )
    rank = torch.arange(responses - 1, n - 1, -1, dtype=torch.float64, device=device)  # N-1, ..., n
    steps = torch.cat([rank.new_tensor([n / responses]), (rank + 1 - n) / rank])
    return torch.cat([rank.new_zeros(n - 1), steps.cumprod(dim=0).flip(0)])


def best_of_n(scores: torch.Tensor, values: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """
    The unbiased estimate, for every n of the grid, of what best of n by `scores` gives in `values`.

    The values may be anything that each response has: the gold reward, the score itself (the proxy's curve), the
    [`win_share`], the length. The responses are sorted once, whatever the grid and however many values. Where scores
    are equal, each of the responses is as likely to win: their values are replaced by their mean, which is the exact
    expectation over breaking ties at random.

    Letters: N responses of one prompt, G values of n. Takes O(N (log N + G)) a prompt, and memory for a few float64
    copies of `values`, whatever the grid. Prompts do not mix: those with another N, or more than fit into memory, are
    calls of their own.

    Args:
        scores (`torch.Tensor` of shape `(..., N)`): Proxy scores, higher is better.
        values (`torch.Tensor` of shape `(*extra, ..., N)`): Values of the same responses, after any extra dimensions.
        grid (`Sequence[int]`): The G values of n, at least one, each from 1 to N, in any order.

    Returns:
        `torch.Tensor` of shape `(*extra, ..., G)`: In float64.

    Raises:
        ValueError: There is no response or no n, the shapes do not fit, a score or a value is NaN or infinite, or an n
            is below 1 or above N.

    Example:

    ```python
    >>> gold, proxy = best_of_n(scores, torch.stack([gold_rewards, scores]), grid=[1, 2, 4])
    ```
    """
    if scores.ndim == 0 or scores.numel() == 0:
        raise ValueError(
            f"got scores of shape {tuple(scores.shape)}, need (..., responses) with at least one response: a prompt "
            "without a response has no best one."
        )
    if values.shape[-scores.ndim :] != scores.shape:
        raise ValueError(
            f"got values of shape {tuple(values.shape)} and scores of shape {tuple(scores.shape)}, need one value a "
            "response: give gold exactly the responses that were scored, in the same order."
        )
    if len(grid) == 0:
        raise ValueError("got an empty grid, need at least one n: pass for example [1, 2, 4, 8].")
    _check_finite("scores", scores)
    _check_finite("values", values)

    scores, order = scores.sort(dim=-1)
    values = values.double().gather(-1, order.expand_as(values))
    values = _mean_over_ties(scores, values)
    curve = [values @ best_of_n_weights(scores.shape[-1], n, device=scores.device) for n in grid]
    return torch.stack(curve, dim=-1)


def win_share(rewards: torch.Tensor, base_rewards: torch.Tensor) -> torch.Tensor:
    """
    The share of the base policy's responses to the same prompt that each response beats, ties counting half. As the
    `values` of [`best_of_n`] it gives the win rate of best of n over the base policy.

    With gold rewards it is the gold win rate. With the proxy's own scores it says how the proxy rates itself: n/(n+1)
    when no two scores are equal, which is the highest win rate that best of n can have.

    The estimate of the win rate is unbiased where the base's responses are other samples than those chosen from. The
    same samples may be given where N is large: that shifts the win rate by less than 1.5/N.

    Args:
        rewards (`torch.Tensor` of shape `(..., N)`): Rewards of the responses, higher is better.
        base_rewards (`torch.Tensor` of shape `(..., M)`): Rewards of the base policy's responses to the same prompts.

    Returns:
        `torch.Tensor` of shape `(..., N)`: From 0 to 1, in float64.

    Raises:
        ValueError: There is no base response, the prompts differ in number, or a reward is NaN or infinite.
    """
    if base_rewards.ndim == 0 or base_rewards.shape[-1] == 0 or rewards.shape[:-1] != base_rewards.shape[:-1]:
        raise ValueError(
            f"got rewards of shape {tuple(rewards.shape)} and base rewards of shape {tuple(base_rewards.shape)}, need "
            "(..., responses) for the same prompts, with at least one response of the base policy."
        )
    _check_finite("rewards", rewards)
    _check_finite("base rewards", base_rewards)
    rewards, base_rewards = rewards.double().contiguous(), base_rewards.double().sort(dim=-1).values
    below = torch.searchsorted(base_rewards, rewards)
    not_above = torch.searchsorted(base_rewards, rewards, right=True)
    return (below + not_above).double() / (2 * base_rewards.shape[-1])


def _mean_over_ties(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """
    Replaces each value by the mean over the block of equal scores that it stands in.

    Args:
        scores (`torch.Tensor` of shape `(..., N)`): Ascending.
        values (`torch.Tensor` of shape `(*extra, ..., N)`): In the same order.
    """
    starts = (scores[..., 1:] != scores[..., :-1]).long()
    block = torch.cat([torch.zeros_like(scores[..., :1], dtype=torch.long), starts.cumsum(-1)], dim=-1)
    block = block.expand_as(values)
    mean = torch.zeros_like(values).scatter_reduce(-1, block, values, reduce="mean", include_self=False)
    return mean.gather(-1, block)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    bad = (~tensor.isfinite()).nonzero()
    if len(bad) > 0:
        index = tuple(bad[0].tolist())
        raise ValueError(
            f"got {name}{list(index)} = {tensor[index].item()} ({len(bad)} such of {tensor.numel()}), need finite "
            "numbers because NaN and inf have no order or mean: look for NaN in the weights or an overflow in half "
            "precision."
        )
