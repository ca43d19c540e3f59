"""Prompts, and responses that were written elsewhere, from JSONL or Parquet files."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .response_store import RESPONSES, ResponseStore, Shard


def read_prompts(path: str | os.PathLike, count: int | None = None, task: str | None = None) -> list[dict]:
    """
    The distinct prompts of a file in the order of their first occurrence, each with the other fields of that record. The
    file may hold prompts alone, preference rows, or responses.

    Args:
        count (`int`, *optional*): how many; all if absent.
        task (`str`, *optional*): only those with this `task`.

    Returns:
        `list[dict]`: rows with `prompt`, a list of turns.
    """
    rows: dict[str, dict] = {}
    for record in _records(path):
        if (task is None or record.get("task") == task) and (count is None or len(rows) < count):
            fields = {key: value for key, value in record.items() if key not in ("response", "responses", "gold")}
            rows.setdefault(_key(record), fields)
    if len(rows) < (count or 1):
        of_task = f" of the task {task!r}" if task else ""
        raise ValueError(f"{path}: got {len(rows)} distinct prompts{of_task}, need {count or 'at least one'}.")
    return list(rows.values())


def import_responses(store: ResponseStore, rows: Sequence[dict], path: str | os.PathLike, *, gold: bool) -> None:
    """
    Brings a file of responses into a store: the first n to each prompt. All of it is checked before anything is written.

    Args:
        rows (`Sequence[dict]`): the store's prompts; records of others are left out and counted.
        gold (`bool`): whether the column `gold` comes along.

    Raises:
        ValueError: a prompt has fewer than n responses, or a record lacks what it needs.
    """
    missing = set(store.missing(RESPONSES))
    if not missing:
        return
    counts, waiting = [0] * len(rows), [[] for _ in rows]
    for prompt, record in _responses_of(rows, path, "checking"):
        if not isinstance(record.get("response"), str):
            raise ValueError(
                f"{path}: got the response {record.get('response')!r} to prompt {prompt}, need text: mend the record."
            )
        if gold and not (isinstance(record.get("gold"), (int, float)) and math.isfinite(record["gold"])):
            raise ValueError(
                f"{path}: got gold {record.get('gold')!r} for {record['response']!r}, need a finite number for every response: "
                "mend the record, or name a gold scorer instead of 'file'."
            )
        counts[prompt] += 1
    if (fewest := min(counts)) < store.n:
        prompt = counts.index(fewest)
        lower = f"lower n to {fewest}" if fewest else "sample some"
        raise ValueError(
            f"{path}: got {fewest} responses to prompt {prompt} ({rows[prompt]['prompt'][-1]['content']!r}), need n={store.n} "
            f"because the best of n is chosen among n: {lower}, or leave the prompt out."
        )
    if beyond := sum(counts) - store.n * len(rows):
        print(f"{path}: {beyond} responses are not used: they stand after the first {store.n} to their prompt")
    counts = [0] * len(rows)
    for prompt, record in _responses_of(rows, path, "importing"):
        if counts[prompt] == store.n:
            continue
        waiting[prompt].append(record)
        shard = Shard(prompt, counts[prompt] // store.shard_size)
        counts[prompt] += 1
        if len(waiting[prompt]) == store.size(shard):
            names = ("response", "gold") if gold else ("response",)
            if shard in missing:
                store.write(RESPONSES, shard, **{name: [one[name] for one in waiting[prompt]] for name in names})
            waiting[prompt].clear()


def _responses_of(rows: Sequence[dict], path: str | os.PathLike, description: str) -> Iterator[tuple[int, dict]]:
    """The records of the rows' prompts, each with the prompt's number."""
    prompts = {_key(row): number for number, row in enumerate(rows)}
    others = 0
    for record in tqdm(_records(path), desc=description, unit=" responses", delay=3):
        if (prompt := prompts.get(_key(record))) is None:
            others += 1
        else:
            yield prompt, record
    if others and description == "checking":
        print(f"{path}: {others} responses are not used: their prompt is not among the {len(rows)} prompts")


def _records(path: str | os.PathLike) -> Iterator[dict]:
    """One record at a time, its prompt as turns."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet") or not path.is_file():
        raise FileNotFoundError(f"got {str(path)!r}, need an existing file that ends in .jsonl or .parquet.")
    for number, record in enumerate(_raw_records(path), start=1):
        prompt = record.get("prompt") if isinstance(record, dict) else None
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns):
            raise ValueError(
                f"{path}, record {number}: got the prompt {prompt!r}, need text or a list of turns with `role` and `content`."
            )
        yield {**record, "prompt": [{"role": turn.get("role", "user"), "content": turn["content"]} for turn in turns]}


def _raw_records(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {line}: got broken JSON ({error}): mend the line.") from error


def _key(row: dict) -> str:
    return json.dumps(row["prompt"], sort_keys=True)
