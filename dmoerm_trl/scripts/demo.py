"""
Run the whole method on a simulated world, on a CPU: preference rows, a tiny pretrained base, the router, the three phases, the
baselines, the consistency table, best of n, and some steps of PPO with the DMoERM as reward model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..training.recipe import Recipe

RECIPE = Path(__file__).parents[1] / "demo" / "demo.yaml"


@dataclass
class DemoArguments:
    """Options of the demo beside the recipe: the world, the base, best of n and PPO."""

    rows_per_task: int = field(default=240, metadata={"help": "Prompts of each task that a human ranked."})
    labelled_rows_per_task: int = field(
        default=0, metadata={"help": "Further prompts of each task that only the judge labelled."}
    )
    rows_of_others: int = field(default=40, metadata={"help": "Prompts that belong to none of the tasks."})
    pairs: int = field(
        default=12, metadata={"help": "Pairs of a sign and a lapse a point, from 2 to 12; fewer are learnt sooner."}
    )
    base: dict[str, Any] = field(default_factory=dict, metadata={"help": "Arguments of `train_tiny_base`."})
    base_texts: int = field(default=6000, metadata={"help": "Conversations that the base is trained on."})
    best_of_n: int = field(default=256, metadata={"help": "Responses per prompt, of which the best is taken."})
    best_of_n_prompts: int = field(default=15, metadata={"help": "Held-out prompts, from each task in turn."})
    ppo: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of TRL's PPOConfig."})
    ppo_prompts: int = field(default=100, metadata={"help": "Held-out prompts on which PPO is measured."})


def main(argv: list[str] | None = None) -> None:
    parser = Parser((DemoArguments, Recipe), prog="dmoerm demo", description=__doc__)
    parser.set_defaults(config=str(RECIPE))
    arguments, recipe = parser.parse(argv)

    from ..commands.demo import demo

    demo(arguments, recipe)
