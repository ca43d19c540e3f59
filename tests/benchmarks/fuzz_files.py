"""Malformed files of rows, of prompts and of tasks."""

import csv
import gzip
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fuzz_case import Case, Material, lines_of
from fuzz_settings import BROKEN_FILES, HARMLESS
from fuzz_values import TABLE, changed, pair_meant, row_meant, same_rows, table_meant, turns_meant, unread


def good_rows() -> list[dict]:
    """Five rows that are right by `TABLE`."""
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How are you?"}]
    rows = [
        {"prompt": "What is 2 + 2?", "responses": ["It is 4.", "Five"], "ranks": [1, 2], "task": "maths"},
        {"messages": turns, "responses": ["Well", "é 很好", "Bad"], "ranks": [2, 1, 2], "task": "chitchat"},
        {"prompt": "Hello", "responses": ["Hi", "Ho"], "ranks": [1, 1], "capability_ranks": {"logic": [1, 2]}},
        {"prompt": turns[1:], "responses": ["A word", "Two words"], "ranks": [3, 1], "task": "others"},
        {"prompt": "Say it.", "responses": ["It", "That"], "ranks": [2, 1], "task": "maths"},
    ]
    rows[0]["capability_ranks"] = {"correctness": [1, 2]}
    rows[1]["capability_ranks"] = {"empathy ability": [1, 2, 3], "logic": [1, 1, 2]}
    return rows


def load(source: str, on_error: str, table: str, out: str) -> None:
    from dmoerm_trl.data.rows import load_rows, write_rows
    from dmoerm_trl.tasks import TaskTable

    rows, report = load_rows(source, tasks=TaskTable.load(table), on_error=on_error)
    write_rows(rows, out)
    print(report)


def load_prompts(source: str, out: str) -> None:
    from dmoerm_trl.generation.prompts import read_prompts

    rows = [{"prompt": row["prompt"], "task": row.get("task")} for row in read_prompts(source)]
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_table(source: str, out: str) -> None:
    from dmoerm_trl.tasks import TaskTable

    table = TaskTable.load(source)
    tasks = {task: list(points) for task, points in table.tasks.items()}
    Path(out).write_text(json.dumps({"tasks": tasks, "overall": list(table.overall)}))


# Changes of the lines of a JSONL file: name -> (lines, number of one) -> bytes. The first ones change nothing that is meant.
SAME_TEXT: dict[str, Callable[[list[bytes], int], bytes]] = {
    "a byte order mark": lambda lines, n: b"\xef\xbb\xbf" + b"\n".join(lines),
    "Windows' line ends": lambda lines, n: b"\r\n".join(lines),
    "blank lines": lambda lines, n: b"\n\n \n".join(lines) + b"\n\n",
    "UTF-16": lambda lines, n: b"\n".join(lines).decode().encode("utf-16"),
    "gzip under another name": lambda lines, n: gzip.compress(b"\n".join(lines)),
}


def with_line(change: Callable[[bytes], bytes]) -> Callable[[list[bytes], int], bytes]:
    return lambda lines, n: b"\n".join([*lines[:n], change(lines[n]), *lines[n + 1 :]])


