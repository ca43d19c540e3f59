"""Batches of ranked responses: the collator, and a sampler with a token budget."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler


def collate_ranked(examples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """
    Flatten the responses of several prompts into one batch.

    Args:
        examples (`list[dict]`): Examples with `input_ids` (K lists of tokens, prompt included), `prompt_lengths` (K numbers)
            and `pairs`; or with `texts` (K indices of embeddings) instead of the first two. `pairs` are lists `[ranking,
            better, worse]`: the index of the ranking (0 if there is one), and those of the better and the worse response.

    Returns:
        The model's inputs with the N responses of all prompts in the first dimension; `groups` of shape (N,), the index of each
        response's prompt; and `pairs` of shape (pairs, 3), with indices of responses in the batch.
    """
    sizes = [len(example["texts" if "texts" in example else "input_ids"]) for example in examples]
    starts = [0, *accumulate(sizes)][:-1]
    pairs = [
        [ranking, start + better, start + worse]
        for example, start in zip(examples, starts, strict=True)
        for ranking, better, worse in example["pairs"]
    ]
    batch = {
        "pairs": torch.tensor(pairs, dtype=torch.long).view(-1, 3),  # also if there is no pair
        "groups": torch.arange(len(examples)).repeat_interleave(torch.tensor(sizes)),
    }
    if "texts" in examples[0]:
        return {"texts": torch.tensor([text for example in examples for text in example["texts"]]), **batch}
    rows = [torch.tensor(ids) for example in examples for ids in example["input_ids"]]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True),
        "prompt_lengths": torch.tensor([length for example in examples for length in example["prompt_lengths"]]),
        **batch,
    }


def distinct_tokens(input_ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> int:
    """Count the tokens of a prompt with K responses when prefixes are shared: each prompt once, and each response."""
    prompts = {tuple(ids[:length]) for ids, length in zip(input_ids, prompt_lengths, strict=True)}
    return sum(map(len, prompts)) + sum(map(len, input_ids)) - sum(prompt_lengths)


class TokenBatches(Sampler[list[int]]):
    """
    Batch sampler of whole rows with a token budget. Rows of similar length share a batch, and a row over the budget is a batch
    of its own. accelerate shards the sampler over processes.

    The rows of each batch are the same in every epoch, so every epoch has the same number of steps. Only the order of the
    batches changes.

    Args:
        lengths (`Sequence[int]`): Number of tokens of each row.
        tokens_per_batch (`int`): The budget.
        seed (`Callable[[], int]`, *optional*): Function that gives the seed of an epoch's order of the batches. By default the
            longest batch comes first.
    """

    def __init__(self, lengths: Sequence[int], tokens_per_batch: int, seed: Callable[[], int] | None = None):
        self.batches: list[list[int]] = []
        self.seed = seed
        room = 0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if not self.batches or lengths[row] > room:
                self.batches.append([])
                room = tokens_per_batch
            self.batches[-1].append(row)
            room -= lengths[row]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            return iter(self.batches)
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.seed()))
        return iter([self.batches[index] for index in order.tolist()])
