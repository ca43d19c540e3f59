"""Write rows of the simulated preference world, and print their statistics: dmoerm world --output world.jsonl"""

from dataclasses import dataclass, field
from statistics import mean

from ..arguments import Parser


@dataclass
class WorldArguments:
    """Options of `dmoerm world`."""

    output: str = field(metadata={"help": "JSONL file to write."})
    rows_per_task: int = field(default=300, metadata={"help": "Rows (prompts) of each task."})
    rows_of_others: int = field(default=60, metadata={"help": "Rows that belong to none of the tasks."})
    seed: int = field(default=0, metadata={"help": "Seed of the world."})

    def __post_init__(self):
        if min(self.rows_per_task, self.rows_of_others) < 0 or not self.rows_per_task + self.rows_of_others:
            raise ValueError(
                f"got rows_per_task={self.rows_per_task} and rows_of_others={self.rows_of_others}, need at least 0, and a row."
            )


def main(argv: list[str] | None = None) -> None:
    (arguments,) = Parser((WorldArguments,), prog="dmoerm world", description=__doc__).parse(argv)

    from ..data.rows import write_rows
    from ..demo.world import World
    from ..files import check_writable

    check_writable(arguments.output)
    world = World(arguments.seed)
    rows = world.rows(arguments.rows_per_task, arguments.rows_of_others)
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
