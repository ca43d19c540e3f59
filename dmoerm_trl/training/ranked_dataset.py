"""Tokenise preference rows for [`~dmoerm_trl.training.ranked_trainer.RankedRewardTrainer`]."""

from collections.abc import Sequence

from datasets import Dataset

from ..data.formatting import Encoding, Formatter
from ..data.preference_row import PreferenceRow
from ..data.rows import merge_same_tokens
from ..distributed.processes import is_main


def ranked_dataset(
    rows: Sequence[PreferenceRow], formatter: Formatter, points: Sequence[str] | None = None
) -> Dataset:
    """
    Convert rows to the dataset of [`RankedRewardTrainer`] or, with points, of [`ExpertsTrainer`]. Rows without a pair are left
    out.

    Args:
        points (`Sequence[str]`, *optional*): Capability points whose labels are used instead of the overall ranks.

    Raises:
        ValueError: If no row has a pair, or none has a pair of one of the points.

    Example:

    ```python
    from dmoerm_trl import Formatter, PreferenceRow, ranked_dataset
    from transformers import AutoTokenizer

    formatter = Formatter(AutoTokenizer.from_pretrained("runs/demo/base"), max_length=512)
    rows = [PreferenceRow([{"role": "user", "content": "Hello?"}], ["Hi! How are you?", "Go away."], [1, 2])]
    ranked_dataset(rows, formatter)["pairs"]  # [[[0, 0, 1]]]: the first point, the better response, the worse one
    ```
    """
    encodings, pairs = labelled_encodings(rows, formatter, [None] if points is None else points)
    return Dataset.from_dict(
        {
            "input_ids": [[encoding.input_ids for encoding in row] for row in encodings],
            "prompt_lengths": [[encoding.prompt_length for encoding in row] for row in encodings],
            "pairs": pairs,
        }
    )


def labelled_encodings(
    rows: Sequence[PreferenceRow], formatter: Formatter, points: Sequence[str | None]
) -> tuple[list[list[Encoding]], list[list[list[int]]]]:
    """
    Return the rows that have a pair of some point (None for the overall preference), their encoded responses, and their `pairs`
    for [`collate_ranked`]. Pairs of responses with the same tokens are left out, and their number is printed.
    """
    kept = [row for row in rows if any(row.pairs_of(point) for point in points)]
    encodings, _ = formatter.encode_rows(kept)
    kept, same = merge_same_tokens(kept, encodings)
    if same and is_main():
        print(f"{same} labelled pairs are not trained on: their responses are the same tokens")
    pairs = [[[i, *pair] for i, point in enumerate(points) for pair in row.pairs_of(point)] for row in kept]
    found = {i for of_row in pairs for i, _, _ in of_row}
    for i, point in enumerate(points):
        if i not in found:
            raise ValueError(
                f"got {len(rows)} rows and none with a pair of {point or 'the overall preference'}, need one in which a "
                "response is better than another, because there is nothing to learn otherwise: label the rows."
            )
    kept = [i for i, of_row in enumerate(pairs) if of_row]
    return [encodings[i] for i in kept], [pairs[i] for i in kept]
