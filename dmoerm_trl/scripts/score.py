"""
`dmoerm score --model DIR`: scores one response, or all of a file of rows, and explains scores point by point. On several GPUs or
machines the rows are shared: `accelerate launch -m dmoerm_trl.cli score --model DIR --rows FILE --output FILE`.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import AutoTokenizer

from ..arguments import Parser
from ..data.formatting import Formatter
from ..data.rows import load_rows
from ..evaluation.explain import explanation
from ..evaluation.scoring import points_of, route_encodings, score_capabilities
from ..files import check_writable, writing
from ..modeling.configuration import DMoERMConfig
from ..modeling.loading import loading
from ..modeling.modeling import DMoERMForSequenceClassification
from ..modeling.quantised import quantization
from ..tasks import TaskTable
from ..workers import launched_processes


@dataclass
class ScoreArguments:
    """What `dmoerm score` reads: a prompt and a response, or a file of rows."""

    model: str = field(metadata={"help": "Folder or hub name of a DMoERM."})
    prompt: str | None = field(default=None, metadata={"help": "A prompt, one turn of the user."})
    response: str | None = field(default=None, metadata={"help": "The response to it."})
    rows: str | None = field(default=None, metadata={"help": "Preference rows, see recipes/DATA.md."})
    tasks: str = field(default="paper", metadata={"help": "The rows' tasks: 'paper', 'paper-zh', or a YAML file."})
    output: str | None = field(default=None, metadata={"help": "JSONL file for the scores; printed if absent."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Of the bases: the checkpoint's, 'float32' or 'bfloat16'; heads stay in fp32."},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantise the bases to 8 bits (LLM.int8); needs bitsandbytes."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Quantise the bases to 4 bits (NF4); needs bitsandbytes, computes in `dtype` or fp32."},
    )
    resident_tasks: int | None = field(
        default=None,
        metadata={
            "help": "Tasks whose bases are in memory at a time; the others are read when needed. All if absent."
        },
    )
    explain: bool = field(default=False, metadata={"help": "Print the explanation instead of JSON."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of prompt and response; older turns are cut."})


def describe(
    model: DMoERMForSequenceClassification,
    formatter: Formatter,
    texts: Sequence[tuple[list[dict], str]],
    processes: PartialState | None = None,
) -> list[dict[str, Any]]:
    """
    Reward, route, the router's probabilities and the capability scores of prompts with responses, as plain numbers.

    Args:
        processes (`PartialState`, *optional*): those that share the work; each gets all that is described.
    """
    formatter.check_model(model.config)
    tasks = list(model.config.tasks)
    encodings = [formatter.encode(prompt, response) for prompt, response in texts]
    if cut := sum(encoding.cut_turns > 0 for encoding in encodings):
        warnings.warn(
            f"for {cut} of {len(encodings)} responses, the prompt lost its oldest part to fit into "
            f"max_length={formatter.max_length}.",
            stacklevel=2,
        )
    pad_token_id = formatter.tokenizer.pad_token_id
    probabilities = route_encodings(model, encodings, pad_token_id=pad_token_id)
    found = score_capabilities(
        model,
        encodings,
        pad_token_id=pad_token_id,
        responses=[response for _, response in texts],
        groups=probabilities.argmax(1).tolist(),
        processes=processes,
    )
    points = points_of(model)
    described = []
    for reward, route, of_points, of_tasks in zip(
        *(values.tolist() for values in (*found, probabilities)), strict=True
    ):
        task, scores = tasks[route], dict(zip(points, of_points, strict=True))
        described.append(
            {
                "reward": reward,
                "route": task,
                "route_probabilities": dict(zip(tasks, of_tasks, strict=True)),
                "capability_scores": {point: scores[point] for point in model.config.tasks[task]},
            }
        )
    return described


def main(argv: list[str] | None = None) -> None:
    parser = Parser((ScoreArguments,), prog="dmoerm score", description=__doc__)
    (arguments,) = parser.parse(argv)
    one = arguments.prompt is not None and arguments.response is not None
    if one == (arguments.rows is not None) or (arguments.prompt is None) != (arguments.response is None):
        parser.error("got neither or both, need either --prompt and --response, or --rows")
    if arguments.explain and arguments.output is not None:
        parser.error("got --explain and --output, need one of them, because explanations are printed: leave one out")
    if arguments.output is not None:
        check_writable(arguments.output, inputs=[arguments.rows, arguments.tasks])
    if one:
        try:  # in a locale that is not UTF-8 the bytes of an option stand in its text
            prompt, response = (os.fsencode(text).decode() for text in (arguments.prompt, arguments.response))
        except UnicodeError as error:
            parser.error(f"got a prompt or a response that is not UTF-8 ({error}), need text")
    tasks = TaskTable.load(arguments.tasks)
    processes = launched_processes()
    model, formatter = _load(arguments, processes)
    if one:
        texts = [([{"role": "user", "content": prompt}], response)]
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
    processes.destroy_process_group()


def _load(arguments: ScoreArguments, processes: PartialState) -> tuple[DMoERMForSequenceClassification, Formatter]:
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


def _write(arguments: ScoreArguments, texts: list[tuple[list[dict], str]], described: list[dict[str, Any]]) -> None:
    if arguments.explain:
        for (prompt, response), scores in zip(texts, described, strict=True):
            print(explanation(prompt[-1]["content"], response, **scores))
        return
    with nullcontext(sys.stdout) if arguments.output is None else writing(arguments.output) as file:
        for (prompt, response), scores in zip(texts, described, strict=True):
            line = {"prompt": prompt, "response": response, **scores}
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
