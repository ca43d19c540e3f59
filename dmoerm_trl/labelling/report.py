"""Quality of a judge's labels: agreement with itself, position bias, agreement with the rows' ranks."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.win_rate import wilson_interval
from ..files import write_json, write_text
from ..markdown import escape, markdown_table
from .answer_store import Spent
from .comparisons import Pair, agreed

EARLY = 50
"""Number of answers from which on a hopeless judge can be detected."""
HOPELESS = 0.9
"""A judge is hopeless if the lower bound (Wilson's 95% interval) on the share of one kind of answer is above this."""
FEW = 100
"""Fewer labels than this at a point cause a warning, because an expert is trained on them."""


@dataclass
class Tally:
    """
    Counts over the pairs that a judge was asked about, each in both orders.

    If both answers to each counted pair can be read, a judge without position bias names the first position in exactly half of
    its answers, whatever it prefers.
    """

    pairs: int = 0
    agreed: int = 0
    """Pairs in which both answers prefer the same response; these are the labels."""
    unreadable: int = 0
    """Pairs with an answer that is unreadable or makes no choice."""
    answers_first: int = 0
    """Answers that name the first position, among the `readable_answers`."""
    ranked: int = 0
    """Agreed pairs that are not tied in the row's `ranks`."""
    as_ranked: int = 0
    """Agreed pairs that the ranks order the same way."""
    ties: int = 0
    """Pairs in which an answer gives both responses the same score; only from judges that score."""

    @property
    def disagreed(self) -> int:
        """Pairs in which the answers prefer different responses, which are dropped (section 4.3)."""
        return self.pairs - self.agreed - self.unreadable - self.ties

    @property
    def readable_answers(self) -> int:
        """Number of answers of the pairs with two readable answers and no tie."""
        return 2 * (self.pairs - self.unreadable - self.ties)

    def add(self, pair: Pair, choices: tuple[int | None, int | None], ranked: Collection[Pair] = ()) -> int | None:
        """
        Count one pair.

        Args:
            pair (`Pair`): Indices of the two responses.
            choices (`tuple`): Verdicts of the two answers: in the pair's order, and with the positions swapped.
            ranked (`Collection[Pair]`, *optional*): The pairs (better, worse) that the row's ranks order.

        Returns:
            Index of the response that both answers prefer, or `None`.
        """
        better = agreed(pair, *choices)
        self.pairs += 1
        self.agreed += better is not None
        if None in choices:
            self.unreadable += 1
        elif 0 in choices:
            self.ties += 1
        else:
            self.answers_first += choices.count(1)
        if better is not None:
            label = (better, sum(pair) - better)
            self.ranked += label in ranked or label[::-1] in ranked
            self.as_ranked += label in ranked
        return better

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            *(mine + yours for mine, yours in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )

    def early_fault(self) -> str | None:
        """Return [`fault`] if there are enough answers to stop because of it."""
        return self.fault() if 2 * self.pairs >= EARLY else None

    def is_unreadable(self) -> bool:
        """Whether the judge is hopeless because its answers cannot be read."""
        return _is_hopeless(self.unreadable, self.pairs)

    def fault(self) -> str | None:
        """Describe, with numbers, why the answers are worthless, if that is statistically certain."""
        readable, second = self.readable_answers, self.readable_answers - self.answers_first
        for share, count, says, of in (
            (self.unreadable, self.pairs, "has an answer that cannot be read, or prefers neither response,", "pairs"),
            (self.ties, self.pairs, "gives both responses the same score", "pairs"),
            (self.answers_first, readable, "names the first response, whatever it is,", "answers"),
            (second, readable, "names the second response, whatever it is,", "answers"),
        ):
            if _is_hopeless(share, count):
                return f"the judge {says} in {share} of {count} {of} ({share / count:.0%})"
        return None


@dataclass
class Report:
    """Outcome of labelling. `points` has a [`Tally`] for each task and capability point."""

    rows: int = 0
    incomplete: int = 0
    """Rows that are not written because some of their questions are not answered."""
    points: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    """Counts over all pairs with both answers, including those of incomplete rows."""
    spent: Spent = Spent(0, 0, 0)
    cost: float | None = None
    stopped: str | None = None
    """Why asking stopped, if it did."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Kind of failure -> number of requests of this run that failed and were retried."""

    @property
    def total(self) -> Tally:
        """Sum over all tasks and points."""
        return sum(self.points.values(), Tally())

    def warnings(self) -> list[str]:
        """List what a reader must not overlook, with numbers."""
        warnings = [] if not (fault := self.total.fault()) else [f"All points: {fault}."]
        for (task, point), tally in self.points.items():
            name = f"Task {task!r}, point {point!r}"
            if tally.pairs and tally.unreadable == tally.pairs:
                warnings.append(f"{name}: no answer could be read in any of {tally.pairs} pairs.")
            elif fault := tally.fault():
                warnings.append(f"{name}: {fault}.")
        few = [
            f"{task}, {point}: {tally.agreed}" for (task, point), tally in self.points.items() if tally.agreed < FEW
        ]
        if few:
            warnings.append(f"Few labels to train an expert on, less than {FEW}: {'; '.join(few)}.")
        return warnings

    def to_markdown(self) -> str:
        """Render the report in Markdown."""
        kinds = ["agreed", "disagreed", *(["ties"] if self.total.ties else []), "unreadable"]
        rows = [["task", "point", "pairs", *kinds, "first position", "as ranked"]]
        for (task, point), tally in [*self.points.items(), (("all", ""), self.total)]:
            cells = [escape(task), escape(point), str(tally.pairs)]
            cells += [_share(getattr(tally, kind), tally.pairs) for kind in kinds]
            cells += [_share(tally.answers_first, tally.readable_answers), _share(tally.as_ranked, tally.ranked)]
            rows.append(cells)
        took = f"{self.spent.calls:,} answers, {self.spent.prompt_tokens:,} + {self.spent.completion_tokens:,} tokens"
        cost = "" if self.cost is None else f", cost {self.cost:,.2f}"
        return "\n".join(
            [
                "# Capability labels",
                "",
                f"{self.rows:,} rows written, {self.incomplete:,} left out because questions of theirs are not answered.",
                f"The judge's answers so far: {took}{cost}.",
                *([f"{escape(failed_requests(self.failures))}."] if self.failures else []),
                "",
                *([f"Asking stopped: {escape(self.stopped)}.", ""] if self.stopped else []),
                *(f"**Warning.** {escape(warning)}\n" for warning in self.warnings()),
                markdown_table(rows, left=(0, 1), padded=False),
                "",
                "Each pair is asked about twice, with the positions swapped, and its label is kept where the answers agree.",
                "First position: answers that name it, of the pairs whose answers can both be read; 50% is no bias. As ranked:",
                "labels that order the pair as `ranks` does, of those that `ranks` orders. Unreadable: one answer or both.",
                *(["Ties: equal scores for both responses."] if self.total.ties else []),
                "Pairs of rows that are left out count as soon as both answers are there.",
                "",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to a dictionary for JSON."""

        def entry(tally: Tally) -> dict[str, Any]:
            counts = asdict(tally) | {"disagreed": tally.disagreed, "readable_answers": tally.readable_answers}
            return {name: count for name, count in counts.items() if name != "ties" or self.total.ties}

        return {
            "rows": self.rows,
            "incomplete": self.incomplete,
            "stopped": self.stopped,
            "points": [{"task": task, "point": point, **entry(tally)} for (task, point), tally in self.points.items()],
            "all": entry(self.total),
            "spent": self.spent._asdict() | {"cost": self.cost},
            "failed_requests": dict(self.failures),
            "warnings": self.warnings(),
        }

    def save(self, folder: Path) -> None:
        """Write `report.md` and `report.json`, readable only by their owner because they may quote answers."""
        write_text(folder / "report.md", self.to_markdown(), private=True)
        write_json(folder / "report.json", self.to_dict(), private=True)


def failed_requests(failures: Mapping[str, int]) -> str:
    """Describe the requests that failed and were retried."""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(failures.items()))
    return f"Requests of this run that failed and were made again: {kinds}"


def _is_hopeless(share: int, count: int) -> bool:
    return bool(count) and wilson_interval(share / count, count)[0] > HOPELESS


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"
