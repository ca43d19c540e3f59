"""Rows of a run, which are read, compared with `max_length`, split into parts for the phases, and checked for labels."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ..data.formatting import CutReport, Formatter
from ..data.preference_row import PreferenceRow
from ..data.rows import check_capability_labels, load_rows, merge_same_tokens, places_of, write_rows
from ..data.splits import PARTS, split_rows, split_rows_beside_test
from ..files import write_json, write_text
from ..tasks import OVERALL, TaskTable, slug
from .recipe import Recipe

DIGESTS = "digests.json"


class RunData(NamedTuple):
    """Rows of a run by part, and the lines of the report about them."""

    parts: dict[str, list[PreferenceRow]]
    report: list[str]

    def save(self, folder: Path, tasks: TaskTable) -> None:
        """Write a file for each part, `report.txt`, and the [`digests`] of the rows that each stage reads."""
        for name, rows in self.parts.items():
            write_rows(rows, folder / f"{name}.jsonl")
        write_text(folder / "report.txt", "\n".join(self.report) + "\n")
        write_json(folder / DIGESTS, self.digests(tasks))

    def digests(self, tasks: TaskTable) -> dict[str, Any]:
        """
        Compute a digest of the rows that each stage reads, to detect changes in the texts and in the labels that the stage
        learns from. A stage of experts has one digest per point.
        """

        def of(*parts: str, task: str = OVERALL, point: str | None = None) -> str:
            return _digest(
                [row.prompt, row.responses, pairs]
                for part in parts
                for row in self.parts[part]
                if task in (OVERALL, row.task) and (pairs := row.pairs_of(point))
            )

        phase1, phase3 = ("phase1_train", "phase1_validation"), ("phase3_train", "phase3_validation")
        routed = (row for part in (*phase1, *phase3) for row in self.parts[part] if row.task in tasks.tasks)
        digests: dict[str, Any] = {"router": _digest([row.prompt, row.task] for row in routed)}
        digests["ensemble"] = of(*phase1, *phase3)
        for task, points in {**tasks.tasks, OVERALL: tasks.overall}.items():
            digests[f"{slug(task)}/phase1"] = of(*phase1, task=task)
            digests[f"{slug(task)}/phase3"] = of(*phase3, task=task)
            digests[f"{slug(task)}/experts"] = {
                slug(point): of(*phase1, "phase3_train", task=task, point=point) for point in points
            }
        return digests


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def read_run_data(recipe: Recipe, tasks: TaskTable, formatter: Formatter, part_of: Mapping[str, str]) -> RunData:
    """
    Read the rows of a recipe.

    Args:
        part_of (`Mapping[str, str]`): Prompt id -> the part in which it stays, from the run that this one extends.

    Raises:
        ValueError: If a row is bad, a response does not fit, a point has no labels, a part has no overall preference, or a task
            has too few prompts. The message names the source.
    """
    rows, report, cut = _read(recipe.train_data, recipe, tasks, formatter)
    shares = {"phase1": recipe.phase1_share, "validation": recipe.validation_share, "seed": recipe.seed}
    if recipe.test_data is None:
        parts = split_rows(rows, test=recipe.test_share, part_of=part_of, **shares)
    else:
        test_rows, test_report, test_cut = _read(recipe.test_data, recipe, tasks, formatter)
        parts, removed = split_rows_beside_test(rows, test_rows, part_of=part_of, **shares)
        cut |= test_cut
        report += [*test_report, f"{removed} training rows removed because their prompt is in the test rows"]
    training = parts["phase1_train"] + parts["phase3_train"]
    for what, part in (("training rows", training), ("rows that validate phase 2", parts["phase1_validation"])):
        try:
            check_capability_labels(part, tasks, overall=recipe.without_outer)
        except ValueError as error:
            raise ValueError(f"{recipe.train_data}: in the {len(part)} {what}: {error}") from error
    _check_preferences(parts, recipe, tasks)
    _check_members(parts, recipe, tasks)
    for name, part in parts.items():
        unranked = sum(not row.pairs_of() for row in part)
        for_experts = f", {unranked} of them without an overall preference" if unranked else ""
        cuts = [cut.get(id(row), 0) for row in part]
        lost = CutReport(
            recipe.max_length, len(part), sum(map(bool, cuts)), sum(len(row.responses) for row in part), sum(cuts)
        )
        report.append(f"{name}: {len(part)} rows{for_experts}; {lost}")
    return RunData(parts, report)


def parts_of(folder: Path) -> dict[str, str]:
    """Return the part of each prompt id in the `data/` of another run."""
    found = {}
    for part in PARTS:
        with (folder / f"{part}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                found[PreferenceRow(**json.loads(line)).prompt_id] = part
    return found


def _read(
    source: str, recipe: Recipe, tasks: TaskTable, formatter: Formatter
) -> tuple[list[PreferenceRow], list[str], dict[int, int]]:
    """
    Return the rows of a source that fit, the lines of the report about them, and the number of responses whose prompt lost
    turns, for each row by its `id`.
    """
    rows, loaded = load_rows(source, tasks=tasks, on_error=recipe.on_error)
    if not rows:
        raise ValueError(f"{source}: got no rows, need at least one: name another file.")
    uncut = copy(formatter)
    uncut.max_length = sys.maxsize
    kept, cut, lengths, too_long, refused, same_tokens = [], {}, [], [], [], 0
    for row in tqdm(rows, desc="tokenising", unit=" rows", delay=3):
        try:
            encodings = uncut.encode_responses(row.prompt, row.responses)
        except ValueError as error:
            refused.append((row, str(error)))
            continue
        lengths.append(max(len(encoding.input_ids) for encoding in encodings))
        if lengths[-1] > recipe.max_length:
            try:
                encodings = formatter.encode_responses(row.prompt, row.responses)
            except ValueError as error:
                too_long.append((row, lengths[-1], str(error)))
                continue
        (merged,), same = merge_same_tokens([row], [encodings])
        same_tokens += same
        kept.append(merged)
        cut[id(merged)] = sum(encoding.cut_turns > 0 for encoding in encodings)
    over = [length for length in lengths if length > recipe.max_length]
    said = [_distribution(lengths, recipe.max_length)] if lengths else []
    if refused:
        loaded.skipped["refused by the chat template"] += len(refused)
        error = refused[0][1]
        _raise_unless_skipped(recipe, tasks, source, [row for row, _ in refused], len(rows), error, "fix the rows")
    if too_long:
        loaded.skipped["responses that exceed max_length"] += len(too_long)
        most = max(length for _, length, _ in too_long)
        way_out = f"raise max_length (all of them fit into {most} tokens; {said[0]})"
        _raise_unless_skipped(
            recipe, tasks, source, [row for row, _, _ in too_long], len(rows), too_long[0][2], way_out
        )
    if not kept:
        raise ValueError(
            f"{source}: got {len(rows)} rows, none of which fits into max_length={recipe.max_length}: raise it."
        )
    loaded.rows = len(kept)
    loaded.identical_pairs += same_tokens
    report = [str(loaded), *(f"{source}: {line}" for line in said)]
    if over:
        report[-1] += f"; {len(over)} rows exceed max_length={recipe.max_length}"
    return kept, report, cut


def _raise_unless_skipped(
    recipe: Recipe, tasks: TaskTable, source: str, rows: list[PreferenceRow], total: int, error: str, way_out: str
) -> None:
    if recipe.on_error == "skip":
        return
    places = places_of(rows, source, tasks=tasks)
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    raise ValueError(
        f"{source}: got {len(rows)} of {total} rows that cannot be read ({'; '.join(places[:5])}{more}). The first: {error} "
        f"For all of them: {way_out}, or skip and count them with `on_error: skip`."
    )


def _distribution(lengths: Sequence[int], max_length: int) -> str:
    """Describe the lengths of the rows' longest texts, and how many rows would not be cut with larger limits."""
    half, most, nearly_all = np.percentile(lengths, (50, 90, 99), method="higher")
    said = f"tokens of a row's longest text: median {half}, 90% {most}, 99% {nearly_all}, longest {max(lengths)}"
    whole, limit, kept = sum(length <= max_length for length in lengths), max_length, []
    while limit < max(lengths):
        limit *= 2
        kept.append(f"{limit} {sum(length <= limit for length in lengths)}")
    return said + (
        f"; max_length={max_length} keeps {whole} of {len(lengths)} rows whole, {', '.join(kept)}" if kept else ""
    )


