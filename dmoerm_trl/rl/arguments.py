"""The options of PPO, GRPO and RLOO beside TRL's own, as recipes and the command line give them."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class RLArguments:
    """What all of them read: the policy, the prompts, and how the policy is measured."""

    policy: str = field(metadata={"help": "Folder or hub name of a causal language model with a chat template."})
    prompts: str = field(metadata={"help": "JSONL or Parquet of prompts or preference rows, to optimise on."})
    eval_prompts: str | None = field(
        default=None, metadata={"help": "The same to measure on; some of `prompts` are held out if absent."}
    )
    reward_prompts: str | None = field(
        default=None, metadata={"help": "What the reward model was trained on: an error if a prompt recurs."}
    )
    max_prompt_length: int = field(default=1024, metadata={"help": "Tokens; longer prompts are left out (table 7)."})
    monitor_every: int = field(default=100, metadata={"help": "Steps between the lines of monitor.jsonl."})
    monitor_prompts: int = field(default=100, metadata={"help": "Held-out prompts that are measured on."})
    gold: str | None = field(default=None, metadata={"help": "Gold reward: a reward model, or module:function."})


@dataclass(kw_only=True)
class PPOArguments(RLArguments):
    """
    The keys of a PPO recipe that are not TRL's `PPOConfig`'s.

    Example:

    ```python
    from dmoerm_trl import PPOArguments

    PPOArguments(policy="runs/demo/base", reward_model="runs/demo/model", prompts="runs/demo/data/test.jsonl", top_p=1.0)
    ```
    """

    reward_model: dict[str, list[str]] | str | None = field(
        metadata={"help": "Folder or hub name of a DMoERM; in a recipe also {mean | WCO | UWO: members}."}
    )
    value_model: str | None = field(
        default=None,
        metadata={"help": "Model that the values start from; the reward model's base of the prompts' task if absent."},
    )
    top_p: float = field(
        default=0.8, metadata={"help": "Share of probability that the rollout samples from (table 7)."}
    )


@dataclass(kw_only=True)
class GRPOArguments(RLArguments):
    """
    The keys of a GRPO or RLOO recipe that are not TRL's `GRPOConfig`'s or `RLOOConfig`'s.

    Example:

    ```python
    from dmoerm_trl import GRPOArguments

    GRPOArguments(policy="runs/demo/base", reward_model="runs/demo/model", prompts="runs/demo/data/test.jsonl", trainer="rloo")
    ```
    """

    reward_model: str = field(metadata={"help": "Folder or hub name of a DMoERM."})
    trainer: Literal["grpo", "rloo"] = field(default="grpo", metadata={"help": "TRL's GRPOTrainer or RLOOTrainer."})
    capability_weights: dict[str, float] | None = field(
        default=None, metadata={"help": "Capability point -> weight; without it the aggregated reward is used."}
    )
