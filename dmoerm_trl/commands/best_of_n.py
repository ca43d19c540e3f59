"""Run `dmoerm best-of-n`."""

from ..distributed.processes import launched_processes
from ..evaluation.best_of_n import run_best_of_n
from ..evaluation.best_of_n_arguments import BestOfNArguments


def measure_best_of_n(arguments: BestOfNArguments) -> None:
    """Run best of n, and print and save its table and curves."""
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
        folder = result.save(arguments.output_dir)
        print(result)
        print(
            f"table: {folder / 'best_of_n.md'}\ncurves: {folder / 'best_of_n.png'}\nwinners: {folder / 'winners.md'}"
        )