def _check_preferences(parts: dict[str, list[PreferenceRow]], recipe: Recipe, tasks: TaskTable) -> None:
    """Check that phases 1 and 3 and the test have rows with overall preferences."""
    for name, part in parts.items():
        together = name == "test" or (name.startswith("phase1") and recipe.share_base)
        for task in [OVERALL] if together else tasks.tasks:
            rows = [row for row in part if task in (OVERALL, row.task)]
            if (rows or name.endswith("train")) and not any(row.pairs_of() for row in rows):
                source = recipe.test_data if name == "test" else None
                raise ValueError(
                    f"{source or recipe.train_data}: got {len(rows)} rows of the task {task!r} in the part {name}, none "
                    "with two distinct `ranks`, need at least one because bases and aggregators are trained and tested on the "
                    "overall preference: rank responses to more of the task's prompts."
                )


def _check_members(parts: dict[str, list[PreferenceRow]], recipe: Recipe, tasks: TaskTable) -> None:
    """Check that phase 3 has a prompt for each of several aggregators to be validated on."""
    phases = ("phase1", "phase3") if recipe.phase3_rows == "all" else ("phase3",)
    rows = [row for phase in phases for part in ("train", "validation") for row in parts[f"{phase}_{part}"]]
    for task in tasks.tasks:
        prompts = {row.prompt_id for row in rows if row.task == task and row.pairs_of()}
        if len(prompts) < recipe.aggregator_members:
            raise ValueError(
                f"{recipe.train_data}: got aggregator_members={recipe.aggregator_members} and {len(prompts)} ranked prompts of "
                f"the task {task!r} for phase 3, need at least as many prompts, because each aggregator is validated on prompts "
                "of its own: lower it, or rank responses to more of the task's prompts."
            )
