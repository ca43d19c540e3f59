"""Write rows of the simulated preference world, and print their statistics: dmoerm world --output world.jsonl"""

from dataclasses import dataclass, field

from ..arguments import Parser


@dataclass
class WorldArguments:
    """Options of `dmoerm world`."""

    output: str = field(metadata={"help": "JSONL file to write."})
    rows_per_task: int = field(default=300, metadata={"help": "Rows (prompts) of each task."})
    rows_of_others: int = field(default=60, metadata={"help": "Rows that belong to none of the tasks."})
    labelled_rows_per_task: int = field(
        default=0, metadata={"help": "Further rows of each task that only the judge labelled."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the world."})

    def __post_init__(self):
        numbers = self.rows_per_task, self.rows_of_others, self.labelled_rows_per_task
        if min(numbers) < 0 or not sum(numbers):
            raise ValueError(
                f"got rows_per_task={self.rows_per_task}, rows_of_others={self.rows_of_others} and "
                f"labelled_rows_per_task={self.labelled_rows_per_task}, need at least 0, and a row."
            )


def main(argv: list[str] | None = None) -> None:
    (arguments,) = Parser((WorldArguments,), prog="dmoerm world", description=__doc__).parse(argv)

    from ..commands.world import write_world

    write_world(arguments)
