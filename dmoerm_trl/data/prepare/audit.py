"""Statistics of prepared rows: sizes, turns, lengths, languages, tasks, labels, and prompts that are in two parts."""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_text
from ...markdown import markdown_table
from ..preference_row import PreferenceRow, RowError

UNNAMED = "(none)"
"""Name in the report for the task of rows without one."""

LANGUAGE_CHARACTERS = 1000
"""Number of characters of a prompt's last turn, and of the first response, from which the language is detected."""


@dataclass
class PartAudit:
    """
    Statistics of one part, such as a split, which are updated row by row. No text of the rows is kept.

    Args:
        tokens (`Callable`, *optional*):
            Function that gives the number of tokens of a row's prompt with each response.
        language (`Callable`, *optional*):
            Function that gives the language of a text, such as [`language_of`].
    """

    tokens: Callable[[PreferenceRow], Iterable[int]] | None = None
    language: Callable[[str], str] | None = None
    skipped: Counter = field(default_factory=Counter)  # reason -> examples, or groups of those of one prompt
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first that was skipped for it, and where
    rows: int = 0
    duplicates: int = 0  # rows with the prompt and the responses of an earlier one
    prompts: Counter = field(default_factory=Counter)  # prompt id -> rows
    tasks: Counter = field(default_factory=Counter)  # task -> rows
    turns: dict[str | None, list[int]] = field(default_factory=dict)  # task -> turns of the user, one number a row
    lengths: dict[str, array] = field(default_factory=dict)  # quantity -> values
    languages: Counter = field(default_factory=Counter)  # language -> rows
    points: Counter = field(default_factory=Counter)  # capability point -> rows with a pair of it
    identical_pairs: int = 0  # labelled pairs of responses with the same text
    pairs: int = 0  # pairs of the overall ranks
    longer_is_better: float = 0.0  # those of `pairs` that prefer the longer response; equal lengths count half
    looked_at: int = 0  # rows searched for personal data, including dropped ones
    flagged: int = 0  # rows that seem to contain personal data
    personal_data: Counter = field(default_factory=Counter)  # kind -> rows
    routes: Counter = field(default_factory=Counter)  # task -> rows, by a router
    routed: int = 0  # rows whose task comes from the router
    _seen: set[int] = field(default_factory=set)

    def skip(self, place: str, error: RowError) -> None:
        """Count an example that is left out."""
        self.skipped[error.reason] += 1
        self.examples.setdefault(error.reason, f"{place}: {error}")

    def flag(self, kinds: Iterable[str]) -> None:
        """Count the kinds of personal data that a row seems to contain, whether or not the row is kept."""
        kinds = set(kinds)
        self.looked_at += 1
        self.flagged += bool(kinds)
        self.personal_data.update(kinds)

    def add(self, row: PreferenceRow) -> None:
        """Count a row that is kept."""
        identity = hash((row.prompt_id, tuple(sorted(row.responses))))
        self.duplicates += identity in self._seen
        self._seen.add(identity)
        self.rows += 1
        self.prompts[row.prompt_id] += 1
        self.tasks[row.task] += 1
        self.turns.setdefault(row.task, []).append(sum(turn["role"] == "user" for turn in row.prompt))
        self._measure("responses of a row", [len(row.responses)])
        self._measure("characters of a prompt", [sum(len(turn["content"]) for turn in row.prompt)])
        self._measure("characters of a response", map(len, row.responses))
        if self.tokens is not None:
            self._measure("tokens of a prompt with a response", self.tokens(row))
        if self.language is not None:
            texts = row.prompt[-1]["content"], row.responses[0]
            self.languages[self.language("\n".join(text[:LANGUAGE_CHARACTERS] for text in texts))] += 1
        self.identical_pairs += len(row.identical_pairs)
        self.points.update(point for point in row.labelled_points if row.pairs_of(point))
        for better, worse in row.pairs_of():
            difference = len(row.responses[better]) - len(row.responses[worse])
            self.pairs += 1
            self.longer_is_better += 0.5 * (1 + (difference > 0) - (difference < 0))

    def _measure(self, what: str, values: Iterable[int]) -> None:
        self.lengths.setdefault(what, array("L")).extend(values)

    def to_dict(self) -> dict[str, Any]:
        """Return all statistics as plain numbers. Shares are between 0 and 1; quantiles are interpolated linearly."""
        all_turns = [turns for of_task in self.turns.values() for turns in of_task]
        lengths = {"turns of the user": all_turns, **self.lengths}
        return {
            "rows": self.rows,
            "prompts": len(self.prompts),
            "duplicates": self.duplicates,
            "pairs of identical responses": self.identical_pairs,
            "skipped": dict(self.skipped.most_common()),
            "lengths": {what: _summary(values) for what, values in lengths.items()},
            "longer response is the better": self.longer_is_better / self.pairs if self.pairs else None,
            "tasks": {
                task or UNNAMED: {"rows": rows, "share": rows / self.rows, "turns": float(np.mean(self.turns[task]))}
                for task, rows in self.tasks.most_common()
            },
            "tasks by the router": _shares(self.routes),
            "rows with the router's task": self.routed,
            "languages": _shares(self.languages),
            "capability points": dict(self.points.most_common()),
            "personal data": {
                "looked at": self.looked_at,
                "flagged": self.flagged,
                "share": self.flagged / self.looked_at if self.looked_at else None,
                "kinds": dict(self.personal_data.most_common()),
            },
        }


