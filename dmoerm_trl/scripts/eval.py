"""Print and save the consistency table of a finished training: dmoerm eval --config recipe.yaml"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from ..arguments import Parser
from ..training.recipe import Recipe


@dataclass
class EvalArguments:
    """Options of `dmoerm eval` beside the recipe."""

    rows: str | None = field(default=None, metadata={"help": "Rows to evaluate on; the run's test rows if absent."})
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples of the prompts."})
    judges: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": "Generative baselines: name -> judge, see recipes/LABELLING.md; JSON on the command line."},
    )
    max_rounds: int = field(
        default=1, metadata={"help": "Maximum rounds in which a judge is asked about a pair until both orders agree."}
    )
    max_calls: int | None = field(
        default=None, metadata={"help": "Maximum answers of a judge, earlier ones included."}
    )
    stop_early: bool = field(
        default=True,
        metadata={"help": "Stop if a judge nearly always names one position or gives unreadable answers."},
    )

    def __post_init__(self):
        try:
            self.judges = json.loads(self.judges) if isinstance(self.judges, str) else self.judges or {}
        except (ValueError, RecursionError) as error:  # the text is not shown: it may hold a secret
            raise ValueError(f"`judges`: got text that is not JSON ({error}), need JSON: fix it.") from None
        if not isinstance(self.judges, dict) or not all(
            isinstance(name, str) and isinstance(judge, dict) for name, judge in self.judges.items()
        ):
            raise ValueError(
                f"`judges`: got a {type(self.judges).__name__}, need name -> `kind` and its settings, see recipes/LABELLING.md."
            )


def main(argv: list[str] | None = None) -> None:
    parser = Parser((EvalArguments, Recipe), prog="dmoerm eval", description=__doc__)
    arguments, recipe = parser.parse(argv)

    from ..commands.eval import evaluate
    from ..labelling.judges import JudgeError
    from ..training.pipeline import Pipeline

    run = Pipeline(recipe)
    try:
        print(evaluate(run, **vars(arguments)).to_markdown())
    except JudgeError as error:
        sys.exit(
            f"stopped: {error}\n{run.root / 'consistency.md'} has the methods and the judges before this one. All answers are "
            "kept: run the same command to resume."
        )
