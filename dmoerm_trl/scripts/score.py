"""`dmoerm score --model DIR`: scores one response, or all of a file of rows, and explains scores point by point."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, HfArgumentParser

from ..data.formatting import Formatter
from ..data.rows import load_rows
from ..evaluation.explain import explanation
from ..evaluation.scoring import score_one
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
    explain: bool = field(default=False, metadata={"help": "Print the explanation instead of JSON."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of prompt and response; older turns are cut."})


def describe(
    model: DMoERMForSequenceClassification, formatter: Formatter, prompt: Any, response: str
) -> dict[str, Any]:
    """Reward, route, the router's probabilities and the capability scores of one response, as plain numbers."""
    output = score_one(model, formatter.encode(prompt, response))
    tasks = list(model.config.tasks)
    route = tasks[int(output.route)]
    return {
        "reward": float(output.logits),
        "route": route,
        "route_probabilities": dict(zip(tasks, output.route_probabilities[0].tolist(), strict=True)),
        "capability_scores": {point: float(output.capability_scores[point]) for point in model.config.tasks[route]},
    }


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScoreArguments,), prog="dmoerm score", description=__doc__)
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    one = arguments.prompt is not None and arguments.response is not None
    if one == (arguments.rows is not None):
        parser.error("got neither or both, need either --prompt and --response, or --rows.")
    model = DMoERMForSequenceClassification.from_pretrained(arguments.model)
    formatter = Formatter(AutoTokenizer.from_pretrained(arguments.model), arguments.max_length)
    if one:
        texts = [([{"role": "user", "content": arguments.prompt}], arguments.response)]
    else:
        rows, report = load_rows(arguments.rows, tasks=TaskTable.load(arguments.tasks))
        print(report, file=sys.stderr)
        texts = [(row.prompt, response) for row in rows for response in row.responses]
    lines = []
    for prompt, response in texts:
        scores = describe(model, formatter, prompt, response)
        if arguments.explain:
            print(explanation(prompt[-1]["content"], response, **scores))
        else:
            lines.append(json.dumps({"prompt": prompt, "response": response, **scores}, ensure_ascii=False))
    if arguments.output is not None:
        Path(arguments.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif lines:
        print("\n".join(lines))
