"""Load the policy, its reference, the reward model and the prompts of PPO, GRPO and RLOO."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..data.formatting import Formatter
from ..distributed.processes import is_main
from ..generation.prompts import load_prompts
from ..generation.samplers import load_policy
from ..modeling.load_errors import loading
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..scoring.ensemble import RewardEnsemble, load_reward_model
from ..scoring.reward_functions import TextRewards, TextScorer, gold_rewards
from .arguments import PPOArguments, RLArguments
from .monitor import PolicyMonitor, every
from .needed_tasks import keep_needed_tasks
from .value_model import value_model_from


@dataclass
class RLSetup:
    """
    The models and prompts of a run of PPO, GRPO or RLOO.

    Attributes:
        arguments (`PPOArguments` or `GRPOArguments`), args (`PPOConfig`, `GRPOConfig` or `RLOOConfig`): The recipe.
        policy (`PreTrainedModel`): The causal language model that is optimised, in fp32, because at the learning rates of RL a
            step is smaller than the resolution of bf16 weights.
        reference (`PreTrainedModel`): The policy before training.
        tokenizer (`PreTrainedTokenizerBase`): The policy's tokenizer, which pads on the left.
        reward_model (`DMoERMForSequenceClassification` or `RewardEnsemble`): The reward model, with only the tasks that the
            prompts need.
        formatter (`Formatter`): The formatter of the reward model.
        prompts (`list[list[dict]]`): Prompts to optimise on, as lists of turns.
        eval_rows (`list[dict]`): Rows with the prompts to measure on.
        tasks (`dict[str, int]`): Task -> number of prompts that the router sends there.

    Example:

    ```python
    from dmoerm_trl import GRPOArguments, RLSetup, grpo_config

    arguments = GRPOArguments(
        policy="runs/demo/base", reward_model="runs/demo/model", prompts="runs/demo/data/test.jsonl", monitor_prompts=2
    )
    setup = RLSetup.load(arguments, grpo_config()(output_dir="runs/grpo", bf16=False))
    setup.prompts[0], setup.tasks
    ```
    """

    arguments: RLArguments
    args: Any
    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reward_model: DMoERMForSequenceClassification | RewardEnsemble
    formatter: Formatter
    prompts: list[list[dict]]
    eval_rows: list[dict]
    tasks: dict[str, int]

    @classmethod
    def load(cls, arguments: RLArguments, args: Any) -> "RLSetup":
        """
        Load the models and prompts, and print how many prompts are used.

        Args:
            arguments ([`~dmoerm_trl.rl.arguments.PPOArguments`] or [`~dmoerm_trl.rl.arguments.GRPOArguments`]): The recipe's
                keys.
            args (`PPOConfig`, `GRPOConfig` or `RLOOConfig`): TRL's keys of the recipe.

        Raises:
            ValueError: If a model or the prompts cannot be read; the message names the source and the reason.
        """
        is_ppo = isinstance(arguments, PPOArguments)
        dtype = "bfloat16" if args.bf16 else "float32"
        policy, tokenizer = load_policy(arguments.policy)
        max_length = arguments.max_prompt_length + 2 * _max_new_tokens(args)  # another tokenizer may take more tokens
        reward_model, formatter = load_reward_model(
            arguments.reward_model, max_length=max_length, dtype=None if is_ppo else dtype
        )
        train_rows, eval_rows = load_prompts(
            arguments.prompts,
            Formatter(tokenizer, max_length),
            max_prompt_length=arguments.max_prompt_length,
            eval_prompts=arguments.eval_prompts,
            reward_prompts=arguments.reward_prompts,
            held_out=arguments.monitor_prompts,
        )
        prompts = [row["prompt"] for row in train_rows]
        routed = prompts + [row["prompt"] for row in eval_rows]
        tasks = keep_needed_tasks(reward_model, routed, formatter, args.device)
        print(f"tasks of the prompts: {tasks}")
        sharded = not is_ppo and args.deepspeed_plugin is not None
        reference, _ = load_policy(arguments.policy, dtype if sharded else "float32")
        return cls(arguments, args, policy, reference, tokenizer, reward_model, formatter, prompts, eval_rows, tasks)

    def value_model(self) -> PreTrainedModel:
        """
        Load PPO's value model in fp32. It is the recipe's `value_model` with a new head or, by default, the reward model's base
        of the prompts' most frequent task with a head of zeros. For an ensemble it is the base of the last member.
        """
        name = self.arguments.value_model
        if name is None:
            members = getattr(self.reward_model, "members", [self.reward_model])
            return value_model_from(members[-1], next(iter(self.tasks)))
        with loading(name, "a model that gets one label"):
            return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype="float32")

    def monitor(self, proxy: TextScorer | None = None) -> PolicyMonitor:
        """
        Build the callback that measures the policy on the held-out prompts and writes `monitor.jsonl` to the output folder.

        Args:
            proxy ([`~dmoerm_trl.scoring.reward_functions.TextScorer`], *optional*): The reward that is optimised; that of the
                reward model by default.
        """
        arguments, args, new = self.arguments, self.args, _max_new_tokens(self.args)
        max_length = self.formatter.max_length
        gold = arguments.gold and is_main()
        return PolicyMonitor(
            Path(args.output_dir) / "monitor.jsonl",
            [row["prompt"] for row in self.eval_rows],
            Formatter(self.tokenizer, max_length),
            self.reference,
            steps=every(arguments.monitor_every),
            proxy=TextRewards(self.reward_model, self.formatter) if proxy is None else proxy,
            gold=gold_rewards(arguments.gold, self.eval_rows, max_length=max_length) if gold else None,
            max_new_tokens=new,
            temperature=args.temperature,
            top_p=arguments.top_p if isinstance(arguments, PPOArguments) else args.top_p,
            batch_size=args.per_device_train_batch_size,
        )


def _max_new_tokens(args: Any) -> int:
    """Return the maximum tokens of a response, whose name differs between PPO and the others."""
    return args.response_length if hasattr(args, "response_length") else args.max_completion_length
