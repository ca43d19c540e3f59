"""
Train a policy by PPO with a DMoERM, or an ensemble, as TRL's reward model: `dmoerm ppo` as a script to copy and change.

    python examples/ppo.py --config recipes/demo/ppo.yaml
"""

from dmoerm_trl import run  # imported first, to silence the libraries

# isort: split
from transformers import set_seed

from dmoerm_trl import Parser, PPOArguments, RLSetup, locked_folder, ppo_config, ppo_trainer


def main(argv: list[str] | None = None) -> None:
    arguments, args = Parser((PPOArguments, ppo_config()), prog="ppo.py", description=__doc__).parse(argv)
    set_seed(args.seed)
    setup = RLSetup.load(arguments, args)
    trainer = ppo_trainer(
        args,
        processing_class=setup.tokenizer,
        model=setup.policy,
        ref_model=setup.reference,
        reward_model=setup.reward_model,
        train_dataset=setup.prompts,
        value_model=setup.value_model(),
        formatter=setup.formatter,
        top_p=arguments.top_p,
        callbacks=[setup.monitor()],
    )
    with locked_folder(args.output_dir):
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model(args.output_dir)


if __name__ == "__main__":
    run(main)
