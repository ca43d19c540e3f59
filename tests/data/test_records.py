"""Files of rows: every format and encoding gives the same records, and what cannot be read is named by its place."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoerm_trl.data import records
from dmoerm_trl.data.prepare.reading import open_set
from dmoerm_trl.data.rows import load_rows
from dmoerm_trl.generation.prompts import read_prompts
from dmoerm_trl.tasks import TaskTable

TASKS = TaskTable.paper()
PAIR = {"prompt": "Wo ist das Café? 在哪里？", "chosen": "Links.", "rejected": "Rechts."}
OTHER = {"prompt": "Wann?", "chosen": "NA", "rejected": "null"}
BAD = {"prompt": "Warum?", "chosen": "x"}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_of(*rows: dict) -> str:
    return "".join(",".join(cells) + "\n" for cells in (PAIR, *(row.values() for row in rows)))


def read(path: Path) -> list[tuple[str, list[str]]]:
    rows, _ = load_rows(path, tasks=TASKS)
    return [(row.prompt[0]["content"], row.responses) for row in rows]


EXPECTED = [(row["prompt"], [row["chosen"], row["rejected"]]) for row in (PAIR, OTHER)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", lines(PAIR, OTHER)),
        ("rows.JSONL", "\n" + lines(PAIR).replace("\n", "\r\n \r\n") + lines(OTHER).strip()),
        ("rows.json", lines(PAIR, OTHER)),
        ("rows.json", json.dumps([PAIR, OTHER], ensure_ascii=False, indent=1)),
        ("rows.csv", csv_of(PAIR, OTHER)),
    ],
    ids=["lines", "Windows", "json of lines", "array", "csv"],
)
def test_text_in_any_encoding_that_its_first_bytes_tell(tmp_path, name, text, encoding, compressed):
    content = text.encode(encoding)
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert read(path) == EXPECTED
    assert [row["prompt"][0]["content"] for row in read_prompts(path)] == [PAIR["prompt"], OTHER["prompt"]]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream", "saved", "folder", "folder of csv"])
def test_tables_and_folders(tmp_path, kind, compressed):
    table, path = pa.Table.from_pylist([PAIR, OTHER]), tmp_path / f"rows.{kind.split()[0]}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind.startswith("arrow"):
        with (pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "saved":
        Dataset.from_list([PAIR, OTHER]).save_to_disk(path)
    else:
        path.mkdir()
        text = csv_of if kind.endswith("csv") else lines
        ending = "csv" if kind.endswith("csv") else "jsonl"
        for number, row in enumerate((PAIR, OTHER)):
            (path / f"train-0000{number}-of-00002.{ending}").write_text(text(row), encoding="utf-8")
        (path / f"test.{ending}").write_text(text(OTHER), encoding="utf-8")
        assert load_rows(path, tasks=TASKS, split="test")[1].rows == 1
        with pytest.raises(ValueError, match=r"got split 'dev', need one of \['test', 'train'\]"):
            load_rows(path, tasks=TASKS, split="dev")
    if compressed and path.is_file():
        path.write_bytes(gzip.compress(path.read_bytes()))
        path = path.rename(f"{path}.gz")
    assert read(path) == EXPECTED


def test_cells_of_csv_are_text_whatever_they_look_like(tmp_path):
    words = ["NA", "null", "None", "nan", "007", "3.10", "1e5", "TRUE", "2024-01-01", "say so", "two\nlines, one cell"]
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,task\n" + "".join(f'"{word}?","{word}",-,\n' for word in words))
    rows, report = load_rows(path, tasks=TASKS)
    assert [row.responses[0] for row in rows] == words and {row.task for row in rows} == {None}
    assert not report.ignored_fields


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["prompt", "chosen", "rejected", "x"]),
            st.text(st.characters(codec="utf-8"), min_size=1),
            min_size=1,
        ),
        min_size=1,
    ),
    st.sampled_from(["lines", "array"]),
    st.sampled_from(["utf-8", "utf-16", "utf-32"]),
)
def test_what_was_written_is_read_back(tmp_path_factory, values, form, encoding):
    path = tmp_path_factory.mktemp("records") / "rows.json"
    text = lines(*values) if form == "lines" else json.dumps(values, ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    assert [value for _, value in open_set(str(path))] == values


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


BROKEN = [  # what stands in the second line, the message, the reason
    ('{"prompt": ', "broken JSON .Expecting value", "broken JSON"),
    (json.dumps(PAIR) + json.dumps(PAIR), "broken JSON .Extra data", "broken JSON"),
    (f'{{"prompt": {nested(100_000)}}}', "more than 64 nested objects or lists", "broken JSON"),
    (f'{{"prompt": {nested(100)}}}', "more than 64 nested objects or lists", "broken JSON"),
    (f'{{"prompt": 1{"0" * 5000}}}', "Exceeds the limit", "broken JSON"),
    (
        '{"prompt": "a", "chosen": "b", "rejected": "c", "prompt": "d"}',
        "the field 'prompt' twice",
        "field given twice",
    ),
    ('{"prompt": [{"role": "user", "role": "system"}]}', "the field 'role' twice", "field given twice"),
    ("Café".encode("latin-1"), "the byte 0xe9 at place 3 .after 'Caf'", "not UTF-8"),
    (b'{"prompt": "\xed\xa0\xbd"}', "the byte 0xed at place 12", "not UTF-8"),
    ('"text"', "'text', need an object", "unknown format"),
]


@pytest.mark.parametrize(("line", "message", "reason"), BROKEN, ids=[f"{number}" for number in range(len(BROKEN))])
def test_a_line_that_cannot_be_read_is_named_and_those_after_it_are_read(tmp_path, line, message, reason):
    path = tmp_path / "rows.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n" + line + b"\n" + lines(PAIR).encode())
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: got .*{message}"):
        load_rows(path, tasks=TASKS)
    rows, report = load_rows(path, tasks=TASKS, on_error="skip")
    assert len(rows) == 1 and report.skipped == {reason: 1}
    with pytest.raises(ValueError, match="rows.jsonl, line 2"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("text", "message", "skipped"),
    [
        ("a,b\n", "line 3: got broken CSV .2 cells for 3 columns", 1),
        ("a,b,c,d\n", "line 3: got broken CSV .4 cells for 3 columns", 1),
        ('"a"b,c,d\n', "line 3: got broken CSV", 1),
        ('x,"a\nb",c\na,"never closed\n', "line 5: got broken CSV .unexpected end of data", 1),
    ],
)
def test_a_line_of_csv_that_cannot_be_read(tmp_path, text, message, skipped):
    path = tmp_path / "rows.csv"
    path.write_text(csv_of(OTHER) + text)
    with pytest.raises(ValueError, match=message):
        load_rows(path, tasks=TASKS)
    assert load_rows(path, tasks=TASKS, on_error="skip")[1].skipped.total() == skipped


def test_an_element_of_an_array_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([PAIR, BAD])[:-1] + ', {"a": 1, "a": 2}, ' + json.dumps(OTHER) + "]")
    with pytest.raises(ValueError, match="rows.json, element 2: got the fields"):
        load_rows(path, tasks=TASKS)
    rows, report = load_rows(path, tasks=TASKS, on_error="skip")
    assert len(rows) == 2 and report.skipped == {"unknown format": 1, "field given twice": 1}


CUT_OFF = gzip.compress(lines(*[PAIR] * 1000).encode())[:-20]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"[" + lines(PAIR).encode(), "got '' after element 1 of the array, need ',' or ']'"),
        ("rows.json", b"[" + lines(PAIR, PAIR).encode() + b"]", "after element 1 of the array, need ','"),
        ("rows.json", b"[" + lines(PAIR).encode() + b",]", "element 2: got broken JSON"),
        ("rows.json", b"[" + lines(PAIR).encode() + b"] more", "got 'more' after the array"),
        ("rows.json", '[{"prompt": "Café"}]'.encode("latin-1"), "got the byte 0xe9"),
        ("rows.json", json.dumps(PAIR, indent=2).encode(), "an object that spans several lines, need an array"),
        ("rows.jsonl.gz", CUT_OFF, "a gzip file that is cut off or damaged"),
        ("rows.jsonl", b"\x1f\x8b" + b"junk" * 10, "a gzip file that is cut off or damaged"),
        ("rows.jsonl", lines(PAIR).encode("utf-16")[:-1], "begins as utf-16 but is not"),
        ("rows.parquet", b"PAR1" * 20, "no complete .parquet file"),
        ("rows.parquet", b"", "no complete .parquet file"),
        ("rows.arrow", b"junk" * 20, "no complete .arrow file"),
        ("rows.csv", b"\n\n", "no line with the names of the columns"),
        ("rows.csv", b"prompt,chosen,prompt\n", "two columns 'prompt'"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_an_error_whatever_on_error_says(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load_rows(path, tasks=TASKS, on_error=on_error)


def test_a_text_of_a_parquet_file_that_is_not_utf8(tmp_path):
    texts = pa.py_buffer(b"good\xffbad.")
    cells = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 4, 0, 0, 0, 9, 0, 0, 0])), texts]
    )
    others = {name: pa.array(["x", "y"]) for name in ("chosen", "rejected")}
    pq.write_table(pa.table({"prompt": cells, **others}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet, row 2: got a text that is not UTF-8"):
        load_rows(tmp_path / "rows.parquet", tasks=TASKS)
    rows, report = load_rows(tmp_path / "rows.parquet", tasks=TASKS, on_error="skip")
    assert len(rows) == 1 and report.skipped == {"not UTF-8": 1}


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 200)
    monkeypatch.setattr(records, "LARGEST_ARRAY", 200)
    for name, text in (("rows.jsonl", lines(OTHER) + "x" * 300), ("rows.csv", csv_of(OTHER) + "x" * 300)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}, line .: got more than 200 characters"):
            load_rows(tmp_path / name, tasks=TASKS)
    (tmp_path / "rows.json").write_text(json.dumps([PAIR] * 10))
    with pytest.raises(ValueError, match="an array of more than 200 characters, need JSON Lines"):
        load_rows(tmp_path / "rows.json", tasks=TASKS)


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "to.jsonl").symlink_to(tmp_path / "fro.jsonl")
    (tmp_path / "fro.jsonl").symlink_to(tmp_path / "to.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Hi")
    for name, error, message in (
        ("to.jsonl", FileNotFoundError, "which does not exist"),
        ("missing.csv", FileNotFoundError, "which does not exist"),
        ("pipe.jsonl", FileNotFoundError, "a kind that is not read"),
        ("empty", ValueError, "a folder without files ending in .jsonl"),
        ("texts", ValueError, "a.txt, need files ending in .jsonl"),
        ("x" * 300 + ".jsonl", ValueError, "a path that cannot be read .File name too long"),
    ):
        for reader in (lambda path: load_rows(path, tasks=TASKS), read_prompts):
            with pytest.raises(error, match=message):
                reader(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(PAIR))
    path.chmod(0)
    with pytest.raises(ValueError, match="cannot be read .Permission denied"):
        load_rows(path, tasks=TASKS)