BAD_TEXT: dict[str, Callable[[list[bytes], int], bytes]] = {
    "Latin-1": with_line(lambda line: line[:-1] + ', "é": "é"}'.encode("latin-1")),
    "cut off": with_line(lambda line: line[: len(line) * 2 // 3]),
    "two objects": with_line(lambda line: line + b" " + line),
    "a comma at the end": with_line(lambda line: line[:-1] + b",}"),
    "single quotes": with_line(lambda line: line.replace(b'"', b"'")),
    "a key twice": with_line(
        lambda line: b'{"responses": ["x", "y"], ' + line[1:-1] + b', "prompt": "Other", "prompt": "One"}'
    ),
    "100,000 brackets": with_line(lambda line: b"[" * 100_000),
    "100,000 brackets within": with_line(
        lambda line: line[:-1] + b', "task": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    ),
    "an array": with_line(lambda line: b"[" + line + b"]"),
    "a NUL byte": with_line(lambda line: line.replace(b" ", b"\0", 1)),
    "null": with_line(lambda line: b"null"),
    "a number of 5,000 digits": with_line(lambda line: line[:-1] + b', "ranks": [' + b"9" * 5000 + b", 1]}"),
    "a broken escape": with_line(lambda line: line[:-1] + b', "task": "\\u12"}'),
    "a line break in a text": with_line(lambda line: line.replace(b" ", b"\n", 1)),
}


def rows(material: Material, draw: random.Random, at: Path) -> Case:
    way = draw.choice(["value"] * 6 + ["text"] * 4 + ["csv"] * 2 + ["pair"] * 2 + ["parquet"])
    if way in ("csv", "parquet"):
        return {"csv": csv_rows, "parquet": parquet_rows}[way](material, draw, at)
    rows, meaning = good_rows(), row_meant
    if way == "pair":
        rows = [
            {"prompt": f"Say {i}", "chosen": f"Well {i}", "rejected": f"Bad {i}", "task": "maths"} for i in range(5)
        ]
        meaning = pair_meant
    number = draw.randrange(5)
    if way == "text":
        path, what = at / "mine.jsonl", draw.choice([*SAME_TEXT, *BAD_TEXT])
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes((SAME_TEXT | BAD_TEXT)[what](lines, number))
        meant = [None if what in BAD_TEXT and row is rows[number] else meaning(row) for row in rows]
        return rows_case(material, path, what, meant, number, "raise", at, rows)
    path = at / draw.choice(["mine.jsonl", "mine.jsonl", "mine.json"])
    rows[number], what, _ = changed(draw, rows[number])
    ascii_only = draw.random() < 0.5 or "half" in what
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path.write_text("\n".join(texts) if path.suffix == ".jsonl" else f"[{', '.join(texts)}]")
    meant, on_error = [meaning(row) for row in rows], draw.choice(["raise", "raise", "skip"])
    return rows_case(material, path, f"{path.suffix} {way} {what}", meant, number, on_error, at, rows)


def rows_case(
    material: Material,
    path: Path,
    what: str,
    meant: list,
    number: int,
    on_error: str,
    at: Path,
    rows: list,
    names_line: bool = True,
) -> Case:
    out, good = at / "out.jsonl", [row for row in meant if row is not None]
    fields = unread(rows[number]) if isinstance(rows[number], dict) else set()

    def right(said: str) -> str:
        skipped = None in meant
        if not same_rows(lines_of(out), good) or (skipped and "1 skipped" not in said):
            return "wrong"
        told = all(name in said for name in fields) or skipped
        return "wrong" if not told else "counted" if skipped or fields else "right"

    place = (
        (path.name, (f"line {number + 1}", f"row {number + 1}", f"record {number + 1}"))
        if names_line
        else (path.name,)
    )
    if good == meant or path.suffix != ".jsonl":
        place = (path.name,)
    must_fail = on_error == "raise" and good != meant
    return Case(what, load, (str(path), on_error, str(material.table), str(out)), place, None if must_fail else right)


def csv_rows(material: Material, draw: random.Random, at: Path) -> Case:
    """TRL's format as CSV, whose words have to stay words."""
    path, number, column = at / "mine.csv", draw.randrange(3), draw.choice(["prompt", "chosen", "rejected"])
    word = draw.choice(
        [
            "NA",
            "null",
            "None",
            "nan",
            "N/A",
            "NULL",
            "1",
            "1.0",
            "01",
            "true",
            "-",
            "#N/A",
            "a\nb",
            'a"b',
            "a,b",
            " a",
            "",
        ]
    )
    rows = [{"prompt": f"Say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    for row in rows if (all_rows := draw.random() < 0.3) else rows[number : number + 1]:
        row[column] = word
    if all_rows and column == "prompt":
        for i, row in enumerate(rows):
            row["chosen"] += f" {i}"
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    content, kind = (
        text.getvalue(),
        draw.choice(["as it is"] * 4 + ["semicolons", "UTF-16", "a quote too many", "no header", "a field too many"]),
    )
    content = {
        "semicolons": content.replace(",", ";"),
        "a quote too many": content + '"open,x,y',
        "no header": content.split("\n", 1)[1],
        "a field too many": content + "a,b,c,d\n",
    }.get(kind, content)
    path.write_bytes(content.encode("utf-16" if kind == "UTF-16" else "utf-8"))
    meant = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}], "responses": [row["chosen"], row["rejected"]],
            "ranks": [1, 2], "task": None, "capability_ranks": {}, "capability_pairs": {},
        } if all(text.strip() for text in row.values()) else None
        for row in rows
    ]  # fmt: skip
    if kind not in ("as it is", "UTF-16"):
        meant[number] = None
    return rows_case(material, path, f"CSV {kind}, {column} {word!r}", meant, number, "raise", at, [{}] * 3)


def parquet_rows(material: Material, draw: random.Random, at: Path) -> Case:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, good = (
        at / "mine.parquet",
        [row for row in good_rows() if "messages" not in row and isinstance(row["prompt"], str)],
    )
    columns = {name: [row.get(name) for row in good] for name in ("prompt", "responses", "ranks", "task")}
    columns["ranks"][2] = [1, 2]
    table = pa.table(columns)

    def cast(column: str, kind: Any, values: list | None = None) -> pa.Table:
        array = pa.array(columns[column] if values is None else values, kind)
        return table.set_column(table.schema.get_field_index(column), column, array)

    same = {
        "ranks of 8 bits": lambda: cast("ranks", pa.list_(pa.int8())),
        "large text": lambda: cast("prompt", pa.large_string()),
        "tasks in a dictionary": lambda: table.set_column(3, "task", table["task"].dictionary_encode()),
    }
    bad = {
        "ranks with a fraction": lambda: cast("ranks", pa.list_(pa.float64()), [[1.5, 2], [1, 2], [1, 2]]),
        "ranks with NaN": lambda: cast("ranks", pa.list_(pa.float64()), [[math.nan, 2], [1, 2], [1, 2]]),
        "ranks as text": lambda: cast("ranks", pa.list_(pa.string()), [["1", "2"]] * 3),
        "prompts as bytes": lambda: cast("prompt", pa.binary(), [b"\xff\xfe", b"a", b"b"]),
        "prompts as numbers": lambda: cast("prompt", pa.int64(), [1, 2, 3]),
        "no ranks": lambda: table.drop_columns(["ranks"]),
        "a row of nulls": lambda: pa.concat_tables(
            [table, pa.table({n: pa.array([None], table[n].type) for n in columns})]
        ),
    }
    what = draw.choice([*same, *bad, "cut off", "no Parquet"])
    if what in same | bad:
        pq.write_table((same | bad)[what](), path)
    else:
        pq.write_table(table, path)
        path.write_bytes(path.read_bytes()[:-20] if what == "cut off" else b"prompt,responses\nx,y\n")
    meant = [row_meant({name: columns[name][i] for name in columns}) for i in range(3)] if what in same else [None]
    return rows_case(material, path, f"Parquet {what}", meant, 0, "raise", at, [{}], names_line=False)


def prompts(material: Material, draw: random.Random, at: Path) -> Case:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Well?"},
    ]
    records = [{"prompt": "One", "task": "maths"}, {"prompt": turns, "task": "chitchat"}, {"prompt": "Zwei é"}]
    number, path, out = draw.randrange(3), at / "mine.jsonl", at / "out.jsonl"
    if draw.random() < 0.6:
        records[number], what, _ = changed(draw, records[number], ("prompt",))
        texts = [json.dumps(record).encode() for record in records]
        path.write_bytes(b"\n".join(texts))
        bad = not isinstance(records[number], dict) or turns_meant(records[number].get("prompt")) is None
    else:
        what, texts = draw.choice([*SAME_TEXT, *BAD_TEXT]), [json.dumps(record).encode() for record in records]
        path.write_bytes((SAME_TEXT | BAD_TEXT)[what](texts, number))
        bad = what in BAD_TEXT
    meant = [{"prompt": turns_meant(record.get("prompt")), "task": record.get("task")} for record in records]

    def right(said: str) -> str:
        return "right" if same_rows(lines_of(out), meant) else "wrong"

    place = (path.name, (f"line {number + 1}", f"row {number + 1}", f"record {number + 1}")) if bad else (path.name,)
    return Case(what, load_prompts, (str(path), str(out)), place, None if bad else right)


def tables(material: Material, draw: random.Random, at: Path) -> Case:
    path, out = at / "mine.yaml", at / "out.json"
    if draw.random() < 0.6:
        table, what, _ = changed(draw, TABLE)
        path.write_text(yaml.safe_dump(table, allow_unicode=False))
        meant = table_meant(table)
    else:
        what = draw.choice(list(BROKEN_FILES))
        path.write_bytes(BROKEN_FILES[what](yaml.safe_dump(TABLE).encode()))
        meant = TABLE if what in HARMLESS else None

    def right(said: str) -> str:
        return "right" if json.loads(out.read_text()) == meant else "wrong"

    return Case(what, load_table, (str(path), str(out)), (path.name,), None if meant is None else right)
