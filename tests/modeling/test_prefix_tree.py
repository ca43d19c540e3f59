"""Packed texts: every text is on its path, with its positions, once; and every batch has a bounded size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoerm_trl.modeling.prefix_tree import MIN_SHARED, PackedSequences, pack, passes

A, B, C = (list(range(start, start + MIN_SHARED)) for start in (100, 200, 300))


def forest_of(texts: list[list[int]], **options) -> PackedSequences:
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    return pack(ids, torch.tensor([len(text) for text in texts]), **options)


def path_of(packed: PackedSequences, text: int) -> list[int]:
    """Places of a text's tokens in the packed sequence."""
    node = packed.text_nodes[text]
    nodes = [packed.nodes[index] for index in (*packed.nodes[node].path, node)]
    return [place for start, stop, _ in nodes for place in range(start, stop)]


def check(packed: PackedSequences, texts: list[list[int]]) -> None:
    """What must hold of any packed texts."""
    total = len(packed.input_ids)
    paths = [path_of(packed, text) for text in range(len(texts))]
    for path, text, end in zip(paths, texts, packed.ends.tolist(), strict=True):
        assert packed.input_ids[path].tolist() == text
        assert packed.position_ids[path].tolist() == list(range(len(text)))
        assert path[-1] == end
    assert {place for path in paths for place in path} == set(range(total))  # nothing else is packed
    before = {place: set(path[: path.index(place)]) for path in paths for place in path}
    for j, stop in enumerate(packed.reach.tolist()):
        assert {i for i in range(total) if j <= i < stop} == {j} | {i for i in range(total) if j in before[i]}


# Hand-made forests: texts -> the nodes' tokens, depth first.


@pytest.mark.parametrize(
    "texts, nodes",
    [
        ([A], [A]),
        ([[7]], [[7]]),
        ([A + [1], B + [2]], [A + [1], B + [2]]),
        ([A + [1], A + [2], A + [1, 3]], [A, [1], [1, 3], [2]]),
        ([B + [2], A + [1], B, A + [3]], [A, [1], [3], B, [2]]),
        ([A, A, A], [A]),
        ([A[:-1], A[:-1]], [A[:-1], A[:-1]]),
        ([A[:-1] + [1], A[:-1] + [2]], [A[:-1] + [1], A[:-1] + [2]]),
        ([A + B + [1], A], [A, B + [1]]),
        ([A + B + [1], A + B + [2], A + C], [A, B, [1], [2], C]),
        ([A + B + C, A + B, A], [A, B, C]),
        ([A + B[:-1] + [1], A + B[:-1] + [2]], [A + B[:-1], [1], [2]]),
        ([A + B[:-1] + [1], A + B[:-1] + [2], A + [900]], [A, B[:-1] + [1], B[:-1] + [2], [900]]),
    ],
    ids=[
        "one text",
        "one token",
        "no common beginning",
        "one prompt",
        "two prompts",
        "equal texts",
        "equal texts, too short to share",
        "a common beginning too short to share",
        "a text that begins another",
        "turns within a prompt",
        "each text begins the next",
        "all that is common",
        "too little beyond what all have in common",
    ],
)
def test_the_nodes_of_a_forest(texts, nodes):
    packed = forest_of(texts)
    assert [packed.input_ids[node.start : node.stop].tolist() for node in packed.nodes] == nodes
    check(packed, texts)


def test_positions_reach_and_ends_of_two_turns():
    packed = forest_of([A + B + [1, 2], A + B + [3], A + [900]])
    assert packed.position_ids.tolist() == [*range(34), 32, 16]
    assert packed.reach.tolist() == [36] * 16 + [35] * 16 + [34, 34, 35, 36]
    assert packed.ends.tolist() == [33, 34, 35]
    assert [node.path for node in packed.nodes] == [
        (),
        (0,),
        (0, 1),
        (0, 1),
        (0,),
    ]


