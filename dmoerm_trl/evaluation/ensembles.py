"""
The ensemble baselines of section 5.2: the rewards of k reward models, which differ in their seed alone, made into one.

Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization", ICLR; Eisenstein et al. 2023, "Helping or
Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking", arXiv 2312.09244; Zhai et al. 2024,
"Uncertainty-Penalized Reinforcement Learning from Human Feedback with Diverse Reward LoRA Ensembles", arXiv
2401.00243.

Letters: k members, r_i(x) the reward that member i gives to x. Every function takes `rewards` of shape `(k, ...)` and
returns one reward of shape `(...)`. A reward model's zero and scale are arbitrary and differ from member to member, so
[`standardise`] the members first.
"""

import torch


def standardise(rewards: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """
    Brings the members to one zero and one scale, `(r_i - mean_i) / std_i`.

    Args:
        rewards (`torch.Tensor` of shape `(k, ...)`): Rewards of each member.
        mean (`torch.Tensor` of shape `(k,)`): Each member's mean reward on a reference set.
        std (`torch.Tensor` of shape `(k,)`): Each member's standard deviation there. It is kept with the mean, so that
            a response gets the same reward whatever it is scored together with.

    Returns:
        `torch.Tensor` of shape `(k, ...)`.

    Raises:
        ValueError: The shapes do not fit, or a standard deviation is not a positive number.
    """
    _check_members(rewards)
    members = rewards.shape[:1]
    if mean.shape != members or std.shape != members:
        raise ValueError(
            f"got mean of shape {tuple(mean.shape)} and std of shape {tuple(std.shape)}, need {tuple(members)}: one "
            "number a member."
        )
    if not (torch.isfinite(std) & (std > 0)).all():
        raise ValueError(
            f"got std {std.tolist()}, need positive numbers because a member that gives all of the reference set one "
            "reward cannot be standardised: check that it was trained and that the reference set is not one response."
        )
    shape = (-1,) + (1,) * (rewards.ndim - 1)
    return (rewards - mean.view(shape)) / std.view(shape)


def mean_reward(rewards: torch.Tensor) -> torch.Tensor:
    """
    Mean optimisation, equation 8: `R(x) = 1/k sum_i r_i(x)`.

    Args:
        rewards (`torch.Tensor` of shape `(k, ...)`): Standardised rewards of each member.
    """
    _check_members(rewards)
    return rewards.mean(dim=0)


def worst_case_reward(rewards: torch.Tensor) -> torch.Tensor:
    """
    Worst-case optimisation (WCO), equation 9: `R(x) = min_i r_i(x)`.

    Args:
        rewards (`torch.Tensor` of shape `(k, ...)`): Standardised rewards of each member.
    """
    _check_members(rewards)
    return rewards.amin(dim=0)


def uncertainty_weighted_reward(rewards: torch.Tensor, coefficient: float = 0.5) -> torch.Tensor:
    """
    Uncertainty-weighted optimisation (UWO), equation 10, with m(x) the mean of equation 8:
    `R(x) = m(x) - coefficient * 1/k sum_i (r_i(x) - m(x))^2`.

    The second term is the population variance over the members (divided by k, not k - 1). The paper's tables call the
    method "mean minus std"; this is its equation, which subtracts the variance.

    Args:
        rewards (`torch.Tensor` of shape `(k, ...)`): Standardised rewards of each member.
        coefficient (`float`, *optional*, defaults to `0.5`): The equation's lambda, to which the paper gives no value.
    """
    _check_members(rewards)
    return rewards.mean(dim=0) - coefficient * rewards.var(dim=0, correction=0)


def _check_members(rewards: torch.Tensor) -> None:
    if rewards.ndim == 0 or rewards.shape[0] == 0:
        raise ValueError(f"got rewards of shape {tuple(rewards.shape)}, need (members, ...) with at least one member.")
