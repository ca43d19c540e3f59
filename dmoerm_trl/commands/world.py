"""Run `dmoerm world`."""

from statistics import mean
from typing import TYPE_CHECKING

from ..data.rows import write_rows
from ..demo.world import World
from ..files import check_writable

if TYPE_CHECKING:
    from ..scripts.world import WorldArguments


def write_world(arguments: "WorldArguments") -> None:
    """Write rows of a simulated world to a file, and print their statistics."""
    check_writable(arguments.output)
    world = World(arguments.seed)
    rows = world.rows(arguments.rows_per_task, arguments.rows_of_others, arguments.labelled_rows_per_task)
    write_rows(rows, arguments.output)
    print(f"{len(rows)} rows: {arguments.output}")
    statistics = world.statistics(rows)
    judge = statistics.pop("judge")
    for name in ("labelled", "tied"):
        statistics[f"judge, mean of the points: {name}"] = mean(counts[name] for counts in judge.values())
    for point, counts in judge.items():
        statistics[f"judge's agreement: {point}"] = counts["agreement"]
    for name, value in statistics.items():
        print(f"{name}: {value:.1%}")
