"""Prefix sharing: pack many texts into one sequence without padding, in which a shared prefix occurs only once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SHARED = 16
"""Minimum number of tokens of a shared prefix; sharing a shorter one costs more in calls than it saves."""


class Node(NamedTuple):
    """A sequence of consecutive tokens that are shared by the same texts."""

    start: int
    """Index of its first token in the packed sequence."""
    stop: int
    """Index after its last token."""
    path: tuple[int, ...]
    """Indices of its ancestors, root first. Its tokens may attend to them and to the node itself."""


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """
    Packed sequences with prefix sharing: N texts as prefix trees, in depth-first order, so that all descendants of a
    token directly follow it.

    A text is a path from a root to a node, and ends where the node ends. A token attends only to the tokens of its own
    path; its position is its index in the text. A causal model therefore computes the same for a packed text as for
    the text alone.

    Attributes:
        input_ids (`Tensor` of shape (T,)): The tokens of all nodes.
        position_ids (`Tensor` of shape (T,)): Index of each token in its text, from 0.
        reach (`Tensor` of shape (T,)): Index after the last descendant of each token: token i is token j or one of its
            descendants if `j <= i < reach[j]`.
        ends (`Tensor` of shape (N,)): Index of each text's last token.
        nodes (`list[Node]`): The nodes in depth-first order.
        text_nodes (`list[int]`): Index of the last node of each text.
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
        Build the additive attention mask (0 or -inf) of a node's L tokens over the S tokens of its path, itself
        included.

        Args:
            window (`int`, *optional*): Number of positions that a token attends to, itself included.

        Returns:
            `Tensor` of shape (L, S).
        """
        return self.remembered(("mask", node, window, dtype), lambda: self._mask(node, window, dtype))

    def remembered(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, cached under `key`, because every layer needs the same masks."""
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


def pack(input_ids: Tensor, lengths: Tensor, *, share: bool = True) -> PackedSequences:
    """
    Pack a batch of texts.

    Args:
        input_ids (`Tensor` of shape (B, L)): Texts padded on the right.
        lengths (`Tensor` of shape (B,)): Number of tokens of each text, at least 1.
        share (`bool`): Whether to share common prefixes; False for encoders, whose prompt attends to the response.
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
        if len(groups) > 1:  # each is completed before the next: depth first
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
    return PackedSequences(
        *(torch.tensor(values, device=input_ids.device) for values in (tokens, positions, reach, ends)),
        nodes,
        text_nodes,
    )


def passes(texts: Sequence[Sequence[int]], tokens: int, *, share: bool = True) -> Iterator[list[int]]:
    """
    Split texts into batches of a bounded number of packed tokens. Texts with a common prefix are batched together, or
    texts of similar length if prefixes are not shared.

    Args:
        texts (`Sequence[Sequence[int]]`): Tokens of each text.
        tokens (`int`): Token budget: maximum number of packed tokens of a batch, to within `MIN_SHARED` per text. If
            twice the length of its first text is more, that is the maximum, because a long prompt would otherwise be
            repeated for each response.
        share (`bool`): See [`pack`].

    Yields:
        Indices of the texts of one batch.
    """
    order = sorted(range(len(texts)), key=lambda index: texts[index] if share else len(texts[index]))
    shared = shared_lengths([texts[index] for index in order]) if share else [0] * len(texts)
    part: list[int] = []
    size = limit = joined = 0
    for index, common in zip(order, shared, strict=True):
        length = len(texts[index])
        if common < joined or common - joined >= MIN_SHARED:  # otherwise it branches off where the text before it did
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
    """Return the length of the prefix that each of the sorted texts shares with the one before it; 0 for the first."""
    shared = [0] * len(texts)
    for index in range(1, len(texts)):
        before, text = texts[index - 1], texts[index]
        low, high = 0, min(len(before), len(text))
        while low < high:  # comparing slices is far faster than comparing tokens
            middle = (low + high + 1) // 2
            low, high = (middle, high) if before[low:middle] == text[low:middle] else (low, middle - 1)
        shared[index] = low
    return shared


class _Branch(NamedTuple):
    """The sorted texts from `start` to `stop`, whose first `depth` tokens are already in the nodes of `path`."""

    start: int
    stop: int
    depth: int
    path: tuple[int, ...]


def _groups(branch: _Branch, shared: list[int]) -> list[tuple[int, int]]:
    """Split a branch into ranges of texts that share at least `MIN_SHARED` tokens beyond its depth."""
    cuts = [index for index in range(branch.start + 1, branch.stop) if shared[index] - branch.depth < MIN_SHARED]
    return list(zip([branch.start, *cuts], [*cuts, branch.stop], strict=True))
