"""Many texts as one packed sequence without padding, in which a beginning that several texts share stands once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SHARED = 16
"""Tokens that texts must share to be joined; a shorter common beginning costs more in calls than it saves."""


class Node(NamedTuple):
    """A run of tokens that the same texts share."""

    start: int
    """Its first token's place in the packed sequence."""
    stop: int
    path: tuple[int, ...]
    """Indices of its ancestors, root first: with the node itself, all that its tokens may attend to."""


@dataclass(frozen=True, eq=False)
class Forest:
    """
    N texts as trees of token runs, depth first, so that the tokens below a token follow it without a gap.

    A text is a path from a root to a node, and ends where the node ends. A token attends to the tokens of its own path
    alone; its position is its place in the text. What a causal model computes of a text is then what it computes of the
    text alone.

    Attributes:
        input_ids (`Tensor` of shape (T,)): the tokens of all nodes.
        position_ids (`Tensor` of shape (T,)): place of each token in its text, from 0.
        reach (`Tensor` of shape (T,)): where the tokens below each token stop: token i is below token j, or is j, where
            `j <= i < reach[j]`.
        ends (`Tensor` of shape (N,)): place of each text's last token.
        nodes (`list[Node]`): depth first.
        text_nodes (`list[int]`): index of the node with which each text ends.
    """

    input_ids: Tensor
    position_ids: Tensor
    reach: Tensor
    ends: Tensor
    nodes: list[Node]
    text_nodes: list[int]
    _memory: dict[tuple, Any] = field(default_factory=dict, repr=False)

    def mask(self, node: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """
        What is added to the scores of a node's L tokens over the S places that its last token sees: 0 or -inf.

        Args:
            window (`int`, *optional*): how many positions back a token sees, itself included.

        Returns:
            `Tensor` of shape (L, S).
        """
        return self.remembered(("mask", node, window, dtype), lambda: self._mask(node, window, dtype))

    def remembered(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: every layer asks for the same masks."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    def _mask(self, node: int, window: int | None, dtype: torch.dtype) -> Tensor:
        start, stop, path = self.nodes[node]
        before, length = int(self.position_ids[start]), stop - start
        visible = torch.ones(length, before + length, dtype=torch.bool, device=self.reach.device).tril(before)
        if window is not None:
            visible = visible.triu(before - window + 1)
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)


def plant(input_ids: Tensor, lengths: Tensor, *, share: bool = True) -> Forest:
    """
    Builds the forest of a batch of texts.

    Args:
        input_ids (`Tensor` of shape (B, L)): texts padded on the right.
        lengths (`Tensor` of shape (B,)): number of tokens of each text, at least 1.
        share (`bool`): whether texts share their common beginnings; False for encoders, whose prompt sees the response.
    """
    rows = [row[:length] for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__) if share else list(range(len(rows)))
    texts = [rows[index] for index in order]
    shared = shared_lengths(texts) if share else [0] * len(texts)

    tokens, positions, nodes, text_nodes = [], [], [], [0] * len(rows)
    stack = [_Branch(0, len(texts), 0, ())]
    while stack:
        branch = stack.pop()
        groups = _groups(branch, shared)
        if len(groups) > 1:  # each is grown whole before the next: depth first
            stack += [_Branch(start, stop, branch.depth, branch.path) for start, stop in reversed(groups)]
            continue
        start, stop, depth, path = branch
        until = min(shared[start + 1 : stop], default=len(texts[start]))
        node = Node(len(tokens), len(tokens) + until - depth, path)
        tokens += texts[start][depth:until]
        positions += range(depth, until)
        nodes.append(node)
        while start < stop and len(texts[start]) == until:
            text_nodes[order[start]] = len(nodes) - 1
            start += 1
        if start < stop:
            stack.append(_Branch(start, stop, until, (*path, len(nodes) - 1)))
    below = [node.stop for node in nodes]
    for node in nodes:
        for ancestor in node.path:
            below[ancestor] = node.stop
    reach = [stop for node, stop in zip(nodes, below, strict=True) for _ in range(node.start, node.stop)]
    ends = [nodes[index].stop - 1 for index in text_nodes]
    return Forest(
        *(torch.tensor(values, device=input_ids.device) for values in (tokens, positions, reach, ends)),
        nodes,
        text_nodes,
    )


def passes(texts: Sequence[Sequence[int]], tokens: int, *, share: bool = True) -> Iterator[list[int]]:
    """
    Divides texts among forests of bounded size, so that those with common beginnings meet, or else those of like length.

    Args:
        texts (`Sequence[Sequence[int]]`): tokens of each text.
        tokens (`int`): packed tokens that a forest may have, to within `MIN_SHARED` a text; twice its first text's, if
            that is more, because a long prompt would otherwise be repeated for each response.
        share (`bool`): as of [`plant`].

    Yields:
        Indices of the texts of a forest.
    """
    order = sorted(range(len(texts)), key=lambda index: texts[index] if share else len(texts[index]))
    shared = shared_lengths([texts[index] for index in order]) if share else [0] * len(texts)
    part: list[int] = []
    size = limit = joined = 0
    for index, common in zip(order, shared, strict=True):
        length = len(texts[index])
        if common < joined or common - joined >= MIN_SHARED:  # else it branches off where the text before it did
            joined = common if common >= MIN_SHARED else 0
        new = length - joined
        if part and size + new > limit:
            yield part
            part = []
        if not part:
            size, new, limit, joined = 0, length, max(tokens, 2 * length), 0
        part.append(index)
        size += new
    if part:
        yield part


def shared_lengths(texts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens each text has in common with the text before it; 0 for the first. Sorted texts are meant."""
    shared = [0] * len(texts)
    for index in range(1, len(texts)):
        before, text = texts[index - 1], texts[index]
        low, high = 0, min(len(before), len(text))
        while low < high:  # a comparison of slices is far faster than one of tokens
            middle = (low + high + 1) // 2
            low, high = (middle, high) if before[low:middle] == text[low:middle] else (low, middle - 1)
        shared[index] = low
    return shared


class _Branch(NamedTuple):
    """Sorted texts `start` to `stop`, whose first `depth` tokens stand in the nodes of `path` already."""

    start: int
    stop: int
    depth: int
    path: tuple[int, ...]


def _groups(branch: _Branch, shared: list[int]) -> list[tuple[int, int]]:
    """The runs of texts that have enough in common beyond the branch's depth."""
    cuts = [index for index in range(branch.start + 1, branch.stop) if shared[index] - branch.depth < MIN_SHARED]
    return list(zip([branch.start, *cuts], [*cuts, branch.stop], strict=True))
