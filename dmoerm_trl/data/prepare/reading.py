"""Opening a set and reading its examples, as a stream where the set allows it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}

Examples = Dataset | IterableDataset


def open_set(
    source: str,
    split: str = "train",
    *,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Examples:
    """
    Opens a set.

    Args:
        source (`str`): a `.jsonl`, `.json`, `.parquet`, `.arrow` or `.csv` file, also compressed as `.gz`; a folder of such
            files or of `save_to_disk`; or the name of a dataset on the hub.
        split (`str`): which split of a folder or of a dataset on the hub; a file has one, whatever it is called.
        name, data_dir, revision: as of `datasets.load_dataset`, for a dataset on the hub.
        streaming (`bool`): read it as a stream, else by index.

    Raises:
        FileNotFoundError: if the source is a file that is not there, or of a kind that is not read.
        ValueError: if it is empty, or does not have the split.
    """
    path = Path(source)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"got {source!r}, an empty file, need one with examples.")
    if path.is_file() and suffix in LOADERS:
        return load_dataset(LOADERS[suffix], data_files=str(path), split="train", streaming=streaming)
    if path.is_file() or (not path.exists() and (suffix in LOADERS or path.is_absolute())):
        problem = "a kind that is not read" if path.is_file() else "which does not exist"
        raise FileNotFoundError(
            f"got {source!r}, {problem}: need a file ending in {', '.join(LOADERS)}, a folder or a hub name."
        )
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(source)
        if isinstance(saved, DatasetDict) and split not in saved:
            raise ValueError(f"{source}: got split {split!r}, need one of {sorted(saved)}.")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(source, name, data_dir=data_dir, split=split, revision=revision, streaming=streaming)


def columns_of(dataset: Examples) -> list[str]:
    """The names of the columns, from the first example where the dataset does not say."""
    return list(dataset.column_names or next(iter(dataset), {}))


def read_examples(
    dataset: Examples, columns: Mapping[str, str], group_by: Sequence[str] = (), consecutive: bool = True
) -> Iterator[list[dict[str, Any]]]:
    """
    The examples that make one row each, under the names that the converters know.

    Args:
        columns (`Mapping[str, str]`): name -> the set's own name of a column. The other columns keep theirs.
        group_by (`Sequence[str]`): where a row is made of several examples, the columns that tell the rows apart, by the
            names that the converters know. The first that there is counts.
        consecutive (`bool`): whether the examples of a row follow each other. If not, `dataset` must be one that is read by
            index, and the indices of its examples are held in memory.

    Yields:
        Lists of examples, of one without `group_by`.
    """
    own_names = {own: name for name, own in columns.items()}

    def renamed(example: Mapping[str, Any]) -> dict[str, Any]:
        return {
            own_names.get(own, own): value for own, value in example.items() if own in own_names or own not in columns
        }

    if not group_by:
        yield from ([renamed(example)] for example in dataset)
        return
    present = renamed({column: column for column in columns_of(dataset)})
    key = next(name for name in group_by if name in present)
    if consecutive:
        yield from (list(group) for _, group in groupby(map(renamed, dataset), lambda example: example.get(key)))
        return
    indices: dict[str, list[int]] = {}
    for index, value in enumerate(dataset[present[key]]):
        indices.setdefault(json.dumps(value), []).append(index)
    for group in indices.values():
        yield [renamed(dataset[index]) for index in group]
