"""
Measure best of n against several reward models: figure 5 (left) and table 11 of the paper.

    dmoerm best-of-n --config recipes/demo/bon.yaml

A killed run resumes when it is started again. Every key is an option too: --n 6000 --output_dir runs/bon_6000
Several GPUs share the responses and give the same files: accelerate launch -m dmoerm_trl.cli best-of-n --config ...
"""

from ..arguments import Parser
from ..evaluation.best_of_n_arguments import BestOfNArguments


def main(argv: list[str] | None = None) -> None:
    (arguments,) = Parser((BestOfNArguments,), prog="dmoerm best-of-n", description=__doc__).parse(argv)

    from ..commands.best_of_n import measure_best_of_n

    measure_best_of_n(arguments)
