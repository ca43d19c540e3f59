"""Convert a public preference set to training rows, with a report: dmoerm prepare --config prepare.yaml"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..data.prepare.sets import SETS


@dataclass
class PrepareArguments:
    """Options of `dmoerm prepare`; see recipes/PREPARE.md."""

    dataset: str = field(metadata={"help": f"Format of the set, one of {', '.join(SETS)}."})
    source: str = field(metadata={"help": "A file, a folder, or the name of a dataset on the hub."})
    output: str = field(
        metadata={"help": "JSONL file for the rows; the report and the task table are written beside it."}
    )

    # Reading
    split: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={"help": "Splits; if there are several, each gets a file <output>-<split>."},
    )
    name: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the hub."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the dataset on the hub."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the dataset on the hub."})
    max_rows: int | None = field(default=None, metadata={"help": "Rows of a split to write; all if absent."})
    columns: dict[str, str] | str | None = field(
        default_factory=dict, metadata={"help": "Standard name of a column -> its name in this source."}
    )
    where: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Column -> value, or list of values, of the examples to keep."}
    )

    # Labels
    tie_margin: float | None = field(
        default=None,
        metadata={
            "help": "Maximum difference of tied scores; default 0. It is the same for overall scores and ratings."
        },
    )
    min_score_ratio: float | None = field(default=None, metadata={"help": "shp: minimum score ratio; default 1."})
    annotators_agree: bool | None = field(
        default=None, metadata={"help": "helpsteer3: keep only pairs on which all annotators agree."}
    )
    aspects: list[str] | None = field(
        default=None, metadata={"help": "scored, table: columns of ratings, one per capability point."}
    )

    # Tasks and capability points
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "'paper', 'paper-zh', or a YAML file that the rows must fit; built from the rows if absent."
        },
    )
    task: str | None = field(default=None, metadata={"help": "Task of the rows that have none."})
    task_column: str | None = field(default=None, metadata={"help": "Column that holds the task."})
    task_names: dict[str, str] | str | None = field(
        default_factory=dict, metadata={"help": "Value of `task_column` -> task; others stay as they are."}
    )
    points: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": "The set's capability point -> name to write, or null to leave it out."},
    )

    # Personal data and the report
    drop_personal_data: bool = field(
        default=False, metadata={"help": "Leave out rows that seem to contain personal data."}
    )
    phone_region: str | None = field(
        default="US", metadata={"help": "Country whose format is assumed for phone numbers without a country code."}
    )
    against: list[str] | None = field(
        default=None, metadata={"help": "Prepared JSONL files whose prompts are compared with these."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a tokenizer that counts tokens for the report."}
    )
    router: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or folder of a DMoERM: its router gives a task to the rows that have none; not with `task`."
        },
    )

    def __post_init__(self):
        for name in ("columns", "where", "task_names", "points"):
            value = getattr(self, name)
            try:  # on the command line they are JSON
                setattr(self, name, json.loads(value) if isinstance(value, str) else value or {})
            except json.JSONDecodeError as error:
                raise ValueError(f"`{name}`: got {value!r}, need JSON: {error}.") from error
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"`{name}`: got {value!r}, need names and values: write a mapping.")
        if isinstance(self.split, str):
            self.split = [self.split]
        if self.dataset not in SETS:
            raise ValueError(f"`dataset`: got {self.dataset!r}, need one of {', '.join(SETS)}.")
        if len(self.split) > 1 and Path(self.source).is_file():
            raise ValueError(
                f"`split`: got {self.split} of the file {self.source}, need one because a file has one: give a folder, or "
                "prepare each file and name the others in `against`."
            )
        if self.task is not None and self.router is not None:
            raise ValueError(
                f"got `task: {self.task}` and `router: {self.router}`, need one of them because each gives a task to the rows "
                "without one: leave the other out."
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"`max_rows`: got {self.max_rows}, need at least 1.")

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the set that are given."""
        names = ("tie_margin", "min_score_ratio", "annotators_agree", "aspects")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def path(self, split: str) -> Path:
        """Return the file for the rows of a split."""
        path = Path(self.output)
        return path if len(self.split) == 1 else path.with_stem(f"{path.stem}-{split}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser((PrepareArguments,), prog="dmoerm prepare", description=__doc__)
    (arguments,) = parser.parse(argv)

    from ..commands.prepare import prepare

    for split, audit in prepare(arguments).items():
        reasons = ", ".join(f"{reason}: {count}" for reason, count in audit.skipped.most_common())
        print(f"{arguments.path(split)}: {audit.rows} rows; {audit.skipped.total()} skipped ({reasons or 'none'})")
        for example in audit.examples.values():
            print(f"  such as {example}")
    print(f"report: {Path(arguments.output).with_suffix('.report.md')}")
