"""
Find the span boundaries of prompts and responses, however their tokens were padded.

TRL pads queries on the left and responses on the right, may use the end-of-turn token as padding, and does not pass
the length of the prompt; a collator pads on the right and attends to every end-of-turn token. This module converts all
of them to one form, so that a text has the same reward wherever it comes from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .response_opening import ResponseOpening


class Spans(NamedTuple):
    """
    A batch in normalised form: no padding on the left, and nothing after the end of the response.

    Attributes:
        input_ids (`Tensor` of shape (B, L)): Token ids; each row starts with its first token and is padded with zeros.
        lengths (`Tensor` of shape (B,)): Number of tokens of each row; the last of them is pooled.
        prompt_lengths (`Tensor` of shape (B,)): Number of tokens that the router reads. It is the length of the
            complete text if the end of the prompt is unknown.
    """

    input_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor


def span_mask(lengths: Tensor, width: int) -> Tensor:
    """Build an attention mask of shape (B, width) whose rows start with `lengths` (shape (B,)) ones."""
    return (torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)).long()


def find_spans(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    *,
    response_marker: list[int] | tuple[int, ...] = (),
    end_of_turn: list[int] | tuple[int, ...] = (),
    response_opening: ResponseOpening | None = None,
    reads_end: bool = True,
    pad_token_id: int | None = None,
    added_bos: int | None = None,
    reads_bos: bool = True,
    needs_marker: bool = False,
) -> Spans:
    """
    Find the prompt and the response of each row.

    - A text is made to begin with one bos token, or with none if the chat template writes none, however many the
      tokenizer added.
    - The prompt ends at the response marker that opens the last assistant turn. A marker inside an assistant turn that
      no end-of-turn token has closed was written by the response and does not count. If `prompt_lengths` is given,
      only markers within that length count.
    - The response begins after its opening, which is normalised; see [`ResponseOpening`].
    - The response ends with its first end-of-turn token, or at the first unattended token after the prompt (a policy
      may sample the pad token), or with the last attended token. Any end-of-turn token is replaced by the first in
      `end_of_turn`, which the chat template writes; if the template writes none, it is removed.
    - If the pad token is an end-of-turn token, a mask made from it hides the ends of turns. They are restored, and an
      end-of-turn token is added to a response without one, because padding cannot be distinguished from the end.

    Args:
        input_ids (`Tensor` of shape (B, T)): Token ids, padded on either side or both. Ids where the mask is 0 are
            ignored.
        attention_mask (`Tensor` of shape (B, T), *optional*): Nonzero for tokens. By default every token but the pad
            token.
        prompt_lengths (`Tensor` of shape (B,), *optional*): Number of prompt tokens of each row, without padding.
        response_marker, end_of_turn, response_opening, reads_end, pad_token_id, added_bos, reads_bos: See
            [`DMoERMConfig`].
        needs_marker (`bool`): Whether a row with neither a response marker nor a prompt length is an error. By default
            the complete row is the prompt.

    Raises:
        ValueError: For a row without tokens, a prompt length out of range, a gap in the attention mask of a prompt, or
            a missing marker.
    """
    batch, width = input_ids.shape
    device = input_ids.device
    columns = torch.arange(width, device=device).expand(batch, width)
    pad_ends = pad_token_id is not None and pad_token_id in end_of_turn
    if attention_mask is None:
        attended = torch.ones_like(input_ids, dtype=torch.bool) if pad_token_id is None else input_ids != pad_token_id
    else:
        attended = attention_mask.bool()
    if not attended.any(1).all():
        raise ValueError(f"got row {int(attended.any(1).long().argmin())} of the batch without an attended token.")

    # Shift every row to the left: `first` is its first token's column, `lengths` counts up to its last attended token.
    first = attended.long().argmax(1)
    lengths = width - attended.flip(1).long().argmax(1) - first
    if added_bos is not None:
        from_first = (columns >= first.unsqueeze(1)) & ((input_ids != added_bos) | ~attended)
        surplus = (_first_column(from_first) - first - int(reads_bos)).clamp(min=0).minimum(lengths - 1)
        first, lengths = first + surplus, lengths - surplus
        prompt_lengths = None if prompt_lengths is None else prompt_lengths.to(device) - surplus
    source = (columns + first.unsqueeze(1)).clamp(max=width - 1)
    ids, attended = input_ids.gather(1, source), attended.gather(1, source)
    inside = columns < lengths.unsqueeze(1)
    if pad_ends:
        ids = torch.where(inside & ~attended, pad_token_id, ids)
        attended = attended | inside
    if prompt_lengths is not None:
        prompt_lengths = prompt_lengths.to(device)
        if ((prompt_lengths < 1) | (prompt_lengths > lengths)).any():
            raise ValueError(
                f"got prompt_lengths={prompt_lengths.tolist()} for texts of {lengths.tolist()} tokens, need 1 to the "
                "text's length: count the prompt's tokens without padding."
            )

    end_ids = torch.tensor(end_of_turn, device=device, dtype=ids.dtype)
    ends_turn = torch.isin(ids, end_ids) & inside
    limit = lengths if prompt_lengths is None else prompt_lengths
    found, marker_end = _last_response_marker(ids, ends_turn, limit, response_marker)
    if needs_marker and prompt_lengths is None and not found.all():
        raise ValueError(
            f"got text {int(found.long().argmin())} of the batch without the tokens {list(response_marker)}, by which the model's "
            "chat template opens a response, need them or `prompt_lengths`, because without them the prompt's end is not known: "
            "render the chat with the tokenizer of the model's folder, or encode it with a `Formatter`."
        )
    known = found if prompt_lengths is None else torch.ones_like(found)
    routed = torch.where(found, marker_end, limit)
    starts = routed if prompt_lengths is None else prompt_lengths  # first column of the response, if it is known

    gap = inside & ~attended
    if (gap & (columns < starts.unsqueeze(1)) & known.unsqueeze(1)).any():
        raise ValueError(
            "got an attention mask with a gap inside a prompt, need one run of tokens: mask padding only."
        )
    lengths = torch.minimum(lengths, _first_column(gap))
    if response_opening is not None and found.any():
        ids, lengths, routed, starts = _normalise_openings(
            ids, lengths, torch.where(found, routed, -1), starts, response_marker, end_of_turn, response_opening
        )
        columns = torch.arange(ids.shape[1], device=device).expand(batch, -1)
        ends_turn = torch.isin(ids, end_ids)
    ends = _first_column(ends_turn & known.unsqueeze(1) & (columns >= starts.unsqueeze(1)))
    ended = ends < lengths
    lengths = torch.minimum(lengths, ends + 1)
    if pad_ends and reads_end:
        last = ids.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
        open_ended = ~(torch.isin(last, end_ids) & ((lengths > starts) | ~known))
        ids = torch.cat([ids, ids.new_full((batch, 1), pad_token_id)], 1)
        ended, lengths = ended | (open_ended & known), lengths + open_ended
        ids[torch.arange(batch, device=device)[open_ended], lengths[open_ended] - 1] = pad_token_id
    if reads_end and len(end_ids):
        ids[torch.arange(batch, device=device)[ended], lengths[ended] - 1] = end_ids[0]
    elif not reads_end:
        lengths = (lengths - ended.long()).clamp(min=1)
    mask = span_mask(lengths, int(lengths.max()))
    ids = ids[:, : mask.shape[1]].masked_fill(mask == 0, 0)  # the pad token's id may be outside of the embedding table
    return Spans(ids, lengths, torch.minimum(routed, lengths))


def _first_column(mask: Tensor) -> Tensor:
    """Return the column of the first True in each row of `mask` (shape (B, T)), or T for a row without one."""
    return torch.where(mask.any(1), mask.long().argmax(1), mask.shape[1])


def _normalise_openings(
    ids: Tensor,
    lengths: Tensor,
    marker_ends: Tensor,
    starts: Tensor,
    marker: list[int] | tuple[int, ...],
    ends: list[int] | tuple[int, ...],
    opening: ResponseOpening,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Normalise the openings of the responses.

    Args:
        marker_ends (`Tensor` of shape (B,)): Column after the last response marker, -1 for a row without one.

    Returns:
        The new rows, their lengths, the columns after their response markers, and the first columns of their
        responses.
    """
    rows, routed, first = [], [], []
    for row, length, end, start in zip(*(part.tolist() for part in (ids, lengths, marker_ends, starts)), strict=True):
        if end < 0 or end > length:
            rows.append(row[:length])
            routed.append(start)
            first.append(start)
            continue
        end = opening.first_marker(row, end, marker)
        written, response = opening.read(row[end:length], ends)
        rows.append(row[:end] + written + response)
        routed.append(end)
        first.append(end + len(written))
    lengths, routed, first = (lengths.new_tensor(part) for part in ([len(row) for row in rows], routed, first))
    padded = torch.nn.utils.rnn.pad_sequence([ids.new_tensor(row) for row in rows], batch_first=True)
    return padded, lengths, routed, first


def _last_response_marker(
    ids: Tensor, ends_turn: Tensor, limit: Tensor, marker: list[int] | tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """
    Return whether a row has a response marker within its first `limit` (shape (B,)) tokens, and the column after it.

    If there are several markers, the one that opened the last turn counts: the first marker after the last end-of-turn
    token that precedes any marker.
    """
    batch, width = ids.shape
    if not marker or width < len(marker):
        return torch.zeros_like(limit, dtype=torch.bool), limit
    hits = (ids.unfold(1, len(marker), 1) == torch.tensor(marker, device=ids.device)).all(2)  # (B, T - m + 1)
    starts = torch.arange(hits.shape[1], device=ids.device).expand_as(hits)
    hits &= starts + len(marker) <= limit.unsqueeze(1)
    turns = ends_turn.long().cumsum(1)[:, : hits.shape[1]]  # number of turns closed before each column
    order = torch.where(hits, turns * width + (width - 1 - starts), -1)
    return hits.any(1), order.argmax(1) + len(marker)
