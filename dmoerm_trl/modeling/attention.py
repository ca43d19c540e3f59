"""Attention within a forest of packed texts: each token attends to its own text alone."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .forest import Forest


def forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    *,
    last_tokens: bool = False,
    causal: bool = True,
    scaling: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """
    Scaled dot-product attention of packed texts; the forest's trees do not see each other.

    On the CPU it is one call of PyTorch's attention a node. On a GPU, where calls cost more than tokens, it is one of
    FlexAttention, which skips what is masked, and for encoders one of PyTorch's over the texts padded to one length.

    Args:
        query (`Tensor` of shape (B, heads, T, D)): of the packed tokens, or (B, heads, N, D) with `last_tokens`.
        key, value (`Tensor` of shape (B, key heads, T, D)): of the packed tokens.
        last_tokens (`bool`): the queries are those of each text's last token, in the order of `forest.ends`.
        causal (`bool`): whether a token sees what stands before it alone; without it, no beginnings may be shared.
        window (`int`, *optional*): how many positions back a token sees, itself included, in a causal model.
        softcap (`float`, *optional*): c of `c tanh(scores / c)`, as in Gemma 2.

    Returns:
        `Tensor` of shape (B, T or N, heads, D).
    """
    if query.is_cuda and not causal:
        return _padded_attention(query, key, value, forest, last_tokens, scaling, dropout, softcap)
    if query.is_cuda and not dropout:
        return _flex_attention(query, key, value, forest, last_tokens, scaling, window, softcap)
    attend = _attend if softcap is None else _attend_softly_capped
    sizes = [node.stop - node.start for node in forest.nodes]
    queries = query.split(
        [1] * len(forest.text_nodes) if last_tokens else sizes, 2
    )  # its gradient is one concatenation
    keys, values = key.split(sizes, 2), value.split(sizes, 2)
    out = []
    for index, own in zip(forest.text_nodes if last_tokens else range(len(sizes)), queries, strict=True):
        seen = (*forest.nodes[index].path, index)
        k, v = (torch.cat([parts[i] for i in seen], 2) if len(seen) > 1 else parts[index] for parts in (keys, values))
        if last_tokens and causal and window is not None:
            k, v = k[:, :, -window:], v[:, :, -window:]
        masked = causal and not last_tokens and (len(seen) > 1 or (window or k.shape[2]) < k.shape[2])
        mask = forest.mask(index, window, query.dtype) if masked else None
        out.append(attend(own, k, v, mask, causal and not last_tokens and not masked, scaling, dropout, softcap))
    return torch.cat(out, 2).transpose(1, 2)


def _attend(query, key, value, mask, is_causal, scaling, dropout, softcap) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _attend_softly_capped(query, key, value, mask, is_causal, scaling, dropout, softcap) -> Tensor:
    """PyTorch's attention has no place for the cap."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[2:]).tril() == 0, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def _padded_attention(query, key, value, forest, last_tokens, scaling, dropout, softcap) -> Tensor:
    """Of texts that share nothing, each a node, whose tokens all see each other."""
    sizes = [node.stop - node.start for node in forest.nodes]
    texts, longest = len(sizes), max(sizes)

    def padding() -> tuple[Tensor, Tensor, Tensor]:
        starts, lengths = torch.tensor([[node.start for node in forest.nodes], sizes], device=key.device)
        place = torch.arange(longest, device=key.device)
        real = place < lengths.unsqueeze(1)
        places = starts.unsqueeze(1) + torch.where(real, place, 0)  # a text's first token stands for its padding
        mask = torch.zeros(real.shape, dtype=query.dtype, device=key.device).masked_fill(~real, -torch.inf)
        return places.flatten(), mask[:, None, None], real.flatten().nonzero().squeeze(1)

    places, mask, packed = forest.remembered(("padding", query.dtype), padding)

    def one_length(states: Tensor) -> Tensor:
        """(B, heads, T, D) -> (B texts, heads, longest, D)"""
        states = states.index_select(2, places)  # its gradient adds atomically, that of indexing sorts
        return states.unflatten(2, (texts, longest)).transpose(1, 2).flatten(0, 1)

    queries = query.transpose(1, 2).flatten(0, 1).unsqueeze(2) if last_tokens else one_length(query)
    mask = mask.repeat(len(query), 1, 1, 1)
    attend = _attend if softcap is None else _attend_softly_capped
    out = attend(queries, one_length(key), one_length(value), mask, False, scaling, dropout, softcap)
    out = out.transpose(1, 2).unflatten(0, (len(query), texts)).flatten(1, 2)  # (B, texts or texts longest, heads, D)
    return out if last_tokens else out.index_select(1, packed)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _flex_attention(query, key, value, forest, last_tokens, scaling, window, softcap) -> Tensor:
    place = forest.ends if last_tokens else torch.arange(len(forest.reach), device=forest.reach.device)
    reach, positions = forest.reach, forest.position_ids

    def sees(batch, head, q, kv):
        below = (place[q] >= kv) & (place[q] < reach[kv])
        return below if window is None else below & (positions[place[q]] - positions[kv] < window)

    def cap(score, batch, head, q, kv):
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    attend, make_mask = flex_attention, create_block_mask
    if query.is_cuda:  # uncompiled, both would hold a number for each query and key
        attend, make_mask = _compiled(attend), _compiled(make_mask)
    mask = forest.remembered(
        ("block mask", last_tokens, window),
        lambda: make_mask(sees, None, None, query.shape[2], key.shape[2], device=query.device),
    )
    gqa = query.shape[1] != key.shape[1]
    return attend(query, key, value, cap, mask, scale=scaling, enable_gqa=gqa).transpose(1, 2)
