"""`dmoerm prepare --config prepare.yaml`: a public preference set as rows for training, with a report of what is in them."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer

from ..arguments import Parser
from ..data.formatting import Formatter
from ..data.preference_row import PreferenceRow, RowError, check_row
from ..data.prepare.audit import PartAudit, can_tell_languages, language_of, save_report
from ..data.prepare.preparation import Preparation
from ..data.prepare.reading import open_set
from ..data.prepare.sets import SETS
from ..data.rows import LoadReport, parse_row, records_of, write_rows
from ..evaluation.scoring import route_encodings
from ..files import check_writable, write_text
from ..modeling.configuration import DMoERMConfig
from ..modeling.loading import loading
from ..modeling.modeling import DMoERMForSequenceClassification
from ..tasks import TaskTable


@dataclass
class PrepareArguments:
    """What `dmoerm prepare` reads, from a YAML file or the command line; recipes/PREPARE.md."""

    dataset: str = field(metadata={"help": f"Which set it is, one of {', '.join(SETS)}."})
    source: str = field(metadata={"help": "A file, a folder, or the name of a dataset on the hub."})
    output: str = field(metadata={"help": "JSONL file for the rows; its report and its task table lie beside it."})

    # Reading
    split: list[str] = field(
        default_factory=lambda: ["train"], metadata={"help": "Splits; of several, each gets a file <output>-<split>."}
    )
    name: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the hub."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the dataset on the hub."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the dataset on the hub."})
    max_rows: int | None = field(default=None, metadata={"help": "Rows of a split to write; all if absent."})
    columns: dict[str, str] | str | None = field(
        default_factory=dict, metadata={"help": "Column as the set has it -> what it is called in this source."}
    )
    where: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Column -> value, or list of values, of the examples to take."}
    )

    # Labels
    tie_margin: float | None = field(
        default=None,
        metadata={
            "help": "Scores that differ by no more are ties; 0. One number for overall scores and ratings alike."
        },
    )
    min_score_ratio: float | None = field(default=None, metadata={"help": "shp: the least score ratio to take; 1."})
    annotators_agree: bool | None = field(
        default=None, metadata={"help": "helpsteer3: only pairs whose annotators are all on one side."}
    )
    aspects: list[str] | None = field(
        default=None, metadata={"help": "scored, table: columns of ratings, one a capability point."}
    )

    # Tasks and capability points
    tasks: str | None = field(
        default=None,
        metadata={"help": "'paper', 'paper-zh', or a YAML file that the rows must fit; else one is made of the rows."},
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
        default=False, metadata={"help": "Leave out rows that look as if they held personal data."}
    )
    phone_region: str | None = field(
        default="US", metadata={"help": "Country in whose way phone numbers without a country code are read."}
    )
    against: list[str] | None = field(
        default=None, metadata={"help": "Prepared JSONL files whose prompts are compared with these."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Hub name or folder; counts tokens for the report."})
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
        """The set's options that are given."""
        names = ("tie_margin", "min_score_ratio", "annotators_agree", "aspects")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def path(self, split: str) -> Path:
        """Where the rows of a split go."""
        path = Path(self.output)
        return path if len(self.split) == 1 else path.with_stem(f"{path.stem}-{split}")


def prepare(arguments: PrepareArguments) -> dict[str, PartAudit]:
    """
    Writes the rows of each split, their task table if the set brings its own capability points, and the report.

    Returns:
        Split -> what is in its rows.
    """
    output, report = Path(arguments.output), LoadReport(arguments.source)
    preparation = _preparation(arguments, report)
    tokens = None if arguments.tokenizer is None else _token_counter(arguments.tokenizer)
    against = {path: Counter(row.prompt_id for row in _written(path)) for path in arguments.against or ()}
    for split in arguments.split:
        check_writable(arguments.path(split), inputs=[arguments.source, arguments.tasks, *against])
    audits: dict[str, PartAudit] = {}
    for split in arguments.split:
        audits[split] = PartAudit(tokens, language_of if can_tell_languages() else None)
        dataset = open_set(
            arguments.source,
            split,
            name=arguments.name,
            data_dir=arguments.data_dir,
            revision=arguments.revision,
            streaming=preparation.preference_set.consecutive,
        )
        rows = preparation.rows(dataset, audits[split], split=split, source=arguments.source)
        write_rows(islice(rows, arguments.max_rows), arguments.path(split))
    table = preparation.table([task for audit in audits.values() for task in audit.tasks])
    if table is not None:
        tasks = {task: list(points) for task, points in table.tasks.items()}
        text = yaml.safe_dump({"tasks": tasks, "overall": list(table.overall)}, allow_unicode=True, sort_keys=False)
        write_text(output.with_suffix(".tasks.yaml"), text)
    save_report(audits, against, output.with_suffix(".report"))
    for remark in report.remarks:
        print(f"{arguments.source}: {remark}")
    return audits


