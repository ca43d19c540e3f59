"""Write rows of the simulated preference world, and print their statistics: dmoerm world --output world.jsonl"""

from dataclasses import dataclass, field

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

    from ..commands.world import write_world

    write_world(arguments)
