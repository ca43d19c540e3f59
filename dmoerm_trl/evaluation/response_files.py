"""Import of existing responses, from files in any format that rows can be read from."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..data.preference_row import RowError, check_characters, short
from ..data.ranks import number
from ..data.trl_pairs import response_of
from ..generation.prompts import prompt_key, prompt_records
from .response_store import RESPONSES, ResponseStore, Shard


def import_responses(store: ResponseStore, rows: Sequence[dict], path: str | os.PathLike, *, gold: bool) -> None:
    """
    Import the first n responses to each prompt from a file into a store. The entire file is checked before anything is
    written.

    Args:
        store ([`~dmoerm_trl.evaluation.response_store.ResponseStore`]): Store to write to.
        rows (`Sequence[dict]`): Prompts of the store; records with other prompts are skipped and counted.
        path (`str` or `os.PathLike`): File of the responses.
        gold (`bool`): Whether to import the column `gold` too.

    Raises:
        ValueError: If a prompt has fewer than n responses, or a record is invalid.
    """
    missing = set(store.missing(RESPONSES))
    if not missing:
        return
    counts, waiting = [0] * len(rows), [[] for _ in rows]
    for place, prompt, record in _matching_records(rows, path, "checking"):
        _extract(place, prompt, record, gold)
        counts[prompt] += 1
    if (fewest := min(counts)) < store.n:
        prompt = counts.index(fewest)
        lower = f"lower n to {fewest}" if fewest else "sample some"
        raise ValueError(
            f"{path}: got {fewest} responses to prompt {prompt} ({rows[prompt]['prompt'][-1]['content']!r}), need n={store.n} "
            f"because the best of n is chosen among n: {lower}, or leave the prompt out."
        )
    if beyond := sum(counts) - store.n * len(rows):
        print(f"{path}: {beyond} responses are not used: they come after the first {store.n} to their prompt")
    counts = [0] * len(rows)
    for place, prompt, record in _matching_records(rows, path, "importing"):
        if counts[prompt] == store.n:
            continue
        waiting[prompt].append(_extract(place, prompt, record, gold))
        shard = Shard(prompt, counts[prompt] // store.shard_size)
        counts[prompt] += 1
        if len(waiting[prompt]) == store.size(shard):
            if shard in missing:
                store.write(
                    RESPONSES, shard, **{name: [one[name] for one in waiting[prompt]] for name in waiting[prompt][0]}
                )
            waiting[prompt].clear()


def _extract(place: str, prompt: int, record: dict, gold: bool) -> dict[str, Any]:
    """Extract what the store keeps of a record: the text of the response, and optionally its gold reward as a number."""
    response = record.get("response")
    if not isinstance(response, (str, list)):
        raise ValueError(
            f"{place}: got the response {short(response)} to prompt {prompt}, need a text: fix the record."
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
            "fix the record, or name a gold scorer instead of 'file'."
        )
    return {"response": text, "gold": reward}


def _matching_records(
    rows: Sequence[dict], path: str | os.PathLike, description: str
) -> Iterator[tuple[str, int, dict]]:
    """Yield the records with a prompt of `rows`, each with its place and the prompt's number."""
    prompts = {prompt_key(row): number for number, row in enumerate(rows)}
    others = 0
    for place, record in tqdm(prompt_records(path), desc=description, unit=" responses", delay=3):
        if (prompt := prompts.get(prompt_key(record))) is None:
            others += 1
        else:
            yield place, prompt, record
    if others and description == "checking":
        print(f"{path}: {others} responses are not used: their prompt is not among the {len(rows)} prompts")