def _preparation(arguments: PrepareArguments, report: LoadReport) -> Preparation:
    tasks = None if arguments.tasks is None else TaskTable.load(arguments.tasks)
    route = None if arguments.router is None else _router(arguments.router, tasks)
    preference_set, options = SETS[arguments.dataset], arguments.options
    options |= {
        name: value for name, value in (("tasks", tasks), ("report", report)) if name in preference_set.options
    }
    return Preparation(
        preference_set.with_options(options),
        columns=arguments.columns,
        tasks=tasks,
        task=arguments.task,
        task_column=arguments.task_column,
        task_names=arguments.task_names,
        route=route,
        points=arguments.points,
        where=arguments.where,
        drop_personal_data=arguments.drop_personal_data,
        phone_region=arguments.phone_region,
    )


def _token_counter(tokenizer: str) -> Callable[[PreferenceRow], list[int]]:
    with loading(tokenizer, "a tokenizer", config=False):
        formatter = Formatter(AutoTokenizer.from_pretrained(tokenizer), sys.maxsize)
    return lambda row: [len(encoding.input_ids) for encoding in formatter.encode_responses(row.prompt, row.responses)]


def _written(path: str | Path) -> Iterator[PreferenceRow]:
    """The rows of a file that was prepared, one by one."""
    for place, raw in records_of(path):
        try:
            row = parse_row(raw, TaskTable.paper(), LoadReport(str(path)))
            check_row(row)
        except RowError as error:
            raise ValueError(
                f"{place}: got no row as `dmoerm prepare` writes it ({error}), need a prepared file: prepare it first."
            ) from error
        yield row


def _router(source: str, table: TaskTable | None) -> Callable[[Sequence[list[dict]]], list[str]]:
    """Prompts -> the task that the router of a DMoERM sends each to."""
    with loading(source, "a DMoERM", DMoERMConfig.model_type):
        model = DMoERMForSequenceClassification.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    tasks = list(model.config.tasks)
    if table is not None and (unknown := [task for task in tasks if task not in table.tasks]):
        raise ValueError(
            f"`router`: got {source}, whose tasks {unknown} `tasks` does not have, need some of {list(table.tasks)} because "
            "rows get them: give `tasks` the table that it was trained with."
        )
    formatter = Formatter.for_model(model.config, tokenizer, tokenizer.model_max_length)
    if model.model.router is not None:
        model.model.router.to("cuda" if torch.cuda.is_available() else "cpu")

    def route(prompts: Sequence[list[dict]]) -> list[str]:
        encodings = [formatter.encode(prompt, "") for prompt in prompts]
        routes = route_encodings(model, encodings, pad_token_id=tokenizer.pad_token_id)
        return [tasks[index] for index in routes.argmax(1).tolist()]

    return route


def main(argv: list[str] | None = None) -> None:
    parser = Parser((PrepareArguments,), prog="dmoerm prepare", description=__doc__)
    (arguments,) = parser.parse(argv)
    for split, audit in prepare(arguments).items():
        reasons = ", ".join(f"{reason}: {count}" for reason, count in audit.skipped.most_common())
        print(f"{arguments.path(split)}: {audit.rows} rows; {audit.skipped.total()} skipped ({reasons or 'none'})")
        for example in audit.examples.values():
            print(f"  such as {example}")
    print(f"report: {Path(arguments.output).with_suffix('.report.md')}")
