"""Modules on top of the embeddings: pooling, the linear heads (equation 4) and the aggregator (equations 5 and 6)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """
    Select the embedding of each row's last token, for decoders and encoders alike.

    Args:
        hidden (`Tensor` of shape (B, T, H)): Hidden states of rows padded on the right.
        lengths (`Tensor` of shape (B,)): Number of tokens of each row.

    Returns:
        `Tensor` of shape (B, H).
    """
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32, whatever the dtype of its input, its weights or autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(x.float(), self.weight.float(), bias)


class Aggregator(nn.Module):
    """
    The two-layer MLP `W_1 PReLU(W_0 z + B_0) + B_1` of equation 6, in fp32, without its sigma; or the mean of several, whose
    hidden layers stand side by side.

    Args:
        experts (`int`): k, the number of experts.
        input_size (`int`): How many numbers it reads of each: the H of an embedding, or 1 for a score.
        hidden_size (`int`): Width of the hidden layer of each MLP.
        members (`int`, *optional*, defaults to 1): Number of MLPs.
    """

    def __init__(self, experts: int, input_size: int, hidden_size: int, members: int = 1):
        super().__init__()
        self.hidden = Float32Linear(experts * input_size, members * hidden_size)
        self.activation = nn.PReLU(members)
        self.output = Float32Linear(members * hidden_size, 1)

    @torch.no_grad()
    def set_members(self, members: Sequence["Aggregator"]) -> None:
        """Take over the weights of single MLPs, as many as there are members, so that the output is the mean of theirs."""
        self.hidden.weight.copy_(torch.cat([member.hidden.weight for member in members]))
        self.hidden.bias.copy_(torch.cat([member.hidden.bias for member in members]))
        self.activation.weight.copy_(torch.cat([member.activation.weight for member in members]))
        self.output.weight.copy_(torch.cat([member.output.weight for member in members], 1) / len(members))
        self.output.bias.copy_(torch.stack([member.output.bias for member in members]).mean(0))

    @torch.no_grad()
    def start_from(self, weights: Tensor, biases: Tensor, x: Tensor) -> None:
        """
        Initialise a single MLP from the experts' own scores, which leaves far less to learn than starting from their
        embeddings.

        The first k hidden units are the standardised scores `w_i x_i + b_i`, the others random mixtures of them with
        random thresholds, and the output is the mean of the first k. All weights are trained afterwards.

        Args:
            weights (`Tensor` of shape (k, input_size)), biases (`Tensor` of shape (k,)): The w_i and b_i.
            x (`Tensor` of shape (N, k, input_size)): Inputs on which the scores are standardised.
        """
        k, size = weights.shape
        width = self.hidden.out_features
        scores = (x * weights).sum(2) + biases
        mean, std = scores.mean(0), scores.std(0).clamp(min=1e-6)
        mixture = torch.randn(width, k, device=x.device) / k**0.5
        mixture[:k] = torch.eye(k, device=x.device)[:width]
        self.hidden.weight.copy_((mixture.unsqueeze(2) * (weights / std.unsqueeze(1))).view(width, k * size))
        self.hidden.bias.copy_(mixture @ ((biases - mean) / std))
        self.hidden.bias[k:] += torch.randn(max(width - k, 0), device=x.device)
        self.output.weight.zero_()
        self.output.weight[:, :k] = 1 / k
        self.output.bias.zero_()

    @torch.no_grad()
    def fold_standardisation(self, mean: Tensor, std: Tensor) -> None:
        """
        Change the first layer of an MLP that was trained on `(x - mean) / std` so that it reads `x`.

        Args:
            mean (`Tensor` of shape (k, input_size)), std (`Tensor` of shape (k, input_size)): Statistics of the inputs.
        """
        self.hidden.weight.div_(std.flatten())
        self.hidden.bias.sub_(self.hidden.weight @ mean.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate the experts' inputs `x` of shape (B, k, input_size), concatenated as in equation 5, to shape (B, 1)."""
        with torch.autocast(x.device.type, enabled=False):  # PReLU is on autocast's list for CUDA
            slopes = self.activation.weight.float()
            hidden = self.hidden(x.flatten(1)).unflatten(1, (len(slopes), -1))
            return self.output(nn.functional.prelu(hidden, slopes).flatten(1))


def nan_of_overflow(logits: Tensor, z: Tensor) -> Tensor:
    """
    Set the logits to NaN if an embedding is infinite or NaN, because a sigmoid or a softmax would turn infinity into
    an ordinary number.

    Args:
        logits (`Tensor` of shape (B, n)): Outputs of the heads for the embeddings.
        z (`Tensor` of shape (B, ..., H)): The embeddings.
    """
    return logits.masked_fill(~z.isfinite().flatten(1).all(1, keepdim=True), torch.nan)


def activate(logits: Tensor, activation: str) -> Tensor:
    """Apply the sigma of equations 4 and 6: the logistic function for `"sigmoid"`, the identity for `"none"`."""
    return logits.sigmoid() if activation == "sigmoid" else logits
