"""
Measure best of n of several reward models (figure 5, left, and table 11): `dmoerm best-of-n` as a script to copy and change.

    python examples/bon_eval.py --config recipes/demo/bon.yaml
"""

from dmoerm_trl import run  # imported first, to silence the libraries

# isort: split
from dmoerm_trl import BestOfNArguments, Parser, launched_processes, run_best_of_n


def main(argv: list[str] | None = None) -> None:
    (arguments,) = Parser((BestOfNArguments,), prog="bon_eval.py", description=__doc__).parse(argv)
    rows, processes = arguments.rows, launched_processes()
    result = run_best_of_n(
        arguments.output_dir,
        rows,
        arguments.sampler,
        arguments.reward_models,
        arguments.gold,
        **arguments.settings,
        processes=processes,
    )
    if processes.is_main_process:
        print(result, f"table: {result.save(arguments.output_dir) / 'best_of_n.md'}", sep="\n")


if __name__ == "__main__":
    run(main)
