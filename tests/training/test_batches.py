"""What a batch of ranked responses holds, and which rows go into one under a budget of tokens."""

from hypothesis import given
from hypothesis import strategies as st

from dmoerm_trl.training.batches import TokenBatches, collate_ranked, distinct_tokens

# What a batch holds.


def test_a_batch_holds_each_response_once_padded_on_the_right():
    examples = [
        {"input_ids": [[5, 6, 7], [5, 6]], "prompt_lengths": [2, 1], "pairs": [[0, 1, 0]]},
        {"input_ids": [[8], [8, 9], [8, 4, 4, 4]], "prompt_lengths": [1, 1, 1], "pairs": [[0, 0, 2], [0, 1, 2]]},
    ]
    batch = {name: tensor.tolist() for name, tensor in collate_ranked(examples, pad_token_id=3).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 3], [5, 6, 3, 3], [8, 3, 3, 3], [8, 9, 3, 3], [8, 4, 4, 4]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "prompt_lengths": [2, 1, 1, 1, 1],
        "pairs": [[0, 1, 0], [0, 2, 4], [0, 3, 4]],
        "groups": [0, 0, 1, 1, 1],
    }


def test_a_token_of_the_text_that_equals_the_pad_is_attended():
    batch = collate_ranked(
        [{"input_ids": [[3, 3], [3]], "prompt_lengths": [1, 1], "pairs": [[0, 0, 1]]}], pad_token_id=3
    )
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_pairs_keep_their_point_and_a_prompt_may_have_none():
    examples = [
        {"texts": [0, 1], "pairs": [[1, 1, 0]]},
        {"texts": [2, 3, 4], "pairs": []},
        {"texts": [5, 6, 7], "pairs": [[0, 2, 1], [1, 0, 1]]},
    ]
    batch = collate_ranked(examples, pad_token_id=3)
    assert batch["pairs"].tolist() == [[1, 1, 0], [0, 7, 6], [1, 5, 6]]
    assert batch["groups"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert collate_ranked(examples[1:2], pad_token_id=3)["pairs"].shape == (0, 3)


def test_a_batch_of_texts_that_are_embedded_already_holds_their_indices():
    examples = [{"texts": [4, 2], "pairs": [[0, 0, 1]]}, {"texts": [0, 1], "pairs": [[0, 1, 0]]}]
    batch = collate_ranked(examples, pad_token_id=3)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "texts": [4, 2, 0, 1],
        "pairs": [[0, 0, 1], [0, 3, 2]],
        "groups": [0, 0, 1, 1],
    }


# Which rows go into one.


def test_a_shared_prompt_counts_once():
    assert distinct_tokens([[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 5, 6]], [3, 3, 3]) == 3 + 1 + 0 + 2
    assert distinct_tokens([[1, 2, 3, 4], [2, 3, 9, 9]], [3, 2]) == 3 + 2 + 1 + 2  # the second prompt was cut


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120), st.integers(0, 3))
def test_every_row_is_in_one_batch_and_no_batch_of_several_is_over_the_budget(lengths, budget, epoch):
    sampler = TokenBatches(lengths, budget, seed=lambda: epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[row] for row in batch) <= budget


def test_rows_of_like_length_are_together():
    lengths = [9, 1, 8, 2, 30, 2]
    assert list(TokenBatches(lengths, 17)) == [[4], [0, 2], [3, 5, 1]]


def test_the_order_of_the_batches_is_drawn_anew_each_epoch():
    lengths, epoch = list(range(1, 40)), 0
    sampler = TokenBatches(lengths, 40, seed=lambda: 7 + epoch)
    first, again = list(sampler), list(sampler)
    epoch = 1
    second = list(sampler)
    assert first == again != second
    assert sorted(first) == sorted(second) == sorted(TokenBatches(lengths, 40))
