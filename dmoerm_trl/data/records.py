"""Records of JSON Lines, JSON, CSV, Parquet and Arrow files, optionally compressed by gzip, with the place of each record."""

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from .preference_row import RowError, short

LONGEST_LINE = 2**26
"""Maximum number of characters in a line, or in a cell of CSV."""

LARGEST_ARRAY = 2**30
"""Maximum number of characters in a `.json` file with one array, which is read into memory as a whole."""

DEEPEST = 64
"""Maximum depth of nested objects and lists."""


class Record(NamedTuple):
    """Value at one place of a source."""

    place: str
    """Place such as `"rows.jsonl, line 3"`. Lines, rows and elements are counted from 1."""
    value: Any
    """Usually an object. A [`RowError`] if this record cannot be read but those after it can."""


@dataclass(frozen=True)
class Records:
    """Records of a source, which can be read more than once."""

    name: str
    """Name of the source in messages."""
    read: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        return self.read()

    @classmethod
    def of_files(cls, name: str, paths: Iterable[str | Path]) -> "Records":
        """
        Return the records of files, one file after the other.

        Raises:
            ValueError: While reading, if the rest of a file cannot be read. It may be cut off, of a different kind than its
                name says, or in an encoding that is neither UTF-8 nor marked by its first bytes.
        """
        paths = [Path(path) for path in paths]
        return cls(name, lambda: (record for path in paths for record in _KINDS[kind_of(path)](path)))

    @classmethod
    def of_dataset(cls, name: str, dataset: Iterable[dict]) -> "Records":
        """Return the rows of a dataset of `datasets`, or of any list of rows, as records."""
        return cls(name, lambda: (Record(f"{name}, row {number}", row) for number, row in enumerate(dataset, start=1)))


def is_file(path: Path) -> bool:
    """
    Return whether a path is a file.

    Raises:
        ValueError: If the path cannot be checked, for example because it is too long.
    """
    try:
        return path.is_file()
    except OSError as error:
        raise ValueError(
            f"got {short(str(path))}, a path that cannot be read ({error.strerror}), need a valid one: fix it."
        ) from error


def kind_of(path: Path) -> str | None:
    """Return the file ending that determines the format, one of [`KINDS`], or None for any other ending."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in _KINDS else None


# ------------------------------------------------------------------------------------------------ bytes and text


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file as bytes. Compression is detected by the content."""
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if compressed else file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: got a gzip file that is cut off or damaged ({error}), need a complete one: download or write it again."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{path}: got a file that cannot be read ({error.strerror or error}), need a readable one: check its permissions "
            "and its disk."
        ) from error


@contextmanager
def _as_text(path: Path, newline: str | None) -> Iterator[TextIO]:
    """
    Open a file as text: UTF-8, or UTF-16 or UTF-32 if the first bytes show it.

    Bytes that are not UTF-8 become halves of surrogate pairs, which [`_undecoded`] finds, so that the text after them can
    still be read.
    """
    with _opened(path) as file:
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        try:
            yield io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: got text that begins as {encoding} but is not ({error.reason}), need one encoding for the whole "
                "file: write it in UTF-8."
            ) from error


def _undecoded(text: str) -> RowError | None:
    """Return an error if a text was not UTF-8, else None."""
    if text.isascii() or (found := re.search("[\udc80-\udcff]", text)) is None:
        return None
    return RowError(
        "not UTF-8",
        f"got the byte {ord(found[0]) - 0xDC00:#x} at place {found.start()} (after {short(text[: found.start()][-20:])}), "
        "need UTF-8: convert the file, for example by `iconv -f LATIN1 -t UTF-8`.",
    )


def _lines_of(text: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: text.readline(LONGEST_LINE), ""), start=1):
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            raise ValueError(
                f"{path}, line {number}: got more than {LONGEST_LINE} characters, need one row per line: split it."
            )
        yield line


# -------------------------------------------------------------------------------------------------------- JSON


class _Json:
    """JSON reader that rejects objects with a field given twice, of which the standard library would keep the last."""

    def __init__(self):
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            self._twice.append(next(name for name in names if names.count(name) > 1))
        return value

    def value(self, text: str, start: int = 0) -> tuple[Any, int]:
        """
        Return the value that begins at `start`, or a [`RowError`] instead of it, and the index of its end.

        Raises:
            [`RowError`]: If the text is not valid JSON, so that the end is unknown.
        """
        self._twice.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError as error:
            raise _too_deep() from error
        except ValueError as error:
            raise _broken(str(error)) from error
        if self._twice:
            name = self._twice[0]
            return RowError(
                "field given twice", f"got the field {short(name)} twice in one object, need it once: keep one."
            ), end
        if text.count("[", start, end) + text.count("{", start, end) > DEEPEST and _deeper_than(value, DEEPEST):
            return _too_deep(), end
        return value, end

    def line(self, text: str) -> Any:
        """Return the only value of a text, or a [`RowError`] instead of it."""
        text = text.strip().lstrip("\ufeff").lstrip()
        try:
            value, end = self.value(text)
        except RowError as error:
            return _undecoded(text) or error
        if end < len(text):
            return _broken(f"Extra data: column {end + 1}")
        return _undecoded(text) or value


def _broken(problem: str) -> RowError:
    return RowError("broken JSON", f"got broken JSON ({problem}), need one JSON object: fix the line.")


