"""Run `dmoerm train`."""

from pathlib import Path

from ..distributed.processes import is_main
from ..evaluation.accuracy_curves import plot_accuracy_curves
from ..training.pipeline import Pipeline
from ..training.recipe import Recipe


def train(recipe: Recipe) -> Pipeline:
    """Run the unfinished stages of a recipe, print the data report, and plot the accuracy curves (figure 4)."""
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
