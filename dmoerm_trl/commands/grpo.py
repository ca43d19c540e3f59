"""Run `dmoerm grpo`."""

from trl import GRPOConfig, RLOOConfig

from ..files import locked_folder
from ..rl.arguments import GRPOArguments
from ..rl.grpo import grpo_trainer, optimised_reward
from ..rl.setup import RLSetup
from ..scoring.reward_functions import TextRewards
from ..training.ranked_trainer import train_or_resume


def train_by_grpo(arguments: GRPOArguments, args: GRPOConfig | RLOOConfig) -> None:
    """Train a policy by GRPO or RLOO, or resume its training."""
    setup = RLSetup.load(arguments, args)
    rewards, weights = TextRewards(setup.reward_model.to(args.device), setup.formatter), arguments.capability_weights
    trainer = grpo_trainer(
        model=setup.policy,
        reward_funcs=rewards,
        args=args,
        train_dataset=setup.prompts,
        processing_class=setup.tokenizer,
        capability_weights=weights,
        tasks=list(setup.tasks),
        callbacks=[setup.monitor(optimised_reward(rewards, weights))],
    )
    with locked_folder(args.output_dir):
        train_or_resume(trainer)
        trainer.save_model(args.output_dir)
