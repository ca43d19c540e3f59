"""
Export a part of a DMoERM: dmoerm export --model DIR --what reward_model --output DIR

- `reward_model`: a task's base as phase 1 left it, or a baseline, as an ordinary `<Arch>ForSequenceClassification`, which vLLM,
  TEI and RewardBench load without this package;
- `experts`: the same, and each expert (or that of `--point`) as a PEFT adapter of it;
- `inner_model`: one task's base, experts and aggregator, as a DMoERM without a router.
"""

from dataclasses import dataclass, field
from typing import Literal

from ..arguments import Parser


@dataclass
class ExportArguments:
    """Options of `dmoerm export`."""

    model: str = field(metadata={"help": "Folder or hub name of a DMoERM, a phase-1 model or a baseline."})
    output: str = field(metadata={"help": "Folder to write; it must be new or empty."})
    what: Literal["reward_model", "experts", "inner_model"] = field(metadata={"help": "What to export."})
    task: str | None = field(default=None, metadata={"help": "Task to export; needed if the model has several."})
    point: str | None = field(default=None, metadata={"help": "experts: the only capability point to export."})
    pad_token: str | None = field(
        default=None, metadata={"help": "Padding token of the exported tokenizer, if its own also ends turns."}
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser((ExportArguments,), prog="dmoerm export", description=__doc__)
    (arguments,) = parser.parse(argv)

    from ..commands.export import export

    export(arguments)
