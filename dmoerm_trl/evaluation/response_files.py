"""Prompts, and responses that were written elsewhere, from files in any format that rows are read from."""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..data.preference_row import RowError, check_characters, short
from ..data.prepare.scores import number
from ..data.rows import prompt_of, records_of
from ..data.trl_pairs import response_of
from .response_store import RESPONSES, ResponseStore, Shard

_OF_RESPONSES = ("response", "responses", "gold", "chosen", "rejected", "messages")
"""Fields of a record that are not its prompt's."""


def read_prompts(path: str | os.PathLike, count: int | None = None, task: str | None = None) -> list[dict]:
    """
    The distinct prompts of a file in the order of their first occurrence, each with the other fields of that record. The
    file may hold prompts alone, preference rows in any accepted format (recipes/DATA.md), or responses.

    Args:
        path (`str`): a file or folder, as of [`~dmoerm_trl.data.rows.load_rows`].
        count (`int`, *optional*): how many; all if absent.
        task (`str`, *optional*): only those with this `task`.

    Returns:
        `list[dict]`: rows with `prompt`, a list of turns.

    Raises:
        ValueError: for the first record without a prompt, naming the file and the line; or if there are too few prompts.
    """
    if count is not None and count < 1:
        raise ValueError(f"got num_prompts={count}, need at least 1: raise it, or leave it out to take all.")
    rows: dict[str, dict] = {}
    for _, record in _records(path):
        if (task is None or record.get("task") == task) and (count is None or len(rows) < count):
            fields = {name: value for name, value in record.items() if name not in _OF_RESPONSES}
            rows.setdefault(_key(record), fields)
    if len(rows) < (count or 1):
        of_task = f" of the task {task!r}" if task else ""
        raise ValueError(
            f"{path}: got {len(rows)} distinct prompts{of_task}, need {count or 'at least one'}: lower `num_prompts`, or take a file "
            "with more."
        )
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
    for place, prompt, record in _responses_of(rows, path, "checking"):
        _answer(place, prompt, record, gold)
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
    for place, prompt, record in _responses_of(rows, path, "importing"):
        if counts[prompt] == store.n:
            continue
        waiting[prompt].append(_answer(place, prompt, record, gold))
        shard = Shard(prompt, counts[prompt] // store.shard_size)
        counts[prompt] += 1
        if len(waiting[prompt]) == store.size(shard):
            if shard in missing:
                store.write(
                    RESPONSES, shard, **{name: [one[name] for one in waiting[prompt]] for name in waiting[prompt][0]}
                )
            waiting[prompt].clear()


def _answer(place: str, prompt: int, record: dict, gold: bool) -> dict[str, Any]:
    """What a store keeps of a record: the text of the response, and its gold reward as a number."""
    response = record.get("response")
    if not isinstance(response, (str, list)):
        raise ValueError(
            f"{place}: got the response {short(response)} to prompt {prompt}, need text: mend the record."
        )
    try:
        text = response_of(response, "response")
        check_characters(text, "response")
    except RowError as error:
        raise ValueError(f"{place}: {error}") from error
    if not gold:
        return {"response": text}
    reward = number(record.get("gold"))
    if reward is None:
        raise ValueError(
            f"{place}: got gold {short(record.get('gold'))} for {short(text)}, need a finite number for every response: "
            "mend the record, or name a gold scorer instead of 'file'."
        )
    return {"response": text, "gold": reward}


def _responses_of(rows: Sequence[dict], path: str | os.PathLike, description: str) -> Iterator[tuple[str, int, dict]]:
    """The records of the rows' prompts, each with its place and the prompt's number."""
    prompts = {_key(row): number for number, row in enumerate(rows)}
    others = 0
    for place, record in tqdm(_records(path), desc=description, unit=" responses", delay=3):
        if (prompt := prompts.get(_key(record))) is None:
            others += 1
        else:
            yield place, prompt, record
    if others and description == "checking":
        print(f"{path}: {others} responses are not used: their prompt is not among the {len(rows)} prompts")


def _records(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """One record at a time with its place, its prompt as turns."""
    for count, (place, raw) in enumerate(records_of(path), start=1):
        place = f"{place}, record {count}"
        try:
            prompt = prompt_of(raw)
        except RowError as error:
            raise ValueError(f"{place}: {error}") from error
        yield place, {**raw, "prompt": prompt}


def _key(row: dict) -> str:
    return json.dumps(row["prompt"], sort_keys=True)
