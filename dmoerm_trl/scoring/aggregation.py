"""
Aggregate the rewards of an ensemble, k reward models that differ only in their seed: the baselines of section 5.2.

Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization", ICLR; Eisenstein et al. 2023, "Helping or
Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking", arXiv 2312.09244; Zhai et al. 2024,
"Uncertainty-Penalized Reinforcement Learning from Human Feedback with Diverse Reward LoRA Ensembles", arXiv
2401.00243.

Letters: k members, r_i(x) the reward that member i gives to x. Every function takes `rewards` of shape `(k, ...)` and
returns one reward of shape `(...)`. A reward model's zero and scale are arbitrary and differ from member to member, so
members are standardised first: each model holds the mean and the standard deviation that do it, see
[`~dmoerm_trl.training.phases.normalise`].
"""

import torch


def mean_reward(rewards: torch.Tensor) -> torch.Tensor:
    """
    Compute the mean over members, equation 8: `R(x) = 1/k sum_i r_i(x)`.

    Args:
        rewards (`torch.Tensor` of shape `(k, ...)`): Standardised rewards of each member.

    Example:

    ```python
    import torch
    from dmoerm_trl import mean_reward

    rewards = torch.tensor([[1.0, 0.0], [3.0, 2.0]])  # two members, two texts
    assert mean_reward(rewards).tolist() == [2.0, 1.0]
    ```
    """
    _check_members(rewards)
    return rewards.mean(dim=0)


def worst_case_reward(rewards: torch.Tensor) -> torch.Tensor:
    """
    Compute the minimum over members, worst-case optimisation (WCO), equation 9: `R(x) = min_i r_i(x)`.

    Args:
        rewards (`torch.Tensor` of shape `(k, ...)`): Standardised rewards of each member.

    Example:

    ```python
    import torch
    from dmoerm_trl import worst_case_reward

    rewards = torch.tensor([[1.0, 0.0], [3.0, 2.0]])  # two members, two texts
    assert worst_case_reward(rewards).tolist() == [1.0, 0.0]
    ```
    """
    _check_members(rewards)
    return rewards.amin(dim=0)


def uncertainty_weighted_reward(rewards: torch.Tensor, coefficient: float = 0.5) -> torch.Tensor:
    """
    Compute the mean minus a multiple of the variance, uncertainty-weighted optimisation (UWO), equation 10, with m(x) of
    equation 8: `R(x) = m(x) - coefficient * 1/k sum_i (r_i(x) - m(x))^2`.

    The second term is the population variance over the members (divided by k, not k - 1). The paper's tables call the
    method "mean minus std"; this is its equation, which subtracts the variance.

    Args:
        rewards (`torch.Tensor` of shape `(k, ...)`): Standardised rewards of each member.
        coefficient (`float`, *optional*, defaults to `0.5`): Lambda of the equation, whose value the paper does not give.

    Example:

    ```python
    import torch
    from dmoerm_trl import uncertainty_weighted_reward

    rewards = torch.tensor([[1.0, 1.0], [3.0, 1.0]])  # two members that disagree on the first text
    assert uncertainty_weighted_reward(rewards)[0] < 2.0 and uncertainty_weighted_reward(rewards)[1] == 1.0
    ```
    """
    _check_members(rewards)
    return rewards.mean(dim=0) - coefficient * rewards.var(dim=0, correction=0)


def _check_members(rewards: torch.Tensor) -> None:
    if rewards.ndim == 0 or rewards.shape[0] == 0:
        raise ValueError(f"got rewards of shape {tuple(rewards.shape)}, need (members, ...) with at least one member.")


AGGREGATIONS = {"mean": mean_reward, "WCO": worst_case_reward, "UWO": uncertainty_weighted_reward}
"""Equations 8 to 10."""
