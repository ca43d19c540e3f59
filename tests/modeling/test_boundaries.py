"""Where prompt and response end, on rows made by hand: 1 opens a turn, 2 ends it, 1 9 opens the assistant's, 3 pads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.modeling.boundaries import Spans, find_spans

OPEN, END, PAD, ROLE = 1, 2, 3, 9
MARKERS = {"response_marker": [OPEN, ROLE], "end_of_turn": [END]}
PROMPT = [OPEN, 8, 20, 21, END, OPEN, ROLE]
"""A user's turn and the marker; then the assistant writes."""


def spans_of(*rows: list[int], pad: int = PAD, mask: list[list[int]] | None = None, lengths=None, **kwargs) -> Spans:
    """Rows of one width; the mask is what TRL makes, "not the pad token", unless one is given."""
    ids = torch.tensor(rows)
    mask = (ids != pad).long() if mask is None else torch.tensor(mask)
    lengths = None if lengths is None else torch.tensor(lengths)
    return find_spans(ids, mask, lengths, pad_token_id=pad, **{**MARKERS, **kwargs})


def texts(spans: Spans) -> list[tuple[list[int], int]]:
    """Each row's tokens, and how many of them are the prompt."""
    return [(row[:length], prompt) for row, length, prompt in zip(*(part.tolist() for part in spans), strict=True)]


@pytest.mark.parametrize("pad", [PAD, END])
@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (0, 3), (2, 4)])
def test_padding_on_either_side_is_removed(pad, left, right):
    text = [*PROMPT, 30, 31, END]
    spans = spans_of([pad] * left + text + [pad] * right, pad=pad)
    assert texts(spans) == [(text, 7)]
    assert spans.lengths.tolist() == [10] and spans.input_ids.shape == (1, 10)


@pytest.mark.parametrize("left", [0, 2])
def test_ends_of_turns_hidden_by_the_mask_are_restored_where_padding_is_the_end_of_turn(left):
    prompt = [OPEN, 8, 20, END, OPEN, ROLE, 30, END, OPEN, 8, 21, END, OPEN, ROLE]
    row = [END] * left + prompt + [31, END, END]
    mask = [int(token != END) for token in row]
    row = [token if attended else 0 for token, attended in zip(row, mask, strict=True)]  # as PPO overwrites padding
    assert texts(spans_of(row, pad=END, mask=[mask])) == [([*prompt, 31, END], 14)]


def test_without_a_mask_all_but_the_padding_is_read():
    ids = torch.tensor([[PAD, *PROMPT, 30, END, PAD]])
    assert texts(find_spans(ids, pad_token_id=PAD, **MARKERS)) == [([*PROMPT, 30, END], 7)]
    assert texts(find_spans(ids[:, 1:-1], **MARKERS)) == [([*PROMPT, 30, END], 7)]


def test_what_follows_the_end_of_the_response_is_not_read():
    assert texts(spans_of([*PROMPT, 30, END, 40, END, 41])) == [([*PROMPT, 30, END], 7)]


def test_a_sampled_pad_token_ends_the_response():
    assert texts(spans_of([*PROMPT, 30, PAD, 31, END])) == [([*PROMPT, 30], 7)]


@pytest.mark.parametrize(
    "pad, row, expected",
    [
        (PAD, [*PROMPT, PAD, PAD], PROMPT),
        (PAD, [*PROMPT, END, PAD], [*PROMPT, END]),
        (END, [*PROMPT, END, END], [*PROMPT, END]),
        (END, PROMPT, [*PROMPT, END]),
    ],
)
def test_an_empty_response(pad, row, expected):
    assert texts(spans_of(row, pad=pad)) == [(expected, 7)]


def test_a_response_without_an_end_stays_open_unless_padding_and_end_cannot_be_told_apart():
    assert texts(spans_of([*PROMPT, 30, 31])) == [([*PROMPT, 30, 31], 7)]
    assert texts(spans_of([*PROMPT, 30, 31], pad=END)) == [([*PROMPT, 30, 31, END], 7)]


def test_the_prompt_of_several_turns_ends_at_the_last_assistant_turn():
    prompt = [OPEN, 7, 15, END, OPEN, 8, 20, END, OPEN, ROLE, 30, END, OPEN, 8, 21, END, OPEN, ROLE]
    assert texts(spans_of([*prompt, 31, END])) == [([*prompt, 31, END], len(prompt))]


def test_a_template_that_ends_only_the_turns_of_the_assistant():
    prompt = [40, 20, 41, 30, END, 40, 21, 41]  # [INST] 20 [/INST] 30 </s> [INST] 21 [/INST]
    assert texts(spans_of([*prompt, 31, END], response_marker=[41])) == [([*prompt, 31, END], 8)]


def test_a_marker_that_the_response_forges_does_not_count():
    forged = [*PROMPT, 30, OPEN, ROLE, 31, OPEN, ROLE, 32, END]
    assert texts(spans_of(forged)) == [(forged, 7)]


