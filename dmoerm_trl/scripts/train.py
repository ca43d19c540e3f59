"""Train a DMoERM and its baselines from preference rows, or resume a killed training: dmoerm train --config recipe.yaml"""

from ..arguments import Parser
from ..training.recipe import Recipe


def main(argv: list[str] | None = None) -> None:
    (recipe,) = Parser((Recipe,), prog="dmoerm train", description=__doc__).parse(argv)

    from ..commands.train import train

    train(recipe)
