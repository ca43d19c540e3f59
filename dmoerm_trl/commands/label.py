"""Run `dmoerm label`."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.rows import LoadReport, iter_rows
from ..files import as_json, changed_keys, check_writable, file_digest, locked_folder, write_json
from ..labelling.answer_store import AnswerStore
from ..labelling.judges import judge_from_config
from ..labelling.labeller import Labeller
from ..labelling.report import Report

if TYPE_CHECKING:
    from ..scripts.label import LabelArguments

FINISHED, UNFINISHED = "labelled.jsonl", "labelled.partial.jsonl"


def label(arguments: "LabelArguments") -> Report | None:
    """
    Count the questions, ask the judge, and write the labelled rows.

    Returns:
        The report, whose `incomplete` is the number of rows that still lack labels, or `None` after a dry run.

    Raises:
        ValueError: If the arguments or the rows are wrong, before anything is asked.
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
        nullcontext() if arguments.dry_run else locked_folder(folder),
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
                f"{folder}: got labels that cannot be written ({error.strerror or error}), need room for them: free some space, "
                f"and run the same command to resume. {f'Asking stopped before: {stopped}. ' if stopped else ''}All answers are "
                "kept."
            ) from error
    return report


class Claim:
    """
    Record of the settings of a labelling, which claims its folder. It is written with the first answer, so that a start that
    fails earlier claims nothing.

    Attributes:
        store (`Path`): The file of the answers.
    """

    def __init__(self, folder: Path, arguments: "LabelArguments", identity: dict[str, Any]):
        self.folder, self.path = folder, folder / "settings.json"
        self.store = Path(arguments.answers or folder / "answers.sqlite")
        rows = Path(arguments.rows)
        settings = asdict(arguments.plan) | {
            name: getattr(arguments, name) for name in ("rows", "split", "on_error", "answers")
        }
        settings["sha256 of rows"] = file_digest([rows]) if rows.is_file() else None
        settings |= {f"judge.{name}": value for name, value in identity.items()}
        self.settings = as_json(settings)

    def check(self) -> None:
        """
        Check that the folder is new or belongs to the same labelling.

        Raises:
            ValueError: If the folder belongs to another labelling.
        """
        if not self.path.exists():
            return
        try:
            changed = changed_keys(json.loads(self.path.read_text(encoding="utf-8")), self.settings)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: got no settings of a labelling ({error}), need them as they were written: remove the file to go "
                "on with the current settings."
            ) from error
        if changed:
            raise ValueError(
                f"{self.folder}: got the folder of a labelling with other settings of {changed}, need the same to go on: "
                f"choose another `output_dir`; with `answers: {self.store}` it uses the existing answers where the questions are "
                "the same."
            )

    def make(self) -> None:
        if not self.path.exists():
            write_json(self.path, self.settings, private=True)
