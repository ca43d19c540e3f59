"""
Buy capability labels from a judge: dmoerm label --config label.yaml

The judge is asked about every pair of responses, at every capability point of the row's task, in both orders; see
recipes/LABELLING.md. A run that was stopped resumes when it is started again.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..labelling.budget import Budget, Prices
from ..labelling.comparisons import Plan
from ..tasks import TaskTable


@dataclass
class LabelArguments:
    """Options of `dmoerm label`: the rows, the questions, the judge, and the budget."""

    rows: str = field(metadata={"help": "Preference rows: a file, a folder or a hub name; recipes/DATA.md."})
    output_dir: str = field(metadata={"help": "Folder of the answers, the labelled rows and the report."})
    judge: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The judge: `kind` and its settings, see recipes/LABELLING.md; JSON on the command line."},
    )
    tasks: str = field(default="paper", metadata={"help": "The rows' tasks: 'paper', 'paper-zh', or a YAML file."})
    split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset on the hub."})
    on_error: str = field(default="raise", metadata={"help": "On a bad row: 'raise', or 'skip' it and count it."})

    # Which questions
    points: list[str] | None = field(default=None, metadata={"help": "Ask only at these capability points."})
    overall_points: bool = field(
        default=False, metadata={"help": "Ask about rows of a task at the overall points too, for DMoERM-w/o-Outer."}
    )
    without_task: str = field(
        default="raise", metadata={"help": "On a row without a task: 'raise', or ask at the 'overall' points."}
    )
    order: str = field(default="all", metadata={"help": "'all' compares every pair of a row, 'sort' fewer."})
    max_pairs: int | None = field(
        default=None, metadata={"help": "Maximum pairs of a prompt at a point, drawn by seed."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the pairs that are drawn, and of the order of sorting."})

    # The budget, which includes what earlier runs spent
    max_calls: int | None = field(
        default=None, metadata={"help": "Maximum answers; 0 writes the rows without asking."}
    )
    max_tokens: int | None = field(default=None, metadata={"help": "Maximum tokens, of questions and answers."})
    max_cost: float | None = field(default=None, metadata={"help": "Maximum cost, in the unit of the prices."})
    price_per_million_prompt_tokens: float | None = field(default=None, metadata={"help": "Price of the questions."})
    price_per_million_completion_tokens: float | None = field(default=None, metadata={"help": "Price of the answers."})

    # How
    dry_run: bool = field(
        default=False, metadata={"help": "Print what would be asked and what it would cost, and ask nothing."}
    )
    stop_early: bool = field(
        default=True,
        metadata={"help": "Stop if a judge nearly always names one position or gives unreadable answers."},
    )
    ask_again_unreadable: bool = field(
        default=False, metadata={"help": "Ask again the questions whose answers could not be read."}
    )
    answers: str | None = field(
        default=None, metadata={"help": "File of the answers, if not in `output_dir`; labellings may share one."}
    )

    def __post_init__(self):
        if isinstance(self.judge, str):
            try:
                self.judge = json.loads(self.judge)
            except (ValueError, RecursionError) as error:  # the text is not shown: it may hold a secret
                raise ValueError(f"`judge`: got text that is not JSON ({error}), need JSON: fix it.") from None
        if not isinstance(self.judge, dict):
            is_text = isinstance(self.judge, (str, list))  # which is not shown either
            got = f"a {type(self.judge).__name__}" if is_text else repr(self.judge)
            raise ValueError(f"`judge`: got {got}, need `kind` and its settings, see recipes/LABELLING.md.")
        self.prices  # noqa: B018, so that a mistake is found before anything is read
        self.budget  # noqa: B018

    @property
    def plan(self) -> Plan:
        names = ("points", "overall_points", "order", "max_pairs", "seed", "without_task")
        return Plan(TaskTable.load(self.tasks), **{name: getattr(self, name) for name in names})

    @property
    def prices(self) -> Prices | None:
        given = (self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens)
        if given == (None, None):
            return None
        if None in given:
            raise ValueError(
                f"got prices {given}, need both `price_per_million_prompt_tokens` and "
                "`price_per_million_completion_tokens`: add the other one, 0 if it is free."
            )
        return Prices(*given)

    @property
    def budget(self) -> Budget:
        return Budget(self.max_calls, self.max_tokens, self.max_cost, self.prices)


def main(argv: list[str] | None = None) -> None:
    parser = Parser((LabelArguments,), prog="dmoerm label", description=__doc__)
    (arguments,) = parser.parse(argv)

    from ..commands.label import FINISHED, UNFINISHED, label

    report = label(arguments)
    if report is None:
        return
    print(report.to_markdown())
    if report.incomplete:
        sys.exit(
            f"stopped: {report.stopped}.\n{arguments.output_dir}: all answers are kept. The {report.rows:,} complete rows are "
            f"in {UNFINISHED}; {report.incomplete:,} are incomplete. Run the same command to resume."
        )
    print(f"labelled rows: {Path(arguments.output_dir) / FINISHED}")
