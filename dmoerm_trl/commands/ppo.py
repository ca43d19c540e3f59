"""Run `dmoerm ppo`."""

from typing import Any

from transformers import set_seed

from ..files import locked_folder
from ..rl.arguments import PPOArguments
from ..rl.ppo import ppo_trainer
from ..rl.setup import RLSetup


def train_by_ppo(arguments: PPOArguments, args: Any) -> None:
    """
    Train a policy by PPO, or resume its training.

    Args:
        args (`PPOConfig`): TRL's keys of the recipe.
    """
    set_seed(args.seed)  # for the new head of the value model
    setup = RLSetup.load(arguments, args)
    trainer = ppo_trainer(
        args,
        setup.tokenizer,
        setup.policy,
        setup.reference,
        setup.reward_model,
        setup.prompts,
        setup.value_model(),
        formatter=setup.formatter,
        top_p=arguments.top_p,
        callbacks=[setup.monitor()],
    )
    with locked_folder(args.output_dir):
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model(args.output_dir)
