"""What stands on the embeddings: pooling, the linear heads (equation 4) and the aggregator (equations 5 and 6)."""

import torch
from torch import Tensor, nn


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """
    The embedding of each row's last token, which serves decoders and encoders alike.

    Args:
        hidden (`Tensor` of shape (B, T, H)): hidden states of rows padded on the right.
        lengths (`Tensor` of shape (B,)): number of tokens of each row.

    Returns:
        `Tensor` of shape (B, H).
    """
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


class Float32Linear(nn.Linear):
    """A linear layer computed in fp32 whatever the dtype of its input, of its weights or of autocast."""

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
        hidden_size (`int`): width of the hidden layer.
    """

    def __init__(self, experts: int, embedding_size: int, hidden_size: int):
        super().__init__()
        self.hidden = Float32Linear(experts * embedding_size, hidden_size)
        self.activation = nn.PReLU()
        self.output = Float32Linear(hidden_size, 1)

    def forward(self, z: Tensor) -> Tensor:
        """`z` of shape (B, k, H), the experts' embeddings, concatenated as in equation 5 -> shape (B, 1)."""
        with torch.autocast(z.device.type, enabled=False):  # PReLU is on autocast's list for CUDA
            hidden = self.hidden(z.flatten(1))
            return self.output(nn.functional.prelu(hidden, self.activation.weight.float()))


def activate(logits: Tensor, activation: str) -> Tensor:
    """The sigma of equations 4 and 6: the logistic function for `"sigmoid"`, the identity for `"none"`."""
    return logits.sigmoid() if activation == "sigmoid" else logits
