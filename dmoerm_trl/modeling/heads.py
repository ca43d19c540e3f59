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
    The two-layer MLP `W_1 PReLU(W_0 z + B_0) + B_1` of equation 6, in fp32, without its sigma.

    Args:
        experts (`int`): k, the number of experts.
        embedding_size (`int`): H, the size of one expert's embedding.
        hidden_size (`int`): Width of the hidden layer.
    """

    def __init__(self, experts: int, embedding_size: int, hidden_size: int):
        super().__init__()
        self.hidden = Float32Linear(experts * embedding_size, hidden_size)
        self.activation = nn.PReLU()
        self.output = Float32Linear(hidden_size, 1)

    @torch.no_grad()
    def start_from(self, heads: Sequence[nn.Linear], z: Tensor) -> None:
        """
        Initialise the MLP from the experts' own scores, which leaves far less to learn than starting from their
        embeddings.

        The first k hidden units are the standardised scores `w_i z_i + b_i`, the others random mixtures of them with
        random thresholds, and the output is the mean of the first k. All weights are trained afterwards.

        Args:
            heads (`Sequence[nn.Linear]`): The k heads of phase 2.
            z (`Tensor` of shape (N, k, H)): Embeddings on which the scores are standardised.
        """
        k, size = len(heads), z.shape[2]
        width = self.hidden.out_features
        scores = torch.cat([head(z[:, i]) for i, head in enumerate(heads)], 1)
        mean, std = scores.mean(0), scores.std(0).clamp(min=1e-6)
        weights, biases = (
            torch.cat([head.weight.float() for head in heads]),
            torch.cat([head.bias.float() for head in heads]),
        )
        mixture = torch.randn(width, k, device=z.device) / k**0.5
        mixture[:k] = torch.eye(k, device=z.device)[:width]
        self.hidden.weight.copy_((mixture.unsqueeze(2) * (weights / std.unsqueeze(1))).view(width, k * size))
        self.hidden.bias.copy_(mixture @ ((biases - mean) / std))
        self.hidden.bias[k:] += torch.randn(max(width - k, 0), device=z.device)
        self.output.weight.zero_()
        self.output.weight[:, :k] = 1 / k
        self.output.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """Aggregate the experts' embeddings `z` of shape (B, k, H), concatenated as in equation 5, to shape (B, 1)."""
        with torch.autocast(z.device.type, enabled=False):  # PReLU is on autocast's list for CUDA
            hidden = self.hidden(z.flatten(1))
            return self.output(nn.functional.prelu(hidden, self.activation.weight.float()))


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
