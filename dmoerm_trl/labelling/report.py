"""What a judge's labels are worth: how often it agreed with itself, which position it favours, how it ranks."""

import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.win_rate import wilson_interval
from .answers import Spent
from .plan import Pair, agreed

EARLY = 50
"""Answers after which a hopeless judge is found out."""
HOPELESS = 0.9
"""A judge is hopeless if it surely (Wilson's 95% interval) says one and the same in more than this share of its answers."""
FEW = 100
"""Fewer labels at a point than this are worth a warning: an expert is to be trained on them."""


@dataclass
class Tally:
    """
    Counts over the pairs that a judge was asked about, each in both orders.

    Where both answers of every counted pair can be read, a judge that does not look at the position names the first one in
    exactly half of its answers, whatever it prefers.
    """

    pairs: int = 0
    agreed: int = 0
    """Pairs in which both answers prefer the same response: the labels that are kept."""
    unreadable: int = 0
    """Pairs in which an answer could not be read, or the judge preferred none."""
    answers_first: int = 0
    """Answers that name the first position, of the `2 * (pairs - unreadable)` of pairs whose answers can both be read."""
    ranked: int = 0
    """Agreed pairs that the row's `ranks` order too."""
    as_ranked: int = 0
    """Those of them that the ranks order in the same way."""

    @property
    def disagreed(self) -> int:
        """Pairs in which the answers prefer different responses: dropped, as section 4.3 has it."""
        return self.pairs - self.agreed - self.unreadable

    @property
    def readable_answers(self) -> int:
        return 2 * (self.pairs - self.unreadable)

    def add(self, pair: Pair, choices: tuple[int | None, int | None], ranked: Collection[Pair] = ()) -> int | None:
        """
        Counts one pair.

        Args:
            pair: the indices of two responses.
            choices: the answers, first in the pair's order, then with the positions swapped.
            ranked: the pairs (better, worse) of the row's ranks.

        Returns:
            The index of the response that both answers prefer, or `None`.
        """
        better = agreed(pair, *choices)
        self.pairs += 1
        self.agreed += better is not None
        if None in choices:
            self.unreadable += 1
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
        """The [`fault`] if there are answers enough to stop at it."""
        return self.fault() if 2 * self.pairs >= EARLY else None

    def fault(self) -> str | None:
        """What makes the answers worthless, with its numbers, if something surely does."""
        readable, second = self.readable_answers, self.readable_answers - self.answers_first
        for share, count, says, of in (
            (self.unreadable, self.pairs, "has an answer that cannot be read, or prefers neither response,", "pairs"),
            (self.answers_first, readable, "names the first response, whatever it is,", "answers"),
            (second, readable, "names the second response, whatever it is,", "answers"),
        ):
            if count and wilson_interval(share / count, count)[0] > HOPELESS:
                return f"the judge {says} in {share} of {count} {of} ({share / count:.0%})"
        return None


@dataclass
class Report:
    """What a labelling came to. `points` has a [`Tally`] for every task and capability point."""

    rows: int = 0
    incomplete: int = 0
    """Rows that are not written because questions of theirs are not answered."""
    points: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    """Of all pairs with both answers, those of incomplete rows too."""
    spent: Spent = Spent(0, 0, 0)
    cost: float | None = None
    stopped: str | None = None
    """Why questions are not answered."""

    @property
    def total(self) -> Tally:
        return sum(self.points.values(), Tally())

    def warnings(self) -> list[str]:
        """What a reader must not overlook, with the numbers."""
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
        header = ["task", "point", "pairs", "agreed", "disagreed", "unreadable", "first position", "as ranked"]
        lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
        for (task, point), tally in [*self.points.items(), (("all", ""), self.total)]:
            cells = [task, point, str(tally.pairs)]
            cells += [_share(count, tally.pairs) for count in (tally.agreed, tally.disagreed, tally.unreadable)]
            cells += [_share(tally.answers_first, tally.readable_answers), _share(tally.as_ranked, tally.ranked)]
            lines.append("| " + " | ".join(cells) + " |")
        took = f"{self.spent.calls:,} answers, {self.spent.prompt_tokens:,} + {self.spent.completion_tokens:,} tokens"
        cost = "" if self.cost is None else f", cost {self.cost:,.2f}"
        return "\n".join(
            [
                "# Capability labels",
                "",
                f"{self.rows:,} rows written, {self.incomplete:,} left out because questions of theirs are not answered.",
                f"The judge's answers so far: {took}{cost}.",
                "",
                *([f"Asking stopped: {self.stopped}.", ""] if self.stopped else []),
                *(f"**Warning.** {warning}\n" for warning in self.warnings()),
                *lines,
                "",
                "Each pair is asked about twice, with the positions swapped, and its label is kept where the answers agree.",
                "First position: answers that name it, of the pairs whose answers can both be read; 50% is no bias. As ranked:",
                "labels that order the pair as `ranks` does, of those that `ranks` orders. Unreadable: one answer or both.",
                "Pairs of rows that are left out count as soon as both answers are there.",
                "",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        def entry(tally: Tally) -> dict[str, Any]:
            return asdict(tally) | {"disagreed": tally.disagreed, "readable_answers": tally.readable_answers}

        return {
            "rows": self.rows,
            "incomplete": self.incomplete,
            "stopped": self.stopped,
            "points": [{"task": task, "point": point, **entry(tally)} for (task, point), tally in self.points.items()],
            "all": entry(self.total),
            "spent": self.spent._asdict() | {"cost": self.cost},
            "warnings": self.warnings(),
        }

    def save(self, folder: Path) -> None:
        """Writes `report.md` and `report.json`."""
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False), encoding="utf-8")


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"
