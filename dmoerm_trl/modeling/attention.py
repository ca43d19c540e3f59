"""Attention for packed sequences: each token attends only to its own text."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .prefix_tree import PackedSequences


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSequences,
    *,
    last_tokens: bool = False,
    causal: bool = True,
    scaling: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """
    Compute the scaled dot-product attention of packed sequences, within each text.

    On a CPU this is one call of PyTorch's attention per node of the prefix tree. On a GPU, where calls cost more than
    tokens, it is a single call: of FlexAttention, which skips masked blocks, or for encoders of PyTorch's attention
    over texts padded to the same length.

    Args:
        query (`Tensor` of shape (B, heads, T, D)): Queries of the packed tokens; shape (B, heads, N, D) with
            `last_tokens`.
        key, value (`Tensor` of shape (B, key heads, T, D)): Keys and values of the packed tokens.
        last_tokens (`bool`): Whether the queries are only those of each text's last token, in the order of
            `packed.ends`.
        causal (`bool`): Whether a token attends only to the tokens before it. If not, no prefixes may be shared.
        window (`int`, *optional*): Number of positions that a token of a causal model attends to, itself included.
        softcap (`float`, *optional*): c of `c tanh(scores / c)`, as in Gemma 2.

    Returns:
        `Tensor` of shape (B, T or N, heads, D).
    """
    if query.is_cuda and not causal:
        return _padded_attention(query, key, value, packed, last_tokens, scaling, dropout, softcap)
    if query.is_cuda and not dropout:
        return _flex_attention(query, key, value, packed, last_tokens, scaling, window, softcap)
    attend = _attend if softcap is None else _attend_softly_capped
    sizes = [node.stop - node.start for node in packed.nodes]
    # its gradient is one concatenation
    queries = query.split([1] * len(packed.text_nodes) if last_tokens else sizes, 2)
    keys, values = key.split(sizes, 2), value.split(sizes, 2)
    out = []
    for index, own in zip(packed.text_nodes if last_tokens else range(len(sizes)), queries, strict=True):
        seen = (*packed.nodes[index].path, index)
        k, v = (torch.cat([parts[i] for i in seen], 2) if len(seen) > 1 else parts[index] for parts in (keys, values))
        if last_tokens and causal and window is not None:
            k, v = k[:, :, -window:], v[:, :, -window:]
        masked = causal and not last_tokens and (len(seen) > 1 or (window or k.shape[2]) < k.shape[2])
        mask = packed.mask(index, window, query.dtype) if masked else None
        out.append(attend(own, k, v, mask, causal and not last_tokens and not masked, scaling, dropout, softcap))
    return torch.cat(out, 2).transpose(1, 2)


def _attend(query, key, value, mask, is_causal, scaling, dropout, softcap) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _attend_softly_capped(query, key, value, mask, is_causal, scaling, dropout, softcap) -> Tensor:
    """Compute attention with a cap on the scores, which PyTorch's attention does not support."""
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


def _padded_attention(query, key, value, packed, last_tokens, scaling, dropout, softcap) -> Tensor:
    """Compute full attention within texts that share no prefixes, each of which is one node."""
    sizes = [node.stop - node.start for node in packed.nodes]
    texts, longest = len(sizes), max(sizes)

    def padding() -> tuple[Tensor, Tensor, Tensor]:
        starts, lengths = torch.tensor([[node.start for node in packed.nodes], sizes], device=key.device)
        place = torch.arange(longest, device=key.device)
        real = place < lengths.unsqueeze(1)
        places = starts.unsqueeze(1) + torch.where(real, place, 0)  # padding repeats the text's first token
        mask = torch.zeros(real.shape, dtype=query.dtype, device=key.device).masked_fill(~real, -torch.inf)
        return places.flatten(), mask[:, None, None], real.flatten().nonzero().squeeze(1)

    places, mask, packed = packed.remembered(("padding", query.dtype), padding)

    def one_length(states: Tensor) -> Tensor:
        """Pad: (B, heads, T, D) -> (B * texts, heads, longest, D)."""
        states = states.index_select(2, places)  # faster backward than indexing: it adds atomically instead of sorting
        return states.unflatten(2, (texts, longest)).transpose(1, 2).flatten(0, 1)

    queries = query.transpose(1, 2).flatten(0, 1).unsqueeze(2) if last_tokens else one_length(query)
    mask = mask.repeat(len(query), 1, 1, 1)
    attend = _attend if softcap is None else _attend_softly_capped
    out = attend(queries, one_length(key), one_length(value), mask, False, scaling, dropout, softcap)
    # (B, texts or texts * longest, heads, D)
    out = out.transpose(1, 2).unflatten(0, (len(query), texts)).flatten(1, 2)
    return out if last_tokens else out.index_select(1, packed)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _flex_attention(query, key, value, packed, last_tokens, scaling, window, softcap) -> Tensor:
    place = packed.ends if last_tokens else torch.arange(len(packed.reach), device=packed.reach.device)
    reach, positions = packed.reach, packed.position_ids

    def sees(batch, head, q, kv):
        below = (place[q] >= kv) & (place[q] < reach[kv])
        return below if window is None else below & (positions[place[q]] - positions[kv] < window)

    def cap(score, batch, head, q, kv):
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    attend, make_mask = flex_attention, create_block_mask
    if query.is_cuda:  # uncompiled, both would store a number for each pair of query and key
        attend, make_mask = _compiled(attend), _compiled(make_mask)
    mask = packed.remembered(
        ("block mask", last_tokens, window),
        lambda: make_mask(sees, None, None, query.shape[2], key.shape[2], device=query.device),
    )
    gqa = query.shape[1] != key.shape[1]
    return attend(query, key, value, cap, mask, scale=scaling, enable_gqa=gqa).transpose(1, 2)
