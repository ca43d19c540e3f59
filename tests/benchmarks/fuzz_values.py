"""Values that are malformed somewhere, changes of nested ones, and what a row or a table means by the documentation."""

import json
import math
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

TABLE = {
    "tasks": {"chitchat": ["empathy ability", "logic"], "maths": ["correctness"]},
    "overall": ["logic", "readability"],
}


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


VALUES = {
    **{"null": None, "true": True, "zero": 0, "three": 3, "a fraction": 1.5, "a negative number": -1, "NaN": math.nan},
    **{
        "infinity": math.inf,
        "a huge number": 10**30,
        "no text": "",
        "white space": " \n",
        "a text": "x",
        "digits": "3",
    },
    **{
        "half a character": "\ud800",
        "a NUL": "a\0b",
        "an escape": "\x1b[31mred",
        "an endless text": "long " * 100_000,
    },
    **{"no list": [], "a list of numbers": [1, 2], "a list of null": [None], "a list of texts": ["x", "y"]},
    **{"no object": {}, "an object": {"a": 1}, "50 lists": deep(50), "a list of lists": [[0, 1]]},
}
"""Name -> value that is put in another one's place."""


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The places in a nested value, itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from paths(item, (*at, key))


def changed(draw: random.Random, value: Any, among: tuple = ()) -> tuple[Any, str, tuple]:
    """A copy with one thing changed, what that is, and where. `among` are the first keys that may be chosen; all if empty."""
    value = deepcopy(value)
    at = draw.choice([path for path in paths(value) if not among or path[0] in among])
    parent = value
    for key in at[:-1]:
        parent = parent[key]
    how = draw.choice(["value"] * 6 + ["gone", "renamed", "twice"])
    if how == "gone":
        del parent[at[-1]]
    elif how == "renamed" and isinstance(parent, dict):
        parent[f"{at[-1]}s"] = parent.pop(at[-1])
    elif how == "twice" and isinstance(parent, list):
        parent.insert(at[-1], deepcopy(parent[at[-1]]))
    else:
        how = draw.choice(list(VALUES))
        parent[at[-1]] = deepcopy(VALUES[how])
    return value, f"{'.'.join(map(str, at))}: {how}", at


# ---------------------------------------------------------------------------------------- what a row means


def turns_meant(prompt: Any) -> list[dict] | None:
    """The turns of a prompt, None if it is none."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    turns = [{"role": turn.get("role"), "content": text_meant(turn.get("content"))} for turn in turns]
    texts = [text for turn in turns for text in turn.values()]
    whole = all(isinstance(text, str) and is_complete(text) for text in texts)
    return turns if whole and turns[-1]["role"] == "user" and turns[-1]["content"].strip() else None


def text_meant(content: Any) -> Any:
    """The text of a turn's content, which may be in parts."""
    parts = content if isinstance(content, list) and content else [None]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else content


def is_complete(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def ranks_meant(ranks: Any, responses: list) -> list[int] | None:
    fits = isinstance(ranks, list) and len(ranks) == len(responses) and all(type(rank) is int for rank in ranks)
    return ranks if fits else None


def row_meant(raw: Any) -> dict | None:
    """What a row in the package's own format means by recipes/DATA.md, None if it is an error; `TABLE` is its table."""
    if not isinstance(raw, dict):
        return None
    raw = {name: value for name, value in raw.items() if value is not None}
    prompts = [raw[name] for name in ("prompt", "messages") if name in raw]
    prompt = turns_meant(prompts[0]) if len(prompts) == 1 else None
    responses, task = raw.get("responses"), raw.get("task")
    if prompt is None or not isinstance(responses, list) or len(responses) < 2:
        return None
    if not all(isinstance(text, str) and text.strip() and is_complete(text) for text in responses):
        return None
    if task is not None and task not in (*TABLE["tasks"], "others"):
        return None
    known = {*TABLE["overall"], *(TABLE["tasks"].get(task, []) if task else sum(TABLE["tasks"].values(), []))}
    points = raw.get("capability_ranks", {})
    if not isinstance(points, dict):
        return None
    points = {point: ranks for point, ranks in points.items() if ranks is not None}
    labels = [ranks_meant(ranks, responses) for ranks in (raw.get("ranks"), *points.values())]
    if None in labels or not known >= points.keys() or all(len(set(ranks)) < 2 for ranks in labels):
        return None
    row = {"prompt": prompt, "responses": responses, "ranks": raw["ranks"], "task": task, "capability_ranks": points}
    return row | {"capability_pairs": {}}


def pair_meant(raw: Any) -> dict | None:
    """The same of a row in TRL's format, all of it text."""
    texts = [raw.get(name) for name in ("prompt", "chosen", "rejected")]
    if not all(isinstance(text, str) for text in texts):
        return None
    return row_meant({"prompt": texts[0], "responses": texts[1:], "ranks": [1, 2], "task": raw.get("task")})


def unread(raw: dict) -> set[str]:
    """The fields of a row that nothing reads."""
    known = {"prompt", "messages", "responses", "ranks", "chosen", "rejected"}
    return raw.keys() - known - {"task", "capability_ranks", "capability_pairs"}


def same_rows(found: list[dict], meant: list[dict]) -> bool:
    """Whether rows say the same; numbers of ranks are what they are, true is not 1."""
    return json.dumps(found, sort_keys=True) == json.dumps(meant, sort_keys=True)


def table_meant(table: Any) -> dict | None:
    """A table of tasks as it stands in a file, None if it is an error."""
    if not isinstance(table, dict) or table.keys() != {"tasks", "overall"} or not isinstance(table["tasks"], dict):
        return None
    lists = [*table["tasks"].values(), table["overall"]]
    names = [*table["tasks"], *(point for points in lists if isinstance(points, list) for point in points)]
    whole = all(isinstance(name, str) and name.strip() and is_complete(name) for name in names)
    return table if table["tasks"] and all(isinstance(points, list) and points for points in lists) and whole else None
