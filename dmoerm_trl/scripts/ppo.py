"""
Train a policy by PPO with a DMoERM, or an ensemble of reward models, as TRL's reward model.

    dmoerm ppo --config recipes/qwen1.5-1.8b-chat/ppo.yaml

It needs TRL's PPO: pip install "dmoerm-trl[ppo]". A killed run resumes from its last checkpoint when it is started again.
`output_dir` gets the policy, the checkpoints, and `monitor.jsonl` with the responses beside it. Every argument of TRL's
PPOConfig is an option too.
"""

from ..arguments import Parser, asks_for_help
from ..rl.arguments import PPOArguments


def main(argv: list[str] | None = None) -> None:
    if asks_for_help(argv):
        Parser((PPOArguments,), prog="dmoerm ppo", description=__doc__).parse(argv)

    from accelerate import PartialState
    from transformers import set_seed

    from ..files import locked_folder
    from ..rl.ppo import ppo_config, ppo_trainer
    from ..rl.setup import RLSetup

    arguments, args = Parser((PPOArguments, ppo_config()), prog="dmoerm ppo", description=__doc__).parse(argv)
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
    PartialState().destroy_process_group()
