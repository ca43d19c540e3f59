"""`dmoerm score --model DIR`: scores one response, or all of a file of rows, and explains scores point by point."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, HfArgumentParser

from ..data.formatting import Formatter
from ..data.rows import load_rows
from ..evaluation.explain import explanation
from ..evaluation.scoring import map_encodings
from ..modeling.modeling import DMoERMForSequenceClassification
from ..tasks import TaskTable


@dataclass
class ScoreArguments:
    """What `dmoerm score` reads: a prompt and a response, or a file of rows."""

    model: str = field(metadata={"help": "Folder or hub name of a DMoERM."})
    prompt: str | None = field(default=None, metadata={"help": "A prompt, one turn of the user."})
    response: str | None = field(default=None, metadata={"help": "The response to it."})
    rows: str | None = field(default=None, metadata={"help": "Preference rows, see recipes/DATA.md."})
    tasks: str = field(default="paper", metadata={"help": "The rows' tasks: 'paper', 'paper-zh', or a YAML file."})
    output: str | None = field(default=None, metadata={"help": "JSONL file for the scores; printed if absent."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the bases: the checkpoint's, 'float32' or 'bfloat16'; heads stay in fp32."},
    )
    explain: bool = field(default=False, metadata={"help": "Print the explanation instead of JSON."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of prompt and response; older turns are cut."})


def describe(
    model: DMoERMForSequenceClassification, formatter: Formatter, texts: Sequence[tuple[list[dict], str]]
) -> list[dict[str, Any]]:
    """Reward, route, the router's probabilities and the capability scores of prompts with responses, as plain numbers."""
    model.eval()
    tasks = list(model.config.tasks)

    def columns(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        output = model(input_ids, attention_mask, prompt_lengths=prompt_lengths)
        points.update(output.capability_scores or {})
        columns = [output.logits[:, 0], output.route, *output.route_probabilities.unbind(1), *points.values()]
        return torch.stack([column.float() for column in columns], 1)

    points: dict[str, Tensor] = {}
    encodings = [formatter.encode(prompt, response) for prompt, response in texts]
    table = map_encodings(columns, encodings, pad_token_id=formatter.tokenizer.pad_token_id, device=model.device)
    described = []
    for reward, route, *rest in table.tolist():
        task, scores = tasks[int(route)], dict(zip(points, rest[len(tasks) :], strict=True))
        described.append(
            {
                "reward": reward,
                "route": task,
                "route_probabilities": dict(zip(tasks, rest, strict=False)),
                "capability_scores": {point: scores[point] for point in model.config.tasks[task]},
            }
        )
    return described


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScoreArguments,), prog="dmoerm score", description=__doc__)
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    one = arguments.prompt is not None and arguments.response is not None
    if one == (arguments.rows is not None):
        parser.error("got neither or both, need either --prompt and --response, or --rows.")
    model = DMoERMForSequenceClassification.from_pretrained(arguments.model, dtype=arguments.dtype)
    formatter = Formatter(AutoTokenizer.from_pretrained(arguments.model), arguments.max_length)
    if one:
        texts = [([{"role": "user", "content": arguments.prompt}], arguments.response)]
    else:
        rows, report = load_rows(arguments.rows, tasks=TaskTable.load(arguments.tasks))
        print(report, file=sys.stderr)
        texts = [(row.prompt, response) for row in rows for response in row.responses]
    lines = []
    for (prompt, response), scores in zip(texts, describe(model, formatter, texts), strict=True):
        if arguments.explain:
            print(explanation(prompt[-1]["content"], response, **scores))
        else:
            lines.append(json.dumps({"prompt": prompt, "response": response, **scores}, ensure_ascii=False))
    if arguments.output is not None:
        Path(arguments.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif lines:
        print("\n".join(lines))
