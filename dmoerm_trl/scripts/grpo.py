"""
Train a policy by GRPO or RLOO with a DMoERM as the reward function, or with one function for each capability point.

    dmoerm grpo --config recipes/qwen1.5-1.8b-chat/grpo.yaml
    dmoerm grpo --config recipes/qwen1.5-1.8b-chat/grpo.yaml --trainer rloo

Policy and reward model may have different tokenizers, because the reward is computed from text. A killed run resumes from its
last checkpoint when it is started again. `output_dir` gets the policy, the checkpoints, and `monitor.jsonl` with the responses
beside it. Every argument of TRL's GRPOConfig or RLOOConfig is an option too.
"""

from ..arguments import Parser, asks_for_help
from ..rl.arguments import GRPOArguments


def main(argv: list[str] | None = None) -> None:
    if asks_for_help(argv):
        Parser((GRPOArguments,), prog="dmoerm grpo", description=__doc__).parse(argv)

    from accelerate import PartialState

    from ..files import locked_folder
    from ..rl.grpo import grpo_trainer, optimised_reward, parse_grpo
    from ..rl.setup import RLSetup
    from ..scoring.reward_functions import TextRewards
    from ..training.ranked_trainer import train_or_resume

    arguments, args = parse_grpo(argv, prog="dmoerm grpo", description=__doc__)
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
    PartialState().destroy_process_group()
