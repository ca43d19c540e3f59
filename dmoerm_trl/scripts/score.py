"""
Score one response or all rows of a file, and explain scores by capability point: dmoerm score --model DIR

Several GPUs or machines share the rows: accelerate launch -m dmoerm_trl.cli score --model DIR --rows FILE --output FILE
"""

import os
from dataclasses import dataclass, field
from typing import Literal

from ..arguments import Parser


@dataclass
class ScoreArguments:
    """Options of `dmoerm score`: a prompt and a response, or a file of rows."""

    model: str = field(metadata={"help": "Folder or hub name of a DMoERM."})
    prompt: str | None = field(default=None, metadata={"help": "A prompt, one turn of the user."})
    response: str | None = field(default=None, metadata={"help": "The response to it."})
    rows: str | None = field(default=None, metadata={"help": "Preference rows, see recipes/DATA.md."})
    tasks: str = field(default="paper", metadata={"help": "The rows' tasks: 'paper', 'paper-zh', or a YAML file."})
    output: str | None = field(default=None, metadata={"help": "JSONL file for the scores; printed if absent."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Dtype of the bases: the checkpoint's, 'float32' or 'bfloat16'; heads stay in fp32."},
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
        metadata={"help": "Maximum number of tasks' bases in memory at a time; all by default."},
    )
    explain: bool = field(default=False, metadata={"help": "Print the explanation instead of JSON."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of prompt and response; older turns are cut."})


def main(argv: list[str] | None = None) -> None:
    parser = Parser((ScoreArguments,), prog="dmoerm score", description=__doc__)
    (arguments,) = parser.parse(argv)
    one = arguments.prompt is not None and arguments.response is not None
    if one == (arguments.rows is not None) or (arguments.prompt is None) != (arguments.response is None):
        parser.error("got neither or both, need either --prompt and --response, or --rows")
    if arguments.explain and arguments.output is not None:
        parser.error("got --explain and --output, need one of them, because explanations are printed: leave one out")

    from ..commands.score import score
    from ..files import check_writable

    if arguments.output is not None:
        check_writable(arguments.output, inputs=[arguments.rows, arguments.tasks])
    if one:
        try:  # in a locale that is not UTF-8 the bytes of an option stand in its text
            arguments.prompt, arguments.response = (
                os.fsencode(text).decode() for text in (arguments.prompt, arguments.response)
            )
        except UnicodeError as error:
            parser.error(f"got a prompt or a response that is not UTF-8 ({error}), need text")
    score(arguments)
