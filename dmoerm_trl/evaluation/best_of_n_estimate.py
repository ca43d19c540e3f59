"""
Expected outcome of best of n, for many n at once, from N >= n sampled responses per prompt.

Best of n draws n responses and keeps the one with the highest proxy score. A single draw of n wastes N - n responses and is
noisy; the mean over all C(N, n) subsets is unbiased and uses every response (Nakano et al. 2021, "WebGPT", arXiv
2112.09332; Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization", appendix B). The subsets need not be
enumerated: the response of rank i by proxy score, where 1 is the lowest, wins in C(i-1, n-1) of them.
"""

from collections.abc import Sequence

import torch


def best_of_n_weights(responses: int, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """
    Compute the probability that the response of each rank wins in a subset of n drawn without replacement:
    `w_i = C(i-1, n-1) / C(N, n)` for the ranks i = 1..N, by the recurrence `w_N = n / N`, `w_i = w_{i+1} (i+1-n) / i`.

    Args:
        responses (`int`): N.
        n (`int`): Size of the subset, from 1 to N.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Device of the weights.

    Returns:
        `torch.Tensor` of shape `(N,)`: Weights by ascending rank, with sum 1, in float64. Ranks below n have weight 0, and the
        weights of low ranks may underflow to 0.

    Raises:
        ValueError: If n is below 1 or above N.
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
    Estimate without bias, for every n of the grid, the expected `values` of the response that best of n by `scores` chooses.

    The values may be any quantity of a response: the gold reward, the score itself (the proxy's curve), the [`win_share`], the
    length. The responses are sorted only once for all n and all values. Responses with equal scores are equally likely to win:
    their values are replaced by their mean, which is the exact expectation over random tie-breaking.

    Notation: N responses per prompt, G values of n. The estimate takes O(N (log N + G)) time per prompt, and memory for a few
    float64 copies of `values`. Prompts are independent of each other: use separate calls for prompts with another N, or if they
    do not fit into memory together.

    Args:
        scores (`torch.Tensor` of shape `(..., N)`): Proxy scores, higher is better.
        values (`torch.Tensor` of shape `(*extra, ..., N)`): Values of the same responses, with any extra leading dimensions.
        grid (`Sequence[int]`): The G values of n, at least one, each from 1 to N, in any order.

    Returns:
        `torch.Tensor` of shape `(*extra, ..., G)`: The estimates, in float64.

    Raises:
        ValueError: If there is no response or no n, the shapes do not match, a score or a value is NaN or infinite, or an n is
            below 1 or above N.

    Example:

    ```python
    import torch
    from dmoerm_trl import best_of_n

    scores = torch.tensor([0.1, 0.7, 0.3])  # by the reward model, of three responses
    gold = torch.tensor([0.0, 1.0, 2.0])
    assert best_of_n(scores, gold, grid=[1, 3]).tolist() == [1.0, 1.0]  # the mean of all; that of the best by score
    ```
    """
    if scores.ndim == 0 or scores.numel() == 0:
        raise ValueError(
            f"got scores of shape {tuple(scores.shape)}, need (..., responses) with at least one response: a prompt "
            "without a response has no best one."
        )
    if values.shape[-scores.ndim :] != scores.shape:
        raise ValueError(
            f"got values of shape {tuple(values.shape)} and scores of shape {tuple(scores.shape)}, need one value per "
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
    Compute the share of the base policy's responses to the same prompt that each response beats; ties count half. Passed as
    `values` to [`best_of_n`], it gives the win rate of best of n over the base policy.

    With gold rewards this is the gold win rate. With the proxy's own scores it is the win rate that the proxy gives itself:
    n/(n+1) if no two scores are equal, the highest possible win rate of best of n.

    The estimate of the win rate is unbiased if the base policy's responses are different samples from those to choose from. If
    N is large, the same samples may be used; this shifts the win rate by less than 1.5/N.

    Args:
        rewards (`torch.Tensor` of shape `(..., N)`): Rewards of the responses, higher is better.
        base_rewards (`torch.Tensor` of shape `(..., M)`): Rewards of the base policy's responses to the same prompts.

    Returns:
        `torch.Tensor` of shape `(..., N)`: Shares from 0 to 1, in float64.

    Raises:
        ValueError: If there is no base response, the numbers of prompts differ, or a reward is NaN or infinite.
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
    Replace each value by the mean over its block of equal scores.

    Args:
        scores (`torch.Tensor` of shape `(..., N)`): Scores in ascending order.
        values (`torch.Tensor` of shape `(*extra, ..., N)`): Values in the same order.
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
