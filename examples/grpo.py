"""
Train a policy by GRPO or RLOO with a DMoERM as the reward function: `dmoerm grpo` as a script to copy and change.

    python examples/grpo.py --config recipes/demo/grpo.yaml [--trainer rloo]
"""

from dmoerm_trl import run  # imported first, to silence the libraries

# isort: split
from dmoerm_trl import RLSetup, TextRewards, grpo_trainer, locked_folder, optimised_reward, parse_grpo, train_or_resume


def main(argv: list[str] | None = None) -> None:
    arguments, args = parse_grpo(argv, prog="grpo.py", description=__doc__)
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


if __name__ == "__main__":
    run(main)