def test_padding_is_not_read():
    ids = torch.tensor([A + [1, 9], A + [2, 3]])
    assert forest_of([A + [1], A + [2, 3]]).input_ids.tolist() == pack(ids, torch.tensor([17, 18])).input_ids.tolist()


def test_without_sharing_the_texts_follow_one_another():
    texts = [A + [2], A + [1], A + [2]]
    packed = forest_of(texts, share=False)
    assert packed.input_ids.tolist() == sum(texts, [])
    assert [node.path for node in packed.nodes] == [()] * 3
    check(packed, texts)


def test_the_mask_of_a_node_shows_its_path_and_itself_up_to_each_token():
    packed = forest_of([A + [1, 2], A + [3]])
    hidden = float("-inf")
    mask = packed.mask(1, None, torch.float64)
    assert mask.dtype == torch.float64
    assert mask.tolist() == [[0.0] * 17 + [hidden], [0.0] * 18]
    assert packed.mask(1, 3, torch.float32).tolist() == [
        [hidden] * 14 + [0.0] * 3 + [hidden],
        [hidden] * 15 + [0.0] * 3,
    ]


@st.composite
def batches(draw) -> list[list[int]]:
    """Texts of few different tokens that often begin with another text's beginning."""
    texts: list[list[int]] = []
    for _ in range(draw(st.integers(1, 8))):
        beginning: list[int] = []
        if texts and draw(st.booleans()):
            other = draw(st.sampled_from(texts))
            beginning = other[: draw(st.integers(0, len(other)))]
        rest = [draw(st.integers(1, 3))] * draw(st.integers(0, 2 * MIN_SHARED))
        texts.append(beginning + rest or [1])
    return texts


@settings(max_examples=150, deadline=None)
@given(batches(), st.booleans())
def test_every_text_is_on_its_path(texts, share):
    packed = forest_of(texts, share=share)
    check(packed, texts)
    if not share:
        assert len(packed.input_ids) == sum(map(len, texts))


@settings(max_examples=50, deadline=None)
@given(st.integers(MIN_SHARED, 60), st.lists(st.integers(1, 20), min_size=2, max_size=9))
def test_the_prompt_is_packed_once(prompt, responses):
    texts = [[5] * prompt + [10 + number] * length for number, length in enumerate(responses)]
    assert len(forest_of(texts).input_ids) == prompt + sum(responses)


# The division of texts among forests.


def packed(texts: list[list[int]], part: list[int], **options) -> int:
    return len(forest_of([texts[index] for index in part], **options).input_ids)


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 120), st.booleans())
def test_every_text_is_in_one_pass_of_bounded_size(texts, budget, share):
    parts = list(passes(texts, budget, share=share))
    assert sorted(index for part in parts for index in part) == list(range(len(texts)))
    for part in parts:
        size, uncertain = packed(texts, part, share=share), MIN_SHARED * len(part) if share else 0
        assert size <= max(budget, 2 * len(texts[part[0]])) + uncertain


def test_texts_of_one_prompt_meet_whatever_their_order():
    texts = [prompt + [number] for number in range(4) for prompt in (A, B, C)]
    assert [sorted(part) for part in passes(texts, 20)] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_texts_that_share_nothing_meet_those_of_like_length():
    texts = [[number] * length for number, length in enumerate((9, 1, 8, 2, 7, 3))]
    assert [[len(texts[index]) for index in part] for part in passes(texts, 15, share=False)] == [
        [1, 2, 3, 7],
        [8],
        [9],
    ]


def test_no_texts_are_no_passes():
    assert list(passes([], 10)) == []


@pytest.mark.parametrize("count", [1, 10, 400])
def test_a_prompt_longer_than_the_budget_costs_a_part_of_its_responses(count):
    """Not the prompt for each of them: then a pass would be as long as the prompt and have one response."""
    prompt = [1] * 1000
    texts = [prompt + [2 + number] * 20 for number in range(count)]
    cost = sum(packed(texts, part) for part in passes(texts, 100))
    assert cost <= 2 * (len(prompt) + 20 * count)
