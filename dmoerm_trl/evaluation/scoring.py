"""Scoring many texts: batches under a token budget, in which texts with one prompt stand together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.formatting import Encoding, Formatter
from ..data.rows import PreferenceRow
from ..modeling.forest import passes
from ..modeling.modeling import DMoERMForSequenceClassification, DMoERMOutput


@torch.no_grad()
def map_encodings(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    encodings: Sequence[Encoding],
    *,
    pad_token_id: int,
    device: torch.device | str = "cpu",
    tokens_per_batch: int = 16_384,
    description: str = "scoring",
) -> Tensor:
    """
    Applies `function(input_ids, attention_mask, prompt_lengths)`, whose result has the batch as its first dimension, to
    all texts and returns the results in the texts' order, on the CPU.

    Args:
        tokens_per_batch (`int`): tokens of a batch, where a prompt that several texts share counts once; a batch of long
            texts may have twice its first text's.
    """
    result: Tensor | None = None
    with tqdm(total=len(encodings), desc=description, unit=" texts", delay=3, leave=False) as progress:
        for batch in passes([encoding.input_ids for encoding in encodings], tokens_per_batch):
            ids = [torch.tensor(encodings[index].input_ids) for index in batch]
            values = function(
                torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(device),
                torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
                torch.tensor([encodings[index].prompt_length for index in batch], device=device),
            ).cpu()
            if result is None:
                result = values.new_empty(len(encodings), *values.shape[1:])
            result[batch] = values
            progress.update(len(batch))
    if result is None:
        raise ValueError("got no texts, need at least one.")
    return result


def score_encodings(
    model: DMoERMForSequenceClassification, encodings: Sequence[Encoding], *, pad_token_id: int, **options
) -> Tensor:
    """The rewards of texts, shape (N,). The model is put into evaluation mode."""
    model.eval()

    def rewards(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        return model(input_ids, attention_mask, prompt_lengths=prompt_lengths).logits[:, 0]

    return map_encodings(rewards, encodings, pad_token_id=pad_token_id, device=model.device, **options)


def score_rows(
    model: DMoERMForSequenceClassification, rows: Sequence[PreferenceRow], formatter: Formatter, **options
) -> list[list[float]]:
    """The rewards of all responses of all rows, one list a row."""
    encodings, _ = formatter.encode_rows(rows)
    flat = [encoding for row in encodings for encoding in row]
    rewards = iter(score_encodings(model, flat, pad_token_id=formatter.tokenizer.pad_token_id, **options).tolist())
    return [[next(rewards) for _ in row] for row in encodings]


@torch.no_grad()
def score_one(model: DMoERMForSequenceClassification, encoding: Encoding) -> DMoERMOutput:
    """The whole output for one text: reward, route and capability scores."""
    model.eval()
    return model(
        torch.tensor([encoding.input_ids], device=model.device),
        prompt_lengths=torch.tensor([encoding.prompt_length], device=model.device),
        attention_mask=torch.ones(1, len(encoding.input_ids), dtype=torch.long, device=model.device),
    )
