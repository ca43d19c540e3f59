"""Reading of preference rows from files and datasets, and writing to files; see recipes/DATA.md."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm

from ..files import writing
from ..tasks import OTHERS, OVERALL, TaskTable
from .preference_row import PreferenceRow, RowError, check_prompt, check_row, short, turns_of
from .prepare.reading import open_set
from .records import Records, is_file, kind_of
from .trl_pairs import pair_of

if TYPE_CHECKING:
    from datasets import Dataset

OnError = Literal["raise", "skip"]


@dataclass
class LoadReport:
    """Counts of the rows of a source: `rows` were kept, and the others are counted by what happened to them."""

    source: str
    rows: int = 0
    duplicates: int = 0
    contradictions: int = 0  # duplicates with other labels than the row that was kept
    skipped: Counter = field(default_factory=Counter)  # reason -> rows
    read_as_others: Counter = field(default_factory=Counter)  # label in the paper's published rows -> rows
    ignored_fields: Counter = field(default_factory=Counter)  # field -> rows
    prompts_found: Counter = field(default_factory=Counter)  # how the prompt was found in both texts -> rows
    identical_pairs: int = 0  # pairs of responses with the same text but different labels

    def __str__(self) -> str:
        return "; ".join([f"{self.source}: {self.rows} rows", *self.remarks])

    @property
    def remarks(self) -> list[str]:
        """Sentences about everything but the number of rows kept."""
        remarks = []
        if self.duplicates:
            remarks.append(f"{self.duplicates} duplicates removed ({self.contradictions} of them with other labels)")
        for what, counts in (
            ("skipped", self.skipped),
            ("with a label that was read as others", self.read_as_others),
            ("fields not read", self.ignored_fields),
            ("with a prompt that was found in both texts", self.prompts_found),
        ):
            if counts:
                listed = ", ".join(f"{name}: {count}" for name, count in counts.most_common())
                remarks.append(f"{sum(counts.values())} {what} ({listed})")
        if self.identical_pairs:
            remarks.append(
                f"{self.identical_pairs} pairs of responses with the same text and different labels, which are ignored"
            )
        return remarks


# --------------------------------------------------------------------------------------------------- reading


def load_rows(
    source: str | os.PathLike, *, tasks: TaskTable | None = None, split: str = "train", on_error: OnError = "raise"
) -> tuple[list[PreferenceRow], LoadReport]:
    """
    Read and check preference rows.

    Args:
        source (`str`):
            A `.jsonl`, `.json`, `.parquet`, `.arrow` or `.csv` file, which may be compressed as `.gz`; a folder of such
            files or of `save_to_disk`; or the name of a dataset on the Hub.
        tasks (`TaskTable`, *optional*):
            Tasks and capability points that rows may name. Defaults to the paper's table 12.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder or of a dataset on the Hub.
        on_error (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at the first bad row. `"skip"` drops bad rows and counts them by reason.

    Returns:
        The rows without duplicates, in the order of the source, and a [`LoadReport`], which prints as a short text.

    Raises:
        `ValueError`: For the first bad row. The message names the source, the line (from 1), the field and how to fix it.

    Example:

    ```python
    from dmoerm_trl import load_rows

    rows, report = load_rows("runs/demo/data/test.jsonl")
    print(report)
    ```
    """
    return _collect(records_of(source, split), tasks or TaskTable.paper(), on_error)


def iter_rows(
    source: str | os.PathLike,
    *,
    tasks: TaskTable,
    split: str = "train",
    on_error: OnError = "raise",
    report: LoadReport | None = None,
) -> Iterator[PreferenceRow]:
    """
    Read and check preference rows one at a time, so that they need not fit into memory.

    Duplicates are not removed. If `report` is given, it counts the rows. See [`load_rows`] for the other arguments.
    """
    return _checked(records_of(source, split), tasks, on_error, LoadReport(str(source)) if report is None else report)


def rows_from_dataset(
    dataset: "Dataset", *, tasks: TaskTable, on_error: OnError = "raise", name: str = "dataset"
) -> tuple[list[PreferenceRow], LoadReport]:
    """
    Read and check the preference rows of a dataset in memory, as in [`load_rows`]. Messages call it `name`.

    Example:

    ```python
    from datasets import Dataset
    from dmoerm_trl import TaskTable, rows_from_dataset

    pairs = Dataset.from_list([{"prompt": "Hello?", "chosen": "Hi!", "rejected": "Go away."}])
    rows, report = rows_from_dataset(pairs, tasks=TaskTable.paper())
    ```
    """
    return _collect(Records.of_dataset(name, dataset), tasks, on_error)


def write_rows(rows: Iterable[PreferenceRow], path: str | os.PathLike) -> None:
    """
    Write rows as JSONL for [`load_rows`]. The file is either written completely or not at all.

    Example:

    ```python
    from dmoerm_trl import PreferenceRow, write_rows

    write_rows([PreferenceRow([{"role": "user", "content": "Hello?"}], ["Hi!", "Go away."], [1, 2])], "rows.jsonl")
    ```
    """
    with writing(path) as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def records_of(source: str | os.PathLike, split: str = "train") -> Records:
    """
    Return the records of a source, see [`load_rows`]. A file may be empty.

    Raises:
        FileNotFoundError: If the source is a file that does not exist or has an unsupported format.
        ValueError: If the source does not have the split.
    """
    path = Path(source)
    if is_file(path) and kind_of(path):
        return Records.of_files(str(path), [path])
    return open_set(str(source), split, streaming=False)


def places_of(
    rows: Iterable[PreferenceRow], source: str | os.PathLike, *, tasks: TaskTable, split: str = "train"
) -> list[str]:
    """Return the places (file and line) of some rows of [`load_rows`] in their source, in the order of the source."""
    wanted = {(row.prompt_id, tuple(row.responses)) for row in rows}
    places, report = [], LoadReport(str(source))
    for place, raw in records_of(source, split):
        try:
            row = parse_row(raw, tasks, report)
            check_row(row, tasks)
        except RowError:
            continue
        if (row.prompt_id, tuple(row.responses)) in wanted:
            wanted.remove((row.prompt_id, tuple(row.responses)))
            places.append(str(place))
    return places


def _checked(
    records: Records,
    tasks: TaskTable,
    on_error: OnError,
    report: LoadReport,
) -> Iterator[PreferenceRow]:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"got on_error={on_error!r}, need 'raise' or 'skip'.")
    for place, raw in records:
        try:
            row = parse_row(raw, tasks, report)
            check_row(row, tasks)
        except RowError as error:
            if on_error == "raise":
                way_out = "To leave such rows out and count them: on_error='skip'."
                raise ValueError(f"{place}: {error} {way_out}") from error
            report.skipped[error.reason] += 1
        else:
            report.rows += 1
            report.identical_pairs += len(row.identical_pairs)
            yield row


def _collect(records: Records, tasks: TaskTable, on_error: OnError) -> tuple[list[PreferenceRow], LoadReport]:
    rows, seen, report = [], {}, LoadReport(records.name)
    checked = _checked(records, tasks, on_error, report)
    for row in tqdm(checked, desc=f"reading {records.name}", unit=" rows", delay=3):
        first = seen.setdefault((row.prompt_id, tuple(sorted(row.responses))), row)
        if first is row:
            rows.append(row)
        else:
            report.duplicates += 1
            report.contradictions += _labels(first) != _labels(row)
    report.rows = len(rows)  # without the duplicates
    report.identical_pairs = sum(len(row.identical_pairs) for row in rows)
    return rows, report


def _labels(row: PreferenceRow) -> tuple[str | None, dict[str | None, list[tuple[str, str]]]]:
    """Return the labels of a row, independent of the order of its responses and of their form (ranks or pairs)."""
    texts = row.responses
    return row.task, {
        point: sorted((texts[better], texts[worse]) for better, worse in row.pairs_of(point))
        for point in (None, *row.labelled_points)
    }


# --------------------------------------------------------------------------------------------------- formats

_CAPABILITIES = {"capability_ranks": "ranks", "capability_pairs": "pairs"}
_TURN, _PART = {"role", "content"}, {"type", "text"}
_OURS = {"prompt", "messages", "responses", "ranks", "task", *_CAPABILITIES}
_TRL = {"prompt", "chosen", "rejected", "task", *_CAPABILITIES}
_PUBLISHED = {"src", "tgt", "response", "rank", "label"}


def parse_row(raw: Any, tasks: TaskTable, report: LoadReport) -> PreferenceRow:
    """
    Convert a row of any accepted format to a [`PreferenceRow`], whose values must still be checked.

    The fields that are not read are counted in `report`.

    Raises:
        [`RowError`]: If the row has none of the formats.
    """
    raw = _fields_of(raw)
    format_ = _format_of(raw)
    if format_ is None:
        raise RowError(
            "unknown format",
            f"got the fields {sorted(raw)}, need `prompt` or `messages`, `responses` and `ranks`; or `chosen` and "
            "`rejected`; or `src`, `tgt`, `response` and `rank`: rename the fields.",
        )
    fields, parse = format_
    row = parse(raw, tasks, report)
    report.ignored_fields.update(_unread(raw) | (raw.keys() - fields))
    return row


def prompt_of(raw: Any) -> list[dict]:
    """
    Return the prompt of a record, which is a row of an accepted format or any object with `prompt` or `messages`.

    Raises:
        [`RowError`]: If the record has no valid prompt.
    """
    raw = _fields_of(raw)
    if {"chosen", "rejected"} <= raw.keys():
        prompt = pair_of(raw).prompt
    elif "src" in raw and "prompt" not in raw:
        prompt = _published_prompt(raw)
    else:
        prompt = _own_prompt(raw)
    check_prompt(prompt)
    return prompt


def _fields_of(raw: Any) -> dict[str, Any]:
    """Return the fields that are present. `datasets` writes None for an absent field."""
    if isinstance(raw, RowError):
        raise raw
    if not isinstance(raw, dict):
        raise RowError("unknown format", f"got {short(raw)}, need an object with `prompt`, `responses` and `ranks`.")
    return {name: value for name, value in raw.items() if value is not None}


def _unread(raw: dict[str, Any]) -> set[str]:
    """Return the fields of a row's turns that are not read."""
    unread = set()
    for name in ("prompt", "messages", "chosen", "rejected"):
        turns = raw[name] if isinstance(raw.get(name), list) else []
        turns = [turn for turn in turns if isinstance(turn, dict)]  # otherwise it is not a chat, and is not read
        parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
        for path, objects, read in ((name, turns, _TURN), (f"{name}.content", parts, _PART)):
            objects = [one for one in objects if isinstance(one, dict)]
            unread |= {f"{path}.{key}" for one in objects for key in one.keys() - read if one[key] is not None}
    return unread


def _parse_ours(raw: dict, tasks: TaskTable, report: LoadReport) -> PreferenceRow:
    prompt = _own_prompt(raw)
    missing = {"responses", "ranks"} - raw.keys()
    if missing:
        raise RowError(
            "missing field", f"got no field `{missing.pop()}`, need it with one entry per response: add it."
        )
    return PreferenceRow(prompt, raw["responses"], raw["ranks"], raw.get("task"), **_capability_labels(raw))


def _own_prompt(raw: dict) -> list[dict]:
    given = [name for name in ("prompt", "messages") if name in raw]
    if len(given) != 1:
        got = "`prompt` and `messages`" if given else "the prompt None"
        raise RowError(
            "bad prompt", f"got {got} among the fields {sorted(raw)}, need exactly one of `prompt` and `messages`."
        )
    return turns_of(raw[given[0]], given[0])


def _parse_trl(raw: dict, tasks: TaskTable, report: LoadReport) -> PreferenceRow:
    """Read TRL's preference format, standard or conversational, with or without `prompt`."""
    pair = pair_of(raw)
    if pair.found is not None:
        report.prompts_found[pair.found] += 1
    return PreferenceRow(pair.prompt, pair.responses, [1, 2], raw.get("task"), **_capability_labels(raw))


def _parse_published(raw: dict, tasks: TaskTable, report: LoadReport) -> PreferenceRow:
    """
    Read the paper's published rows, with user turns in `src` and the assistant turns between them in `tgt`.

    A lower `rank` is better. The Chinese `label` is translated to the task's name in the table. Labels without a task in
    the table are read as `others`.
    """
    task = raw.get("label") or None
    if isinstance(task, str) and task not in tasks.tasks and task != OTHERS:
        english = dict(zip(TaskTable.paper("zh").tasks, TaskTable.paper("en").tasks, strict=True)).get(task)
        if english not in tasks.tasks:
            report.read_as_others[task] += 1
            english = OTHERS
        task = english
    return PreferenceRow(_published_prompt(raw), raw["response"], raw["rank"], task)


def _published_prompt(raw: dict) -> list[dict]:
    users, assistants = raw["src"], raw.get("tgt", [])
    if not isinstance(users, list) or not isinstance(assistants, list) or len(users) != len(assistants) + 1:
        raise RowError(
            "bad prompt",
            f"fields `src` and `tgt`: got {short(users)} and {short(assistants)}, need lists "
            "with one more in `src` because the last user turn is the one to answer: fix the row.",
        )
    turns = [{"role": "user", "content": users[0]}]
    for assistant, user in zip(assistants, users[1:], strict=True):
        turns += [{"role": "assistant", "content": assistant}, {"role": "user", "content": user}]
    return turns_of(turns, "src")


def _capability_labels(raw: dict) -> dict[str, dict[str, list]]:
    """Return the fields of capability labels without the points that are None."""
    fields = {}
    for name, kind in _CAPABILITIES.items():
        labels = raw.get(name, {})
        if not isinstance(labels, dict):
            raise RowError(f"bad {name}", f"field `{name}`: got {short(labels)}, need point -> {kind}.")
        fields[name] = {point: of_point for point, of_point in labels.items() if of_point is not None}
    return fields


def _format_of(raw: dict) -> tuple[set[str], Callable[[dict, TaskTable, LoadReport], PreferenceRow]] | None:
    """Return the fields of a row's format and the function that reads it, or None if the format is unknown."""
    if raw.keys() & {"responses", "ranks"}:
        return _OURS, _parse_ours
    if {"chosen", "rejected"} <= raw.keys():
        return _TRL, _parse_trl
    if {"src", "response", "rank"} <= raw.keys():
        return _PUBLISHED, _parse_published
    return None


# ------------------------------------------------------------------------------------------------ the same tokens


def merge_same_tokens(
    rows: Iterable[PreferenceRow], encodings: Iterable[Sequence[Any]]
) -> tuple[list[PreferenceRow], int]:
    """
    Give responses with the same tokens the same text, so that they form no pair.

    A tokenizer may normalise the difference between two texts, or a chat template may drop it.

    Args:
        encodings (`Iterable[Sequence]`): For each row, the encodings of its responses with `input_ids`, as returned by
            [`~dmoerm_trl.data.formatting.Formatter.encode_rows`].

    Returns:
        The rows, and the number of labelled pairs that were lost.
    """
    merged, pairs = [], 0
    for row, of_row in zip(rows, encodings, strict=True):
        merged.append(row.merged([tuple(encoding.input_ids) for encoding in of_row]))
        pairs += len(merged[-1].identical_pairs) - len(row.identical_pairs)
    return merged, pairs


# ---------------------------------------------------------------------------------------------------- checks


def check_capability_labels(rows: Iterable[PreferenceRow], tasks: TaskTable, *, overall: bool = True) -> None:
    """
    Check, before any training, that every expert has something to learn from.

    Args:
        rows (`Iterable[PreferenceRow]`):
            Rows for training.
        tasks (`TaskTable`):
            Table of tasks and points. Each point of each task needs a row of that task in which one response is better than
            another on the point.
        overall (`bool`, *optional*, defaults to `True`):
            Whether the overall points (those of DMoERM-w/o-Outer) need such a row too, from any task.

    Raises:
        `ValueError`: If a point has no labels. The message names all such points and how to fix them.
    """
    labelled = set()
    for row in rows:
        points = [point for point in row.labelled_points if row.pairs_of(point)]
        labelled |= {(task, point) for task in (row.task, OVERALL) for point in points}
    needed = tasks.tasks | ({OVERALL: tasks.overall} if overall else {})
    missing = {task: [point for point in points if (task, point) not in labelled] for task, points in needed.items()}
    missing = {task: points for task, points in missing.items() if points}
    if missing:
        listed = "; ".join(f"task {task!r}: {', '.join(map(repr, points))}" for task, points in missing.items())
        raise ValueError(
            f"got no labels for the capability points of {listed}. Need `capability_ranks` with two distinct ranks or "
            "`capability_pairs` with a pair on at least one row of the task, because an expert is trained on them: label "
            "the rows, or take the points out of the task table."
        )