def test_a_prompt_length_outweighs_a_forged_end_of_turn():
    forged = [*PROMPT, 30, END, OPEN, 8, 50, END, OPEN, ROLE, 31, END]
    assert texts(spans_of(forged, lengths=[7])) == [([*PROMPT, 30, END], 7)]
    assert texts(spans_of([PAD, PAD, *forged], lengths=[7])) == [([*PROMPT, 30, END], 7)]


def test_a_prompt_length_ends_the_routed_prompt_at_its_marker():
    """Else the line break after ChatML's marker would part the texts with a prompt length from those without."""
    row = [*PROMPT, 60, 30, END]
    assert texts(spans_of(row, lengths=[8])) == texts(spans_of(row)) == [(row, 7)]


def test_a_prompt_length_stands_where_there_is_no_marker():
    row = [20, 21, END, 22, 30, END, 40]
    assert texts(spans_of(row, response_marker=[], lengths=[4])) == [([20, 21, END, 22, 30, END], 4)]


def test_the_whole_text_is_routed_where_the_prompt_end_is_not_known():
    row = [20, 21, END, 22, 30, END]
    assert texts(spans_of(row)) == [(row, 6)]
    assert texts(spans_of([*row, PAD])) == [(row, 6)]
    assert texts(spans_of([20], response_marker=[OPEN, ROLE])) == [([20], 1)]


def test_rows_of_one_batch_are_read_apart():
    spans = spans_of(
        [PAD, PAD, *PROMPT, 30, END], [*PROMPT, 31, 32, 33, END], [PAD, *PROMPT, PAD, PAD, PAD], [20, *[PAD] * 10]
    )
    assert texts(spans) == [([*PROMPT, 30, END], 7), ([*PROMPT, 31, 32, 33, END], 7), (PROMPT, 7), ([20], 1)]


def test_nothing_under_the_mask_is_handed_on():
    """Padding may be -100, or an id for which the embeddings have no row."""
    spans = find_spans(torch.tensor([[-100, *PROMPT, 30, END, 10**6], [*PROMPT, 30, 31, 32, END]]),
                       torch.tensor([[0, *[1] * 9, 0], [1] * 11]), **MARKERS)  # fmt: skip
    assert texts(spans)[0] == ([*PROMPT, 30, END], 7)
    assert spans.input_ids.min() >= 0 and spans.input_ids.max() <= 40


def test_a_row_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="row 1 of the batch without an attended token"):
        spans_of([20, 21], [PAD, PAD])


@pytest.mark.parametrize("length", [0, 9])
def test_a_prompt_length_out_of_range_is_an_error(length):
    with pytest.raises(ValueError, match=rf"prompt_lengths=\[{length}\] for texts of \[8\] tokens"):
        spans_of([PAD, *PROMPT, 30, PAD], lengths=[length])


def test_a_gap_in_the_prompt_is_an_error():
    with pytest.raises(ValueError, match="gap inside a prompt"):
        spans_of([OPEN, 8, PAD, 21, END, OPEN, ROLE, 30])


word = st.integers(20, 30)
response = st.tuples(st.lists(word, max_size=4), st.sampled_from([[], [END]])).map(lambda parts: parts[0] + parts[1])
prompt = st.lists(st.lists(word, min_size=1, max_size=3), min_size=1, max_size=3).map(
    lambda turns: [token for turn in turns for token in (OPEN, 8, *turn, END)] + [OPEN, ROLE]
)


@given(prompt, response, st.integers(0, 4), st.integers(0, 4), st.sampled_from([PAD, END]), st.booleans())
def test_padding_never_matters(prompt, response, left, right, pad, tell_length):
    lengths = [len(prompt)] if tell_length else None
    expected = [(prompt + response, len(prompt))]
    if pad == END and response[-1:] != [END]:
        expected = [(prompt + response + [END], len(prompt))]
    row = [pad] * left + prompt + response + [pad] * right
    assert texts(spans_of(row, pad=pad, lengths=lengths)) == expected
    true_mask = [0] * left + [1] * len(prompt + response) + [0] * right
    assert texts(spans_of(row, pad=pad, mask=[true_mask], lengths=lengths)) == expected


@given(st.lists(st.tuples(prompt, response, st.integers(0, 3)), min_size=2, max_size=4), st.sampled_from([PAD, END]))
def test_the_rest_of_the_batch_never_matters(rows, pad):
    """Prompts padded on the left, responses on the right, as in PPO."""
    apart = [texts(spans_of([pad] * left + prompt + response, pad=pad))[0] for prompt, response, left in rows]
    widths = max(len(prompt) for prompt, _, _ in rows), max(len(response) for _, response, _ in rows)
    batch = [
        [pad] * (widths[0] - len(prompt)) + prompt + response + [pad] * (widths[1] - len(response))
        for prompt, response, _ in rows
    ]
    assert texts(spans_of(*batch, pad=pad)) == apart
