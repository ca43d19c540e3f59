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

    from ..commands.ppo import train_by_ppo
    from ..rl.ppo import ppo_config

    train_by_ppo(*Parser((PPOArguments, ppo_config()), prog="dmoerm ppo", description=__doc__).parse(argv))