def _too_deep() -> RowError:
    return RowError(
        "broken JSON",
        f"got broken JSON (more than {DEEPEST} nested objects or lists), need one JSON object: fix it.",
    )


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent)]
        level = [child for child in level if isinstance(child, (dict, list))]
    return bool(level)


def _json_lines(path: Path) -> Iterator[Record]:
    """Read one value per line. Blank lines are ignored."""
    reader = _Json()
    with _as_text(path, newline=None) as text:
        for number, line in enumerate(_lines_of(text, path), start=1):
            if line.strip("\ufeff \t\n\r\f\v"):
                yield Record(f"{path}, line {number}", reader.line(line))


def _json(path: Path) -> Iterator[Record]:
    """Read one array of values, or one value per line."""
    with _as_text(path, newline=None) as text:
        start = text.read(1)
        while start and start in "\ufeff \t\n\r":
            start = text.read(1)
        rest = text.read(LARGEST_ARRAY) if start == "[" else None
        if start == "{" and (start + text.readline(LONGEST_LINE)).rstrip()[-1] in "{[,":
            raise ValueError(
                f"{path}: got an object that spans several lines, need an array, or one object per line: write "
                "`[` before the first object, `,` between them and `]` after the last."
            )
    if rest is None:
        yield from _json_lines(path)
        return
    if len(rest) == LARGEST_ARRAY:
        raise ValueError(
            f"{path}: got an array of more than {LARGEST_ARRAY} characters, need JSON Lines, because a whole array is read "
            "into memory: write one object per line."
        )
    if wrong := _undecoded(rest):
        raise ValueError(f"{path}: {wrong}")
    reader, number, at = _Json(), 0, _after_space(rest, 0)
    closed = rest[at : at + 1] == "]"
    while not closed:
        number += 1
        place = f"{path}, element {number}"
        try:
            value, at = reader.value(rest, at)
        except RowError as error:
            raise ValueError(f"{place}: {error}") from error
        yield Record(place, value)
        at = _after_space(rest, at)
        closed = rest[at : at + 1] == "]"
        if not closed and rest[at : at + 1] != ",":
            raise ValueError(
                f"{path}: got {short(rest[at : at + 20])} after element {number} of the array, need ',' or ']': fix the file."
            )
        at = _after_space(rest, at + 1)
    if number and rest[at:].strip():
        raise ValueError(f"{path}: got {short(rest[at : at + 20])} after the array, need nothing: fix the file.")


_SPACE = re.compile(r"[ \t\n\r]*")


def _after_space(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()


# ----------------------------------------------------------------------------------------------- CSV, Parquet, Arrow


def _csv(path: Path) -> Iterator[Record]:
    """
    Read one record per line, with the names of the fields in the first line.

    All cells are read as text, even numbers. An empty cell gives None, which means that the field is absent.
    """
    csv.field_size_limit(LONGEST_LINE)
    with _as_text(path, newline="") as text:
        rows = csv.reader(_lines_of(text, path), strict=True)
        header: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                cells = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                yield Record(
                    f"{path}, line {line}",
                    RowError("broken CSV", f"got broken CSV ({error}), need valid CSV (RFC 4180): fix the line."),
                )
                continue
            if not cells:
                continue
            if header is None:
                header = cells
                if twice := [name for name in header if name and header.count(name) > 1]:
                    raise ValueError(f"{path}: got two columns {twice[0]!r}, need unique names: rename one.")
                continue
            yield Record(f"{path}, line {line}", _undecoded("".join(cells)) or _named(header, cells))
    if header is None:
        raise ValueError(f"{path}: got no line with the names of the columns, need one: add it.")


def _named(header: list[str], cells: list[str]) -> dict[str, str | None] | RowError:
    if len(cells) != len(header):
        return RowError(
            "broken CSV",
            f"got broken CSV ({len(cells)} cells for {len(header)} columns), need one cell per column: quote cells that "
            "contain commas.",
        )
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _parquet(path: Path) -> Iterator[Record]:
    with _seekable(path) as file:
        yield from _of_batches(path, pq.ParquetFile(file).iter_batches(256))


def _arrow(path: Path) -> Iterator[Record]:
    with _seekable(path) as file:
        try:
            opened = pa.ipc.open_file(file)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        except pa.ArrowInvalid:  # the format of `datasets`
            file.seek(0)
            batches = pa.ipc.open_stream(file)
        yield from _of_batches(path, batches)


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    with _opened(path) as file:
        try:
            if isinstance(file, gzip.GzipFile):
                with tempfile.TemporaryFile() as spool:
                    shutil.copyfileobj(file, spool)
                    yield spool
            else:
                yield file
        except pa.ArrowException as error:
            raise ValueError(
                f"{path}: got no complete {kind_of(path)} file ({error}), need one: download or write it again."
            ) from error


def _of_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    rows = chain.from_iterable(map(_rows_of, batches))
    return (Record(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _rows_of(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowError("not UTF-8", f"got a text that is not UTF-8 ({error}), need UTF-8: fix it.")]
        return [row for index in range(batch.num_rows) for row in _rows_of(batch.slice(index, 1))]


_KINDS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
}

KINDS = tuple(_KINDS)
"""The supported file endings."""
