"""
Fuzz: what malformed inputs of every kind lead to. None may be silently wrong, hang or crash, and nearly all end in a message that
names the place and a way out.

    python tests/benchmarks/fuzz.py --json runs/fuzz.json [--cases 400] [--only rows models] [--seed 0] [--number 7]

A case makes one input from a seed (`fuzz_files.py` and its neighbours), gives it to the function or the command that reads it, in a process of its own
with limits of time and memory, and looks at what came of it:

| outcome | |
| --- | --- |
| `named` | an error whose message names the place (file, line, key, option) and a way out |
| `unnamed` | an error whose message lacks one of them, or that came after a part of the training was done |
| `right` | no error, and what was made of the input is what it means: the change was a harmless one |
| `counted` | no error, and the output counts what was left out |
| `wrong` | no error, and something else was made of it: silently wrong |
| `hang` | not at its end after `LIMIT` seconds |
| `crash` | a foreign exception (`TypeError`, `KeyError`, a library's own), or the end of the process |
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import kills
from forks import preload
from fuzz_case import Material, outcome
from fuzz_files import prompts, rows, tables
from fuzz_models import models, resume
from fuzz_replies import replies
from fuzz_settings import commands, recipes

OUTCOMES = (*(RIGHT := ("named", "counted", "right")), "unnamed", "wrong", "hang", "crash")

KINDS = {
    "rows": (rows, 110),
    "tables": (tables, 40),
    "recipes": (recipes, 90),
    "prompts": (prompts, 35),
    "replies": (replies, 45),
    "models": (models, 40),
    "commands": (commands, 20),
    "resume": (resume, 20),
}
"""Kind -> what makes a case of it, and its part of the cases."""

PRELOAD = [*kills.PRELOAD, "aiohttp", *(f"dmoerm_trl.commands.{name}" for name in ("prepare", "score", "eval"))]


def run(numbers: dict[str, Iterable[int]], seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """
    Tries the cases of these numbers of each kind.

    Yields:
        A record of each: kind, number, what was changed, the outcome, seconds, and what was said.
    """
    preload(PRELOAD)
    with Material(folder / "good") as material:
        for kind, of_kind in numbers.items():
            for number in of_kind:
                at = folder / kind / str(number)
                at.mkdir(parents=True)
                case, start = (
                    KINDS[kind][0](material, random.Random(f"{kind} {seed} {number}"), at),
                    time.perf_counter(),
                )
                result, said = outcome(case, at)
                seconds = round(time.perf_counter() - start, 1)
                record = {"kind": kind, "number": number, "what": case.what, "outcome": result, "seconds": seconds}
                yield record | {"said": said.replace(str(folder), "")}
                shutil.rmtree(at)


def table(records: list[dict]) -> str:
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        counts[record["kind"]][record["outcome"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    lines = ["| kind | cases | " + " | ".join(OUTCOMES) + " |", "| --- |" + " ---: |" * (len(OUTCOMES) + 1)]
    for kind, of_kind in counts.items():
        lines.append(f"| {kind} | {of_kind.total()} | " + " | ".join(str(of_kind[name]) for name in OUTCOMES) + " |")
    malformed = counts["all"].total() - counts["all"]["right"] - counts["all"]["counted"]
    ended = f"Of {malformed} that are neither harmless nor counted, {counts['all']['named'] / max(malformed, 1):.1%} end in `named`."
    return "\n".join(lines) + f"\n\n{ended}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--cases", type=int, default=400, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(KINDS), help="these kinds")
    parser.add_argument("--number", type=int, help="this case of each kind alone")
    options = parser.parse_args(argv)
    whole = sum(KINDS[kind][1] for kind in options.only)
    numbers: dict[str, Iterable[int]] = {
        kind: [options.number] if options.number is not None else range(round(options.cases * KINDS[kind][1] / whole))
        for kind in options.only
    }
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for record in run(numbers, options.seed, Path(folder)):
            records.append(record)
            if record["outcome"] not in RIGHT or options.number is not None:
                print(
                    "{kind} {number}: {outcome}: {what}: ".format(**record) + repr(record["said"][-400:]), flush=True
                )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for record in records:
        if record["outcome"] in RIGHT:
            del record["said"]
    lines = ",\n".join(json.dumps(record) for record in records)
    options.json.write_text(f'{{"seed": {options.seed}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(table(records))


if __name__ == "__main__":
    main()