def leaks(parts: Mapping[str, Counter]) -> list[dict[str, Any]]:
    """
    Find the prompts that two parts share, for each two parts: `{"parts": [a, b], "prompts": n, "rows": {a: i, b: j}}`.

    Args:
        parts (`Mapping[str, Counter]`): Name of a part -> id of a prompt -> number of rows.
    """
    found = []
    for (first, prompts), (second, others) in combinations(parts.items(), 2):
        shared = prompts.keys() & others.keys()
        rows = {first: sum(prompts[key] for key in shared), second: sum(others[key] for key in shared)}
        found.append({"parts": [first, second], "prompts": len(shared), "rows": rows})
    return found


def language_of(text: str) -> str:
    """Detect the language of a text, an ISO 639-1 code. This needs the extra `prepare`, but no network."""
    import py3langid

    return py3langid.classify(text)[0]


def can_tell_languages() -> bool:
    """Return whether the package that [`language_of`] needs is installed."""
    return find_spec("py3langid") is not None


# ------------------------------------------------------------------------------------------------- the report


def save_report(
    parts: Mapping[str, PartAudit], against: Mapping[str, Counter], path_prefix: str | Path
) -> tuple[Path, Path]:
    """
    Write `<path_prefix>.md` and `<path_prefix>.json`, and return both paths.

    Args:
        parts (`Mapping[str, PartAudit]`): The parts that were prepared.
        against (`Mapping[str, Counter]`): Prompts of other rows, which are only checked for leaks; see [`leaks`].
    """
    report = {
        "parts": {name: part.to_dict() for name, part in parts.items()},
        "leaks": leaks({name: part.prompts for name, part in parts.items()} | dict(against)),
    }
    markdown, content = Path(f"{path_prefix}.md"), Path(f"{path_prefix}.json")
    write_text(content, json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    write_text(markdown, to_markdown(report))
    return markdown, content


def to_markdown(report: Mapping[str, Any]) -> str:
    """Render the content of the JSON report as Markdown."""
    sections = []
    for name, part in report["parts"].items():
        personal = part["personal data"]
        flagged = f"{personal['flagged']} ({personal['share']:.1%})" if personal["looked at"] else "not looked for"
        longer = part["longer response is the better"]
        sizes = {
            "rows": part["rows"],
            "prompts": part["prompts"],
            "duplicates among the rows": part["duplicates"],
            "pairs of identical responses": part["pairs of identical responses"],
            "skipped": sum(part["skipped"].values()),
            "rows with what looks like personal data, before any was dropped": flagged,
            "rows with the router's task, because they had none": part["rows with the router's task"],
            "pairs in which the longer response is the better": "–" if longer is None else f"{longer:.1%}",
        }
        sections += [f"# {name}", _table(["", "number"], sizes.items())]
        lengths = [
            (what, *(f"{value:.10g}" for value in summary.values())) for what, summary in part["lengths"].items()
        ]
        sections.append(_table(["", "mean", "median", "95%", "greatest"], lengths))
        tasks = [(task, n["rows"], f"{n['share']:.1%}", f"{n['turns']:.2f}") for task, n in part["tasks"].items()]
        sections.append(_table(["task", "rows", "share", "turns of the user"], tasks))
        for what, column in (("tasks by the router", "rows"), ("languages", "rows")):
            shares = [(key, number["rows"], f"{number['share']:.1%}") for key, number in part[what].items()]
            sections.append(_table([what, column, "share"], shares))
        counts = {"capability points": "rows that it tells apart", "skipped": "examples"}
        sections += [_table([what, column], part[what].items()) for what, column in counts.items()]
        sections.append(_table(["personal data", "rows"], personal["kinds"].items()))
    shared = [(" and ".join(leak["parts"]), leak["prompts"], *leak["rows"].values()) for leak in report["leaks"]]
    sections += ["# Prompts in two parts"] if shared else []
    sections.append(_table(["parts", "prompts", "rows of the first", "rows of the second"], shared))
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(header: list[str], lines: Iterable[Iterable[Any]]) -> str:
    """Render a Markdown table, or an empty text if there are no lines."""
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return markdown_table([header, *cells], left=[0], padded=False) if cells else ""


def _summary(values: Iterable[int]) -> dict[str, float]:
    numbers = np.asarray(values)
    if not numbers.size:
        return {}
    quantiles = dict(zip(("median", "95%", "greatest"), np.quantile(numbers, (0.5, 0.95, 1)).tolist(), strict=True))
    return {"mean": round(float(numbers.mean()), 2), **quantiles}


def _shares(counts: Counter) -> dict[str, dict[str, float]]:
    total = sum(counts.values())
    return {str(name): {"rows": rows, "share": rows / total} for name, rows in counts.most_common()}
