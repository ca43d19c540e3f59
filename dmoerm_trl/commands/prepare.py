"""Run `dmoerm prepare`."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from transformers import AutoTokenizer

from ..data.formatting import Formatter
from ..data.preference_row import PreferenceRow, RowError, check_row
from ..data.prepare.audit import PartAudit, can_tell_languages, language_of, save_report
from ..data.prepare.preparation import Preparation
from ..data.prepare.reading import open_set
from ..data.prepare.sets import SETS
from ..data.rows import LoadReport, parse_row, records_of, write_rows
from ..files import check_writable, write_text
from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.load_errors import loading
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..scoring.batch import route_encodings
from ..tasks import TaskTable

if TYPE_CHECKING:
    from ..scripts.prepare import PrepareArguments


def prepare(arguments: "PrepareArguments") -> dict[str, PartAudit]:
    """
    Write the rows of each split, their task table if the set brings its own capability points, and the report.

    Returns:
        Split -> audit of its rows.
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


def _preparation(arguments: "PrepareArguments", report: LoadReport) -> Preparation:
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
    """Yield the rows of a prepared file."""
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
    """Return a function that gives the task to which the router of a DMoERM sends each prompt."""
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
