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

    from ..commands.grpo import train_by_grpo
    from ..rl.grpo import parse_grpo

    train_by_grpo(*parse_grpo(argv, prog="dmoerm grpo", description=__doc__))
