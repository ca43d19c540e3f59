"""`dmoerm eval --config recipe.yaml`: prints and saves the consistency table of a finished training."""

from dataclasses import dataclass, field

from trl import TrlParser

from ..data.rows import load_rows
from ..evaluation.methods import method_scores
from ..evaluation.table import Table, consistency_table
from ..training.pipeline import Pipeline
from ..training.recipe import Recipe


@dataclass
class EvalArguments:
    """What `dmoerm eval` reads beside the recipe."""

    rows: str | None = field(default=None, metadata={"help": "Rows to evaluate on; the run's test rows if absent."})
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples of the prompts."})


def evaluate(run: Pipeline, rows: str | None = None, resamples: int = 1000) -> Table:
    """The consistency table of a finished training, saved as `consistency.md` and `consistency.json` in its folder."""
    if not run.finished:
        raise FileNotFoundError(
            f"{run.root}: the training is not finished, need its models: run `dmoerm train` first."
        )
    if rows is None:
        evaluated = run.rows("test")
    else:
        evaluated, report = load_rows(rows, tasks=run.tasks, on_error=run.recipe.on_error)
        print(report)
    table = consistency_table(method_scores(run, evaluated), evaluated, list(run.tasks.tasks), resamples=resamples)
    table.save(run.root / "consistency")
    return table


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((EvalArguments, Recipe), prog="dmoerm eval", description=__doc__)
    arguments, recipe = parser.parse_args_and_config(argv, fail_with_unknown_args=True)
    print(evaluate(Pipeline(recipe), arguments.rows, arguments.resamples).to_markdown())
