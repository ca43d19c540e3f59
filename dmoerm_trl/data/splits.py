"""Splits of rows by prompt, so that phase 1, phase 3, their validation parts and the test part share no prompt."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..tasks import OTHERS
from .rows import PreferenceRow

PARTS = ("phase1_train", "phase1_validation", "phase3_train", "phase3_validation", "test")

NOWHERE: Mapping[str, str] = MappingProxyType({})


def split_rows(
    rows: Sequence[PreferenceRow],
    *,
    test: float = 0.2,
    phase1: float = 0.6,
    validation: float = 0.1,
    seed: int = 0,
    part_of: Mapping[str, str] = NOWHERE,
) -> dict[str, list[PreferenceRow]]:
    """
    Split rows into parts for the training and validation of the phases and for the test.

    All rows of a prompt belong to one part. Each task is split separately, so that every part has its share of the task.
    Prompts without an overall preference, which train only the experts, are split separately too: they belong to phase 1's
    parts alone. The split depends on the seed and the prompts, not on the order of the rows.

    Args:
        rows (`Sequence[PreferenceRow]`):
            Rows to split. They keep their order within a part.
        test (`float`, *optional*, defaults to 0.2):
            Share of a task's prompts for `test`.
        phase1 (`float`, *optional*, defaults to 0.6):
            Share of the other prompts for phase 1. The rest is for phase 3 (60% and 40% in the paper). Phase 2 trains on
            both.
        validation (`float`, *optional*, defaults to 0.1):
            Share of each phase's prompts that is used for validation.
        seed (`int`, *optional*, defaults to 0):
            Seed of the split.
        part_of (`Mapping[str, str]`, *optional*):
            Prompt id -> part, from an earlier split of some of the rows. These prompts keep their part. The other prompts go
            to the parts in which a task has less than its share.

    Returns:
        `dict[str, list[PreferenceRow]]`: The parts `phase1_train`, `phase1_validation`, `phase3_train`,
        `phase3_validation` and `test`. A part's size is its share of the task's prompts, rounded, and at least one prompt
        unless its share is 0.

    Raises:
        `ValueError`: If a task has too few prompts with an overall preference to fill each part. Rows of `others` or without
            a task may leave parts empty, because no inner model is trained on them alone.

    Example:

    ```python
    from dmoerm_trl import load_rows, split_rows

    rows, _ = load_rows("runs/demo/data/test.jsonl")
    parts = split_rows(rows, test=0.2, phase1=0.6, validation=0.1, seed=0)
    ```
    """
    for name, share in (("test", test), ("phase1", phase1), ("validation", validation)):
        if not 0 <= share < 1 or (name == "phase1" and share == 0):
            raise ValueError(
                f"got {name}={share}, need a share below 1, and for phase1 above 0 because it trains the base."
            )

    ids_of_rows = [row.prompt_id for row in rows]
    task_of = {}  # a prompt with several tasks counts once, under the last task by name ("": no task)
    ranked = set()  # prompts with an overall preference
    for prompt_id, row in zip(ids_of_rows, rows, strict=True):
        task_of[prompt_id] = max(task_of.get(prompt_id, ""), row.task or "")
        if row.pairs_of():
            ranked.add(prompt_id)
    prompts = defaultdict(list)  # task, whether ranked -> prompt ids
    for prompt_id, task in task_of.items():
        prompts[task, prompt_id in ranked].append(prompt_id)

    shares = {"phase1_validation": validation, "phase3_validation": validation, "test": test}
    needed = [part for part in PARTS if shares.get(part, 1)]
    part_of = {prompt_id: part for prompt_id, part in part_of.items() if part in needed}
    for (task, is_ranked), ids in prompts.items():
        ids.sort(key=lambda prompt_id: hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest())
        if is_ranked:
            counts = _counts(len(ids), test, phase1, validation)
        else:
            counts = dict.fromkeys(PARTS, 0) | {"phase1_validation": _take(len(ids), validation)}
            counts["phase1_train"] = len(ids) - counts["phase1_validation"]
        empty = [part for part in needed if not counts[part]]
        if is_ranked and empty and task not in ("", OTHERS):
            raise ValueError(
                f"task {task!r}: got {len(ids)} prompts with an overall preference, which leaves none for "
                f"{', '.join(empty)} ({counts}); need at least {len(needed)}, one in each part, because parts share no "
                "prompt: add rows of this task, or drop the task."
            )
        there = Counter(part_of[prompt_id] for prompt_id in ids if prompt_id in part_of)
        new = [prompt_id for prompt_id in ids if prompt_id not in part_of]
        missing = {part: max(0, counts[part] - there[part]) for part in PARTS}
        while sum(missing.values()) > len(new):  # some part has more than its share
            missing[max(missing, key=missing.get)] -= 1
        part_of.update(zip(new, [part for part in PARTS for _ in range(missing[part])], strict=True))

    split = {part: [] for part in PARTS}
    for prompt_id, row in zip(ids_of_rows, rows, strict=True):
        split[part_of[prompt_id]].append(row)
    return split


def split_rows_beside_test(
    rows: Sequence[PreferenceRow],
    test_rows: Sequence[PreferenceRow],
    *,
    phase1: float = 0.6,
    validation: float = 0.1,
    seed: int = 0,
    part_of: Mapping[str, str] = NOWHERE,
) -> tuple[dict[str, list[PreferenceRow]], int]:
    """
    Split rows as in [`split_rows`], with separate test rows (such as those of another file).

    Returns:
        The parts, where `test` contains all of `test_rows`, and the number of `rows` that were removed because their prompt
        is in `test_rows`.
    """
    tested = {row.prompt_id for row in test_rows}
    kept = [row for row in rows if row.prompt_id not in tested]
    split = split_rows(kept, test=0.0, phase1=phase1, validation=validation, seed=seed, part_of=part_of)
    return split | {"test": list(test_rows)}, len(rows) - len(kept)


def _counts(prompts: int, test: float, phase1: float, validation: float) -> dict[str, int]:
    """Return the number of a task's prompts in each part."""
    tested = _take(prompts, test)
    phases = {"phase1": _take(prompts - tested, phase1)}
    phases["phase3"] = prompts - tested - phases["phase1"]
    counts = {"test": tested}
    for name, count in phases.items():
        counts[f"{name}_validation"] = _take(count, validation)
        counts[f"{name}_train"] = count - counts[f"{name}_validation"]
    return {part: counts[part] for part in PARTS}


def _take(count: int, share: float) -> int:
    """Return a share of `count`, rounded, with at least one prompt on either side; 0 if the share is 0."""
    return min(max(1, round(count * share)), count - 1) if share and count else 0
