"""The options of PPO, GRPO and RLOO that this package adds to TRL's."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class RLArguments:
    """Options that PPO, GRPO and RLOO share: the policy, the prompts, and how the policy is measured."""

    policy: str = field(metadata={"help": "Folder or hub name of a causal language model with a chat template."})
    prompts: str = field(metadata={"help": "JSONL or Parquet of prompts or preference rows, to optimise on."})
    eval_prompts: str | None = field(
        default=None,
        metadata={"help": "Prompts to measure on, in the same format; some of `prompts` are held out if absent."},
    )
    reward_prompts: str | None = field(
        default=None, metadata={"help": "Training rows of the reward model; a prompt that is in them is an error."}
    )
    max_prompt_length: int = field(
        default=1024, metadata={"help": "Maximum tokens of a prompt; longer ones are left out (table 7)."}
    )
    monitor_every: int = field(default=100, metadata={"help": "Steps between two measurements of the policy."})
    monitor_prompts: int = field(default=100, metadata={"help": "Held-out prompts that are measured on."})
    gold: str | None = field(default=None, metadata={"help": "Gold reward: a folder or hub name, or module:function."})


@dataclass(kw_only=True)
class PPOArguments(RLArguments):
    """
    Keys of a PPO recipe beside those of TRL's `PPOConfig`.

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
        metadata={
            "help": "Model from which the value model starts; the reward model's base of the prompts' task if absent."
        },
    )
    top_p: float = field(default=0.8, metadata={"help": "Nucleus of the rollout's sampling, top-p (table 7)."})


@dataclass(kw_only=True)
class GRPOArguments(RLArguments):
    """
    Keys of a GRPO or RLOO recipe beside those of TRL's `GRPOConfig` or `RLOOConfig`.

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
