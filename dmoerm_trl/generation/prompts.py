"""Read the prompts of a run: those on which the policy is optimised, and others on which it is measured."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence

from ..data.formatting import Formatter
from ..data.preference_row import RowError
from ..data.rows import PreferenceRow, prompt_of, records_of

_OF_RESPONSES = ("response", "responses", "gold", "chosen", "rejected", "messages")
"""Fields of a record that do not belong to its prompt."""


def read_prompts(path: str | os.PathLike, count: int | None = None, task: str | None = None) -> list[dict]:
    """
    Read the distinct prompts of a file in the order of their first occurrence, each with the other fields of that record. The
    file may hold prompts, preference rows in any accepted format (recipes/DATA.md), or responses.

    Args:
        path (`str`): File or folder, see [`~dmoerm_trl.data.rows.load_rows`].
        count (`int`, *optional*): Number of prompts; all by default.
        task (`str`, *optional*): Task of the prompts; all tasks by default.

    Returns:
        `list[dict]`: Rows with `prompt`, a list of turns.

    Raises:
        ValueError: If a record has no prompt, which the message names with its file and line; or if there are too few prompts.

    Example:

    ```python
    from dmoerm_trl import read_prompts

    rows = read_prompts("runs/demo/data/test.jsonl", count=2)
    rows[0]["prompt"]
    ```
    """
    if count is not None and count < 1:
        raise ValueError(f"got num_prompts={count}, need at least 1: raise it, or leave it out to take all.")
    rows: dict[str, dict] = {}
    for _, record in prompt_records(path):
        if (task is None or record.get("task") == task) and (count is None or len(rows) < count):
            fields = {name: value for name, value in record.items() if name not in _OF_RESPONSES}
            rows.setdefault(prompt_key(record), fields)
    if len(rows) < (count or 1):
        of_task = f" of the task {task!r}" if task else ""
        raise ValueError(
            f"{path}: got {len(rows)} distinct prompts{of_task}, need {count or 'at least one'}: lower `num_prompts`, or take a file "
            "with more."
        )
    return list(rows.values())


def load_prompts(
    prompts: str,
    formatter: Formatter,
    *,
    max_prompt_length: int,
    eval_prompts: str | None = None,
    reward_prompts: str | None = None,
    held_out: int = 100,
    seed: int = 0,
) -> tuple[list[dict], list[dict]]:
    """
    Read the prompts of a run from files of prompts or preference rows, and print how many are used.

    Appendix D.3 of the paper draws the prompts of the reward model's training, the optimisation and the evaluation from
    different sets. With AlignBench for evaluation, PPO I is `prompts="alignbench.jsonl"`, of which `held_out` are split off,
    and PPO II is `prompts="ours.jsonl", eval_prompts="alignbench.jsonl"`. `reward_prompts` is the training set of the reward
    model.

    Args:
        prompts (`str`): File of the prompts to optimise on; see [`read_prompts`].
        formatter (`Formatter`): A formatter with the policy's tokenizer.
        max_prompt_length (`int`): Maximum tokens. Longer prompts are left out and counted, because a prompt that is cut is
            another conversation.
        eval_prompts (`str`, *optional*): File of the prompts to measure on; by default they are split off from `prompts`.
        reward_prompts (`str`, *optional*): File of the prompts on which the reward model was trained, to check that none
            recurs.
        held_out (`int`): Number of prompts to measure on; `monitor_prompts` of a recipe.

    Returns:
        A row with `prompt` for each prompt to optimise on, and for each of at most `held_out` prompts to measure on.

    Raises:
        ValueError: If two sets share a prompt, or one is empty.

    Example:

    ```python
    from dmoerm_trl import Formatter, load_policy, load_prompts

    _, tokenizer = load_policy("runs/demo/base")
    rows, eval_rows = load_prompts("runs/demo/data/test.jsonl", Formatter(tokenizer, 512), max_prompt_length=256, held_out=2)
    ```
    """
    if max_prompt_length < 1 or held_out < 1:
        raise ValueError(
            f"got max_prompt_length={max_prompt_length} and {held_out} prompts to measure on, need at least 1 of each: raise "
            "`max_prompt_length` or `monitor_prompts`."
        )

    def read(path: str) -> list[dict]:
        unique = list({prompt_id(row): row for row in reversed(read_prompts(path))}.values())[::-1]
        try:
            fitting = [row for row in unique if formatter.prompt_length(row["prompt"]) <= max_prompt_length]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        print(f"{path}: {len(unique)} prompts, {len(unique) - len(fitting)} left out: over {max_prompt_length} tokens")
        return fitting

    optimised = read(prompts)
    if eval_prompts is None:
        measured, optimised = split_off(optimised, held_out, seed=seed)
    else:
        measured, _ = split_off(read(eval_prompts), held_out, seed=seed)
    sets = {"the prompts to optimise on": optimised, "the prompts to measure on": measured}
    if reward_prompts is not None:
        sets["the reward model's training prompts"] = read_prompts(reward_prompts)
    check_disjoint(sets)
    for name, rows in sets.items():
        print(f"{name}: {len(rows)}")
        if not rows:
            raise ValueError(f"got no rows left for {name}, need some: raise max_prompt_length or lower held_out.")
    return optimised, measured


def split_off(rows: Sequence[dict], count: int, *, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """
    Split off the rows of `count` prompts. The choice of the prompts depends only on the seed and the prompts, not on the order
    of the rows, and no prompt is in both parts.
    """
    ids = sorted(map(prompt_id, rows), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    chosen = set(list(dict.fromkeys(ids))[:count])
    return [row for row in rows if prompt_id(row) in chosen], [row for row in rows if prompt_id(row) not in chosen]


def check_disjoint(sets: dict[str, Sequence[dict]]) -> None:
    """
    Check that no prompt is in two sets.

    Raises:
        ValueError: If a prompt is in two of the named sets, ignoring case and white space.
    """
    seen: dict[str, str] = {}
    for name, rows in sets.items():
        ids = {prompt_id(row): row for row in rows}
        if shared := [shared_id for shared_id in ids if shared_id in seen]:
            example = ids[shared[0]]["prompt"][-1]["content"][:80]
            raise ValueError(
                f"got {len(shared)} prompts that are both in {seen[shared[0]]} and in {name} (such as {example!r}), need sets "
                "without a prompt in common, because on a prompt seen before neither reward model nor policy shows what it "
                "does on new ones: take them out of one of the sets."
            )
        seen |= dict.fromkeys(ids, name)


def prompt_id(row: dict) -> str:
    """Return the identifier of a prompt; see [`~dmoerm_trl.data.rows.PreferenceRow.prompt_id`]."""
    return PreferenceRow(row["prompt"], [], []).prompt_id


def prompt_records(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """Yield the place of each record, and the record with its prompt as turns."""
    for count, (place, raw) in enumerate(records_of(path), start=1):
        place = f"{place}, record {count}"
        try:
            prompt = prompt_of(raw)
        except RowError as error:
            raise ValueError(f"{place}: {error}") from error
        yield place, {**raw, "prompt": prompt}


def prompt_key(row: dict) -> str:
    """Return a key that is equal for rows with the same turns."""
    return json.dumps(row["prompt"], sort_keys=True)
