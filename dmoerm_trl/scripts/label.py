"""
`dmoerm label --config label.yaml`: buys capability labels from a judge: every pair of responses, at every capability point of
the row's task, in both orders; see recipes/LABELLING.md. A run that was stopped, by whatever, goes on when it is started again.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..data.rows import LoadReport, iter_rows
from ..evaluation.scorers import file_digest
from ..files import check_writable, write_json
from ..folders import held
from ..labelling.answers import AnswerStore
from ..labelling.budget import Budget, Prices
from ..labelling.judges import judge_from_config
from ..labelling.labeller import Labeller
from ..labelling.plan import Plan
from ..labelling.report import Report
from ..tasks import TaskTable


@dataclass
class LabelArguments:
    """What `dmoerm label` reads: the rows, which questions, the judge, what it may cost."""

    rows: str = field(metadata={"help": "Preference rows: a file, a folder or a hub name; recipes/DATA.md."})
    output_dir: str = field(metadata={"help": "Folder of the answers, the labelled rows and the report."})
    judge: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Who is asked: `kind` and its settings, see recipes/LABELLING.md; JSON on the command line."
        },
    )
    tasks: str = field(default="paper", metadata={"help": "The rows' tasks: 'paper', 'paper-zh', or a YAML file."})
    split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset on the hub."})
    on_error: str = field(default="raise", metadata={"help": "For a bad row: 'raise', or 'skip' and count."})

    # Which questions
    points: list[str] | None = field(default=None, metadata={"help": "These capability points alone."})
    overall_points: bool = field(
        default=False, metadata={"help": "Ask of rows of a task at the overall points too, for DMoERM-w/o-Outer."}
    )
    without_task: str = field(
        default="raise", metadata={"help": "For a row without a task: 'raise', or ask at the 'overall' points."}
    )
    order: str = field(default="all", metadata={"help": "'all' compares every pair of a row, 'sort' fewer."})
    max_pairs: int | None = field(
        default=None, metadata={"help": "The most pairs of a prompt at a point, drawn by seed."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the pairs that are drawn, and of the order of sorting."})

    # What it may cost; what earlier runs spent counts
    max_calls: int | None = field(default=None, metadata={"help": "The most answers; 0 asks nothing, but writes."})
    max_tokens: int | None = field(default=None, metadata={"help": "The most tokens, of questions and answers."})
    max_cost: float | None = field(default=None, metadata={"help": "The most to pay, in the unit of the prices."})
    price_per_million_prompt_tokens: float | None = field(default=None, metadata={"help": "Of the questions."})
    price_per_million_completion_tokens: float | None = field(default=None, metadata={"help": "Of the answers."})

    # How
    dry_run: bool = field(default=False, metadata={"help": "Say what would be asked and what it costs; ask nothing."})
    stop_early: bool = field(
        default=True, metadata={"help": "Stop at a judge that nearly always names one position, or is unreadable."}
    )
    ask_again_unreadable: bool = field(
        default=False, metadata={"help": "Ask again what was answered before in a way that could not be read."}
    )
    answers: str | None = field(
        default=None, metadata={"help": "File of the answers, if not in `output_dir`; labellings may share one."}
    )

    def __post_init__(self):
        if isinstance(self.judge, str):
            try:
                self.judge = json.loads(self.judge)
            except (ValueError, RecursionError) as error:  # the text is not shown: it may hold a secret
                raise ValueError(f"`judge`: got text that is no JSON ({error}), need JSON: mend it.") from None
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


FINISHED, UNFINISHED = "labelled.jsonl", "labelled.partial.jsonl"


def label(arguments: LabelArguments) -> Report | None:
    """
    Counts, asks, writes.

    Returns:
        The report, whose `incomplete` says how many rows still lack labels, or `None` after a dry run.

    Raises:
        ValueError: for a mistake in the arguments or in the rows, before anything is asked.
    """
    plan, judge, folder = arguments.plan, judge_from_config(arguments.judge), Path(arguments.output_dir)
    claim = Claim(folder, arguments, judge.identity)
    claim.check()
    if not arguments.dry_run:
        for name in (FINISHED, UNFINISHED, "report.md"):
            check_writable(folder / name, inputs=[arguments.rows])
    store = claim.store if claim.store.exists() or not arguments.dry_run else ":memory:"
    read = partial(iter_rows, arguments.rows, tasks=plan.tasks, split=arguments.split, on_error=arguments.on_error)
    with (
        nullcontext() if arguments.dry_run else held(folder),
        AnswerStore(store, judge.identity, forget_unreadable=arguments.ask_again_unreadable) as answers,
    ):
        labeller = Labeller(read, plan, judge, answers, arguments.budget, stop_early=arguments.stop_early)
        found = LoadReport(arguments.rows)
        estimate = labeller.estimate(partial(read, report=found), tokens=arguments.dry_run)
        if not found.rows:
            raise ValueError(f"{found}. Need rows to ask about: name another file.")
        print(f"{found}\n{estimate.to_text(arguments.prices)}")
        if arguments.dry_run:
            return None
        stopped = labeller.ask(estimate.calls, claim.make)
        try:
            report = labeller.write(folder / UNFINISHED)
            report.failures = judge.failures
            if report.incomplete:
                report.stopped = stopped
            else:
                answers.finish()
                claim.make()
                (folder / UNFINISHED).replace(folder / FINISHED)
            report.save(folder)
        except OSError as error:
            raise ValueError(
                f"{folder}: got a disk that does not take the labels ({error.strerror or error}), need room for them: free some "
                f"space, and run the same command to go on. {f'Asking stopped before: {stopped}. ' if stopped else ''}All answers "
                "are kept."
            ) from error
    return report


class Claim:
    """
    Makes a folder that of one labelling, from its first answer on: a start that failed before claims nothing.

    Attributes:
        store (`Path`): where its answers are.
    """

    def __init__(self, folder: Path, arguments: LabelArguments, identity: dict[str, Any]):
        self.folder, self.path = folder, folder / "settings.json"
        self.store = Path(arguments.answers or folder / "answers.sqlite")
        rows = Path(arguments.rows)
        settings = asdict(arguments.plan) | {
            name: getattr(arguments, name) for name in ("rows", "split", "on_error", "answers")
        }
        settings["sha256 of rows"] = file_digest([rows]) if rows.is_file() else None
        settings |= {f"judge.{name}": value for name, value in identity.items()}
        self.settings = json.loads(json.dumps(settings))

    def check(self) -> None:
        """
        Raises:
            ValueError: if the folder is that of another labelling.
        """
        if not self.path.exists():
            return
        try:
            before = json.loads(self.path.read_text(encoding="utf-8"))
            changed = sorted(
                name for name in before.keys() | self.settings.keys() if before.get(name) != self.settings.get(name)
            )
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: got no settings of a labelling ({error}), need them as they were written: remove the file to go on "
                "with the settings of today."
            ) from error
        if changed:
            raise ValueError(
                f"{self.folder}: got the folder of a labelling with other settings of {changed}, need the same to go on: choose "
                f"another `output_dir`; with `answers: {self.store}` it uses the answers that are there where the questions are "
                "the same."
            )

    def make(self) -> None:
        if not self.path.exists():
            write_json(self.path, self.settings, private=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser((LabelArguments,), prog="dmoerm label", description=__doc__)
    (arguments,) = parser.parse(argv)
    report = label(arguments)
    if report is None:
        return
    print(report.to_markdown())
    if report.incomplete:
        sys.exit(
            f"stopped: {report.stopped}.\n{arguments.output_dir}: every answer that came is kept, and the {report.rows:,} rows "
            f"that are complete are in {UNFINISHED}; {report.incomplete:,} are not. Run the same command to go on."
        )
    print(f"labelled rows: {Path(arguments.output_dir) / FINISHED}")
