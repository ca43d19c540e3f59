"""Preference rows from files and datasets, and back to files; see recipes/DATA.md."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from tqdm.auto import tqdm

from ..tasks import OTHERS, OVERALL, TaskTable
from .preference_row import PreferenceRow, RowError, check_row, short, turns_of
from .prepare.reading import open_set

OnError = Literal["raise", "skip"]


@dataclass
class LoadReport:
    """What became of the rows of a source: `rows` were kept, the others are counted by what happened to them."""

    source: str
    rows: int = 0
    duplicates: int = 0
    contradictions: int = 0  # those of the duplicates whose labels differ from those of the row that was kept
    skipped: Counter = field(default_factory=Counter)  # reason -> rows
    read_as_others: Counter = field(default_factory=Counter)  # label of the paper's published rows -> rows
    ignored_fields: Counter = field(default_factory=Counter)  # field -> rows

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.rows} rows"]
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates removed ({self.contradictions} of them with other labels)")
        for what, counts in (
            ("skipped", self.skipped),
            ("with a label that was read as others", self.read_as_others),
            ("fields not read", self.ignored_fields),
        ):
            if counts:
                listed = ", ".join(f"{name}: {count}" for name, count in counts.most_common())
                parts.append(f"{sum(counts.values())} {what} ({listed})")
        return "; ".join(parts)


# --------------------------------------------------------------------------------------------------- reading


def load_rows(
    source: str | os.PathLike, *, tasks: TaskTable, split: str = "train", on_error: OnError = "raise"
) -> tuple[list[PreferenceRow], LoadReport]:
    """
    Reads and checks preference rows.

    Args:
        source (`str`):
            A `.jsonl` file, or what `datasets` loads: a `.json`, `.parquet`, `.arrow` or `.csv` file, a folder of such
            files or of `save_to_disk`, or the name of a dataset on the hub.
        tasks (`TaskTable`):
            The tasks and capability points that rows may name.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a folder or of a dataset on the hub.
        on_error (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at the first bad row; `"skip"` leaves bad rows out and counts them by reason.

    Returns:
        The rows without duplicates, in the order of the source, and a [`LoadReport`], which prints as a short text.

    Raises:
        `ValueError`: For the first bad row, naming the source, the line (from 1), the field and the way out.
    """
    return _collect(*_numbered(source, split), tasks, on_error)


def iter_rows(
    source: str | os.PathLike,
    *,
    tasks: TaskTable,
    split: str = "train",
    on_error: OnError = "raise",
    report: LoadReport | None = None,
) -> Iterator[PreferenceRow]:
    """
    As [`load_rows`], one row at a time, so that the rows need not fit into memory. Duplicates are among them; `report`, if
    there is one, counts what is read.
    """
    return _checked(*_numbered(source, split), tasks, on_error, report or LoadReport(str(source)))


def rows_from_dataset(
    dataset: Dataset, *, tasks: TaskTable, on_error: OnError = "raise", name: str = "dataset"
) -> tuple[list[PreferenceRow], LoadReport]:
    """As [`load_rows`], for a dataset in memory; `name` is what messages call it."""
    return _collect(enumerate(dataset, start=1), name, "row", tasks, on_error)


def write_rows(rows: Iterable[PreferenceRow], path: str | os.PathLike) -> None:
    """Writes rows as JSONL that [`load_rows`] reads back. The file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    partial.replace(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, what stands there); for a broken line a [`RowError`] in the row's place. Blank lines are no rows."""
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield line, json.loads(text)
                except ValueError as error:  # not JSON, or not UTF-8
                    yield (
                        line,
                        RowError("broken JSON", f"got broken JSON ({error}), need one JSON object: mend the line."),
                    )


def _numbered(source: str | os.PathLike, split: str) -> tuple[Iterable[tuple[int, Any]], str, str]:
    """(number, what stands there) of a source's rows, the source's name, and what is numbered."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return _read_jsonl(path), str(path), "line"
    return enumerate(open_set(str(source), split, streaming=False), start=1), str(source), "row"


def _checked(
    numbered: Iterable[tuple[int, Any]],
    source: str,
    unit: str,
    tasks: TaskTable,
    on_error: OnError,
    report: LoadReport,
) -> Iterator[PreferenceRow]:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"got on_error={on_error!r}, need 'raise' or 'skip'.")
    for number, raw in numbered:
        try:
            row = _parse(raw, tasks, report)
            check_row(row, tasks)
        except RowError as error:
            if on_error == "raise":
                way_out = "To leave such rows out and count them: on_error='skip'."
                raise ValueError(f"{source}, {unit} {number}: {error} {way_out}") from error
            report.skipped[error.reason] += 1
        else:
            report.rows += 1
            yield row


def _collect(
    numbered: Iterable[tuple[int, Any]], source: str, unit: str, tasks: TaskTable, on_error: OnError
) -> tuple[list[PreferenceRow], LoadReport]:
    rows, seen, report = [], {}, LoadReport(source)
    checked = _checked(numbered, source, unit, tasks, on_error, report)
    for row in tqdm(checked, desc=f"reading {source}", unit=" rows", delay=3):
        first = seen.setdefault((row.prompt_id, tuple(sorted(row.responses))), row)
        if first is row:
            rows.append(row)
        else:
            report.duplicates += 1
            report.contradictions += _labels(first) != _labels(row)
    report.rows = len(rows)  # without the duplicates
    return rows, report


def _labels(row: PreferenceRow) -> tuple[str | None, dict[str | None, list[tuple[str, str]]]]:
    """What a row says of its responses, in whatever order and whichever way it says it."""
    texts = row.responses
    return row.task, {
        point: sorted((texts[better], texts[worse]) for better, worse in row.pairs_of(point))
        for point in (None, *row.labelled_points)
    }


# --------------------------------------------------------------------------------------------------- formats

_CAPABILITIES = {"capability_ranks": "ranks", "capability_pairs": "pairs"}
_OURS = {"prompt", "messages", "responses", "ranks", "task", *_CAPABILITIES}
_TRL = {"prompt", "chosen", "rejected", "task", *_CAPABILITIES}
_PUBLISHED = {"src", "tgt", "response", "rank", "label"}


def _parse(raw: Any, tasks: TaskTable, report: LoadReport) -> PreferenceRow:
    """Turns one row of any accepted format into a [`PreferenceRow`], whose values are still to be checked."""
    if isinstance(raw, RowError):
        raise raw
    if not isinstance(raw, dict):
        raise RowError("unknown format", f"got {short(raw)}, need an object with `prompt`, `responses` and `ranks`.")
    raw = {name: value for name, value in raw.items() if value is not None}  # None: how `datasets` writes an absence
    if raw.keys() & {"responses", "ranks"}:
        fields, row = _OURS, _parse_ours(raw)
    elif {"chosen", "rejected"} <= raw.keys():
        fields, row = _TRL, _parse_trl(raw)
    elif {"src", "response", "rank"} <= raw.keys():
        fields, row = _PUBLISHED, _parse_published(raw, tasks, report)
    else:
        raise RowError(
            "unknown format",
            f"got the fields {sorted(raw)}, need `prompt` or `messages`, `responses` and `ranks`; or `chosen` and "
            "`rejected`; or `src`, `tgt`, `response` and `rank`: rename the fields.",
        )
    chats = {
        name: raw[name] for name in ("prompt", "messages", "chosen", "rejected") if isinstance(raw.get(name), list)
    }
    unread = {
        f"{name}.{key}"
        for name, turns in chats.items()
        for turn in turns
        if isinstance(turn, dict)  # else it is no chat, and not read
        for key in turn
        if turn[key] is not None
    }
    unread -= {f"{name}.{key}" for name in chats for key in ("role", "content")}
    report.ignored_fields.update(unread | (raw.keys() - fields))
    return row


def _parse_ours(raw: dict) -> PreferenceRow:
    given = [name for name in ("prompt", "messages") if name in raw]
    if len(given) != 1:
        raise RowError("bad prompt", f"got the fields {sorted(raw)}, need exactly one of `prompt` and `messages`.")
    missing = {"responses", "ranks"} - raw.keys()
    if missing:
        raise RowError("missing field", f"got no field `{missing.pop()}`, need it with one entry a response: add it.")
    prompt = turns_of(raw[given[0]], given[0])
    return PreferenceRow(prompt, raw["responses"], raw["ranks"], raw.get("task"), **_capability_labels(raw))


def _parse_trl(raw: dict) -> PreferenceRow:
    """TRL's preference format, standard or conversational; without `prompt`, what both sides begin with is the prompt."""
    chosen, rejected = raw["chosen"], raw["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise RowError(
            "bad responses",
            f"fields `chosen` and `rejected`: got {short(chosen)} and {short(rejected)}, "
            "need both as text or both as turns.",
        )
    prompt = raw.get("prompt")
    if prompt is None:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        if isinstance(chosen, str):  # back to the start of the word in which they part, its space included as in TRL
            while shared and not chosen[shared - 1].isspace():
                shared -= 1
            shared -= chosen[:shared].endswith(" ")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise RowError(
                "empty prompt",
                "field `chosen`: got no beginning in common with `rejected`, need one because "
                "without the field `prompt` that is the prompt: add `prompt`.",
            )
    responses = [_completion(chosen, "chosen"), _completion(rejected, "rejected")]
    return PreferenceRow(turns_of(prompt, "prompt"), responses, [1, 2], raw.get("task"), **_capability_labels(raw))


def _parse_published(raw: dict, tasks: TaskTable, report: LoadReport) -> PreferenceRow:
    """
    The paper's published rows: user turns `src`, assistant turns before the last user turn `tgt`, a lower `rank` is
    better. The Chinese `label` becomes the table's own name for the task; labels outside the five are the paper's others.
    """
    users, assistants = raw["src"], raw.get("tgt", [])
    if not isinstance(users, list) or not isinstance(assistants, list) or len(users) != len(assistants) + 1:
        raise RowError(
            "bad prompt",
            f"fields `src` and `tgt`: got {short(users)} and {short(assistants)}, need lists "
            "with one more in `src` because the last user turn is the one to answer: mend the row.",
        )
    turns = [{"role": "user", "content": users[0]}]
    for assistant, user in zip(assistants, users[1:], strict=True):
        turns += [{"role": "assistant", "content": assistant}, {"role": "user", "content": user}]
    task = raw.get("label") or None
    if isinstance(task, str) and task not in tasks.tasks and task != OTHERS:
        english = dict(zip(TaskTable.paper("zh").tasks, TaskTable.paper("en").tasks, strict=True)).get(task)
        if english not in tasks.tasks:
            report.read_as_others[task] += 1
            english = OTHERS
        task = english
    return PreferenceRow(turns_of(turns, "src"), raw["response"], raw["rank"], task)


def _completion(completion: str | list, name: str) -> str:
    """The text of a side of TRL's format, which as turns must be one turn of the assistant."""
    if isinstance(completion, str):
        return completion
    turns = turns_of(completion, name)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise RowError(
            "bad responses",
            f"field `{name}`: got turns of {[turn['role'] for turn in turns]} after the prompt, "
            "need one turn of the assistant: move the turns before it into `prompt`.",
        )
    return turns[0]["content"]


def _capability_labels(raw: dict) -> dict[str, dict[str, list]]:
    """The fields of capability labels without the points that are None."""
    fields = {}
    for name, kind in _CAPABILITIES.items():
        labels = raw.get(name, {})
        if not isinstance(labels, dict):
            raise RowError(f"bad {name}", f"field `{name}`: got {short(labels)}, need point -> {kind}.")
        fields[name] = {point: of_point for point, of_point in labels.items() if of_point is not None}
    return fields


# ---------------------------------------------------------------------------------------------------- checks


def check_capability_labels(rows: Iterable[PreferenceRow], tasks: TaskTable, *, overall: bool = True) -> None:
    """
    Checks, before any training, that every expert has something to learn from.

    Args:
        rows (`Iterable[PreferenceRow]`):
            The rows for training.
        tasks (`TaskTable`):
            Each point of each task needs a row of that task in which one response is better than another on the point.
        overall (`bool`, *optional*, defaults to `True`):
            Whether the overall points (those of DMoERM-w/o-Outer) need such a row too, of whatever task.

    Raises:
        `ValueError`: If a point has no labels, naming all such points and the way out.
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
