"""Run `dmoerm score`."""

import json
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer

from ..data.formatting import Formatter
from ..data.rows import load_rows
from ..distributed.processes import launched_processes
from ..files import writing
from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.load_errors import loading
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..modeling.quantization import quantization
from ..scoring.describe import describe
from ..scoring.explain import explanation
from ..tasks import TaskTable

if TYPE_CHECKING:
    from ..scripts.score import ScoreArguments


def score(arguments: "ScoreArguments") -> None:
    """Score a response or the rows of a file, and print or write the scores."""
    tasks = TaskTable.load(arguments.tasks)
    processes = launched_processes()
    model, formatter = _load(arguments, processes)
    if arguments.rows is None:
        texts = [([{"role": "user", "content": arguments.prompt}], arguments.response)]
    else:
        rows, report = load_rows(arguments.rows, tasks=tasks)
        if processes.is_main_process:
            print(report, file=sys.stderr)
        if not rows:
            raise ValueError(f"{arguments.rows}: got no rows, need some to score: name another file.")
        texts = [(row.prompt, response) for row in rows for response in row.responses]
    described = describe(model, formatter, texts, processes)
    if processes.is_main_process:
        _write(arguments, texts, described)


def _load(arguments: "ScoreArguments", processes: PartialState) -> tuple[DMoERMForSequenceClassification, Formatter]:
    computing = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    quantised = quantization(arguments.load_in_4bit, arguments.load_in_8bit, computing)
    with loading(arguments.model, "a DMoERM", DMoERMConfig.model_type):
        model = DMoERMForSequenceClassification.from_pretrained(
            arguments.model,
            dtype=arguments.dtype,
            device_map=processes.device,
            resident_tasks=arguments.resident_tasks,
            quantization_config=quantised,
        )
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    return model, Formatter.for_model(model.config, tokenizer, arguments.max_length)


def _write(arguments: "ScoreArguments", texts: list[tuple[list[dict], str]], described: list[dict[str, Any]]) -> None:
    if arguments.explain:
        for (prompt, response), scores in zip(texts, described, strict=True):
            print(explanation(prompt[-1]["content"], response, **scores))
        return
    with nullcontext(sys.stdout) if arguments.output is None else writing(arguments.output) as file:
        for (prompt, response), scores in zip(texts, described, strict=True):
            line = {"prompt": prompt, "response": response, **scores}
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
