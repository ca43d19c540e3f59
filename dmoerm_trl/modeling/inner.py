"""The inner layer of one task: the heads of its base and its experts, the aggregator, and the normalisation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..tasks import slug
from .configuration_dmoerm import DMoERMConfig
from .experts import adapter_name
from .heads import Aggregator, Float32Linear, activate, nan_of_overflow

SMALLEST_STD = torch.finfo(torch.float32).eps
"""
Smallest standard deviation of rewards, about 1e-7.

Below it the rewards of an fp32 model differ only by rounding; above its inverse the normalised ones would.
"""


def new_aggregator(config: DMoERMConfig, points: int, **changes: int) -> Aggregator:
    """Build an untrained aggregator for a number of points; `changes` replace arguments of [`Aggregator`]."""
    size = config.backbone_config.hidden_size
    inputs = (points, size if config.aggregator_input == "embeddings" else 1)
    widths = {"hidden_size": config.aggregator_hidden_size or size, "members": config.aggregator_members}
    return Aggregator(*inputs, **{**widths, **changes})


class InnerModel(nn.Module):
    """
    The part of a task's inner model that turns the backbone's embeddings into the reward. Without capability points it
    is the head of a single reward model.

    Args:
        config (`DMoERMConfig`): Configuration of the complete model.
        task (`str`): One of `config.tasks`.
    """

    def __init__(self, config: DMoERMConfig, task: str):
        super().__init__()
        size = config.backbone_config.hidden_size
        self.points = config.tasks[task]
        self.adapters = [adapter_name(task, point) for point in self.points]
        self.activation = config.activation
        self.reads_scores = config.aggregator_input == "scores"
        self.base_head = Float32Linear(size, 1)
        self.expert_heads = nn.ModuleDict({slug(point): Float32Linear(size, 1) for point in self.points})
        self.aggregator = None
        if self.points:
            self.aggregator = new_aggregator(config, len(self.points))
        self.register_buffer("reward_mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("reward_std", torch.ones((), dtype=torch.float32))

    def capability_scores(self, z: Tensor, points: Sequence[str] | None = None) -> Tensor:
        """
        Compute the capability scores of equation 4, `r_i = sigma(w_i z_i + b_i)`.

        Args:
            z (`Tensor` of shape (B, k, H)): The experts' embeddings.
            points (`Sequence[str]`, *optional*): The experts' k capability points; all of the task by default.

        Returns:
            `Tensor` of shape (B, k).
        """
        points = self.points if points is None else points
        return activate(self._logits(z, points), self.activation)

    def aggregator_inputs(self, z: Tensor) -> Tensor:
        """
        Return what the aggregator reads of the experts' embeddings `z` of shape (B, k, H): z itself, as in equation 5, or the
        experts' scores before sigma, shape (B, k, 1).
        """
        return self._logits(z, self.points).unsqueeze(2) if self.reads_scores else z

    def _logits(self, z: Tensor, points: Sequence[str]) -> Tensor:
        """Compute `w_i z_i + b_i` of equation 4, shape (B, k)."""
        logits = [self.expert_heads[slug(point)](z[:, i]) for i, point in enumerate(points)]
        return torch.cat(logits, 1) if logits else z.new_zeros(len(z), 0, dtype=torch.float32)

    def reward(self, z: Tensor) -> Tensor:
        """
        Compute the normalised reward of equations 5 and 6: `(sigma(MLP(z)) - mean) / std`. Without experts
        `sigma(w z + b)` of the base's head takes the place of `sigma(MLP(z))`. With `aggregator_input="scores"` the MLP
        reads [`InnerModel.aggregator_inputs`] instead of z.

        Args:
            z (`Tensor` of shape (B, max(k, 1), H)): The embeddings.

        Returns:
            `Tensor` of shape (B, 1), fp32; NaN where an embedding is not finite.
        """
        logits = self.base_head(z[:, 0]) if self.aggregator is None else self.aggregator(self.aggregator_inputs(z))
        return (activate(nan_of_overflow(logits, z), self.activation) - self.reward_mean) / self.reward_std

    def check_normalisation(self) -> None:
        """
        Check the numbers that normalise the rewards.

        Raises:
            ValueError: If they would not preserve the order of the rewards.
        """
        mean, std = float(self.reward_mean), float(self.reward_std)
        if not (SMALLEST_STD <= std <= 1 / SMALLEST_STD and abs(mean) <= 1 / SMALLEST_STD):
            raise ValueError(
                f"got a normalisation by reward_mean={mean} and reward_std={std}, need a standard deviation from "
                f"{SMALLEST_STD:.1g} to {1 / SMALLEST_STD:.1g} and a mean of at most that size, because others turn the order "
                "of the rewards around or round it away: take the numbers from the run's model card, or train phase 3 again."
            )

    def set_normalisation(self, rewards: Tensor, unit_variance: bool = False) -> None:
        """
        Set the normalisation so that the rewards of a reference set have zero mean and, optionally, unit variance.

        Args:
            rewards (`Tensor` of shape (N,)): The rewards of the reference set under the current normalisation.
            unit_variance (`bool`): Whether to divide the rewards by their standard deviation too.

        Raises:
            ValueError: If there are no rewards, they are not finite, or `unit_variance` is set and they hardly differ.
        """
        rewards = rewards.double() * self.reward_std.double() + self.reward_mean.double()
        std = rewards.std(correction=0) if len(rewards) else rewards.new_zeros(())
        if (
            not len(rewards)
            or not rewards.isfinite().all()
            or (unit_variance and not SMALLEST_STD <= std <= 1 / SMALLEST_STD)
        ):
            raise ValueError(
                f"got {len(rewards)} reference rewards with a standard deviation of {float(std)}, need finite rewards "
                "that differ: give a reference set of more than one text, or leave `unit_variance` off."
            )
        self.reward_mean.copy_(rewards.mean())
        self.reward_std.copy_(std if unit_variance else torch.ones_like(std))
