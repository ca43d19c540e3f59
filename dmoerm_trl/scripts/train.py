"""`dmoerm train --config recipe.yaml`: preference rows in, a DMoERM and its baselines out; it goes on after a kill."""

from pathlib import Path

from accelerate import PartialState

from ..arguments import Parser
from ..evaluation.curves import plot_accuracy_curves
from ..training.distributed import is_main
from ..training.pipeline import Pipeline
from ..training.recipe import Recipe


def train(recipe: Recipe) -> Pipeline:
    """Runs what is not done of a recipe; the main process prints the data's report and draws the accuracy curves (figure 4)."""
    run = Pipeline(recipe)
    run.run()
    if not is_main():
        return run
    print((run.root / "data" / "report.txt").read_text(encoding="utf-8"), end="")
    histories = {
        name.replace("/experts/", ": ").replace("/", " ").replace("_", " "): run.history(name)
        for name in run.trainings
    }
    path = plot_accuracy_curves(histories, Path(recipe.output_dir) / "accuracy_curves.png")
    print(f"accuracy curves: {path}\nmodel: {run.root / 'model'}")
    return run


def main(argv: list[str] | None = None) -> None:
    parser = Parser((Recipe,), prog="dmoerm train", description=__doc__)
    (recipe,) = parser.parse(argv)
    train(recipe)
    PartialState().destroy_process_group()
