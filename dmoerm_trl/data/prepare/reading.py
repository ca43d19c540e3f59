"""Open a set and read its examples, as a stream if the set allows it."""

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ...messages import reason
from ..preference_row import RowError, short
from ..records import KINDS, Record, Records, is_file, kind_of

COLUMNS_FROM = 1000
"""Number of examples from which the names of the columns are read, because some may lack a field."""


def open_set(
    source: str,
    split: str = "train",
    *,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Records:
    """
    Open a set.

    Args:
        source (`str`): A `.jsonl`, `.json`, `.parquet`, `.arrow` or `.csv` file, also compressed as `.gz`; a folder of such
            files or of `save_to_disk`; or the name of a dataset on the hub.
        split (`str`): Split of a folder or of a dataset on the hub. A file is one split of any name.
        name, data_dir, revision: Arguments of `datasets.load_dataset`, for a folder or a dataset on the hub.
        streaming (`bool`): Whether to stream a dataset on the hub instead of downloading it first.

    Raises:
        FileNotFoundError: If the source is a missing file, or of an unknown type.
        ValueError: If it is empty, or does not have the split.
    """
    import datasets  # imported here because it takes half a second

    path = Path(source)
    if not source.strip():
        raise ValueError(f"got {source!r}, need a file ending in {', '.join(KINDS)}, a folder or a hub name.")
    if is_file(path) and not path.stat().st_size:
        raise ValueError(f"got {source!r}, an empty file, need one with examples.")
    if is_file(path) and kind_of(path):
        return Records.of_files(source, [path])
    if (path.exists() and not path.is_dir()) or (not path.exists() and (kind_of(path) or path.is_absolute())):
        problem = "a kind that is not read" if path.exists() else "which does not exist"
        raise FileNotFoundError(
            f"got {source!r}, {problem}: need a file ending in {', '.join(KINDS)}, a folder or a hub name."
        )
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(source)
        if isinstance(saved, datasets.DatasetDict) and split not in saved:
            raise _no_split(source, split, saved)
        return Records.of_dataset(source, saved[split] if isinstance(saved, datasets.DatasetDict) else saved)
    if path.is_dir():
        return Records.of_files(source, _files_of(source, split, name, data_dir))
    settings = {"data_dir": data_dir, "split": split, "revision": revision, "streaming": streaming}
    try:
        dataset = datasets.load_dataset(source, name, **settings)
        if getattr(getattr(dataset, "info", None), "builder_name", None) == "csv":  # "NA" and the like are text
            dataset = datasets.load_dataset(source, name, **settings, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"got {source!r}, no file or folder, and a dataset on the hub that cannot be read ({reason(error)}): fix the name, or "
            "name a file."
        ) from error
    return Records.of_dataset(source, dataset)


def _files_of(source: str, split: str, name: str | None, data_dir: str | None) -> list[str]:
    """List the files of a split in a folder, which `datasets` recognises by their names."""
    import datasets

    try:
        files = datasets.load_dataset_builder(source, name, data_dir=data_dir).config.data_files
    except datasets.data_files.EmptyDatasetError as error:
        raise ValueError(f"got {source!r}, a folder without files ending in {', '.join(KINDS)}, need some.") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"got {source!r}, a folder that cannot be read ({reason(error)}), need one with files ending in {', '.join(KINDS)}, and "
            "no others: name a file."
        ) from error
    if split not in files:
        raise _no_split(source, split, files)
    if other := [path for path in files[split] if not kind_of(Path(path))]:
        raise ValueError(f"{source}: got {other[0]}, need files ending in {', '.join(KINDS)}.")
    return list(files[split])


def _no_split(source: str, split: str, known: Mapping[str, Any]) -> ValueError:
    return ValueError(f"{source}: got split {split!r}, need one of {sorted(map(str, known))}.")


def columns_of(dataset: Records) -> list[str]:
    """Return the names of the columns of the first examples."""
    values = (value for _, value in islice(dataset, COLUMNS_FROM))
    return list(dict.fromkeys(name for value in values if isinstance(value, dict) for name in value))


def read_examples(
    dataset: Records, columns: Mapping[str, str], group_by: Sequence[str] = (), consecutive: bool = True
) -> Iterator[Record]:
    """
    Yield the examples of each row, with the standard names of the columns.

    Args:
        columns (`Mapping[str, str]`): Standard name of a column -> its name in the set. Other columns keep their names.
        group_by (`Sequence[str]`): Standard names of the columns that identify a row of several examples. The first one that
            exists is used.
        consecutive (`bool`): Whether the examples of a row are consecutive. Otherwise they are written to a temporary file, and
            only their positions are held in memory.

    Yields:
        Lists of examples (one example without `group_by`) with the place of the first; or a [`RowError`].
    """
    own_names = {own: name for name, own in columns.items()}

    def renamed(record: Record) -> Record:
        example = record.value
        if isinstance(example, RowError):
            return record
        if not isinstance(example, dict):
            error = RowError("unknown format", f"got {short(example)}, need an object with the columns: fix it.")
            return record._replace(value=error)
        taken = (own for own in example if own in own_names or own not in columns)
        return record._replace(value={own_names.get(own, own): example[own] for own in taken})

    records = map(renamed, dataset)
    if not group_by:
        yield from (_group([record]) for record in records)
        return
    present = renamed(Record("", dict.fromkeys(columns_of(dataset)))).value
    key = next(name for name in group_by if name in present)
    if not consecutive:
        yield from _scattered(records, key)
        return
    for _, group in groupby(records, lambda record: record if _is_error(record) else record.value.get(key)):
        yield _group(list(group))


def _group(records: list[Record]) -> Record:
    return records[0] if _is_error(records[0]) else Record(records[0].place, [record.value for record in records])


def _is_error(record: Record) -> bool:
    return isinstance(record.value, RowError)


def _scattered(records: Iterable[Record], key: str) -> Iterator[Record]:
    places: dict[str, array] = {}
    with tempfile.TemporaryFile() as file:
        for record in records:
            if _is_error(record):
                yield record
                continue
            places.setdefault(json.dumps(record.value.get(key), default=str), array("Q")).append(file.tell())
            file.write(json.dumps(record, default=str).encode() + b"\n")
        for of_group in places.values():
            group = []
            for place in of_group:
                file.seek(place)
                group.append(Record(*json.loads(file.readline())))
            yield _group(group)
