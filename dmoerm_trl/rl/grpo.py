"""GRPO and RLOO with a DMoERM as the reward function, or with one function for each capability point."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ..arguments import Parser
from ..distributed.engines import start_deepspeed
from ..scoring.reward_functions import TextRewards, TextScorer, reward_functions
from .arguments import GRPOArguments

CONFIGS = {"grpo": GRPOConfig, "rloo": RLOOConfig}


def grpo_config(trainer: str = "grpo") -> type[GRPOConfig] | type[RLOOConfig]:
    """
    Return the class of a recipe's arguments: TRL's `GRPOConfig`, or `RLOOConfig` for `"rloo"`.

    Example:

    ```python
    from dmoerm_trl import grpo_config

    args = grpo_config("rloo")(output_dir="runs/rloo", bf16=False)
    ```
    """
    return CONFIGS[trainer]


def parse_grpo(argv: Sequence[str] | None = None, **parser: Any) -> tuple[GRPOArguments, GRPOConfig | RLOOConfig]:
    """
    Read a recipe of GRPO or RLOO. If it asks for DeepSpeed, this starts the distributed processes. Models that are loaded
    afterwards are not sharded: the trainer shards the policy.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; `sys.argv[1:]` by default.
        parser: Arguments of [`~dmoerm_trl.arguments.Parser`], such as `prog`.

    Raises:
        ValueError: If the recipe is wrong, or sets `reward_weights` (use `capability_weights`, which name their points).

    Example:

    ```python
    from dmoerm_trl import parse_grpo

    recipe = ["--policy", "runs/demo/base", "--reward_model", "runs/demo/model", "--prompts", "runs/demo/data/test.jsonl"]
    arguments, args = parse_grpo([*recipe, "--output_dir", "runs/rloo", "--trainer", "rloo", "--bf16", "no"], prog="my.py")
    ```
    """
    (chosen,) = Parser((GRPOArguments,), **parser, add_help=False).parse(argv, pass_over_unknown=True)
    arguments, args = Parser((GRPOArguments, grpo_config(chosen.trainer)), **parser).parse(argv)
    if args.reward_weights is not None:
        raise ValueError(
            f"got reward_weights={args.reward_weights}, need capability_weights, which name their points."
        )
    start_deepspeed(args)
    unset_hf_deepspeed_config()
    return arguments, args


def grpo_trainer(
    model: PreTrainedModel,
    reward_funcs: TextRewards,
    args: GRPOConfig | RLOOConfig,
    train_dataset: Sequence[list[dict]],
    processing_class: PreTrainedTokenizerBase,
    *,
    capability_weights: Mapping[str, float] | None = None,
    tasks: Sequence[str] | None = None,
    **options: Any,
) -> GRPOTrainer | RLOOTrainer:
    """
    Build TRL's `GRPOTrainer`, or `RLOOTrainer` for an `RLOOConfig`, with the rewards of a DMoERM.

    Args:
        model (`PreTrainedModel`): The policy, a causal language model.
        reward_funcs ([`~dmoerm_trl.scoring.reward_functions.TextRewards`]): The rewards of the DMoERM.
        args (`GRPOConfig` or `RLOOConfig`): The arguments of TRL's trainer.
        train_dataset (`Sequence[list[dict]]`): Prompts as lists of turns; the last turn is the user's.
        processing_class (`PreTrainedTokenizerBase`): Tokenizer of the policy.
        capability_weights (`Mapping[str, float]`, *optional*): Capability point -> weight of its reward function. By default
            the DMoERM's reward is the only reward function.
        tasks (`Sequence[str]`, *optional*): Tasks to which the prompts are routed; all tasks by default.
        options: Further arguments of the trainer, such as `callbacks`.

    Example:

    ```python
    from dmoerm_trl import TextRewards, grpo_config, grpo_trainer, load_policy, load_reward_model

    policy, tokenizer = load_policy("runs/demo/base")
    rewards = TextRewards(*load_reward_model("runs/demo/model", max_length=512))
    args = grpo_config()(output_dir="runs/grpo", max_steps=1, per_device_train_batch_size=2, num_generations=2,
                         max_completion_length=4, bf16=False, save_strategy="no", report_to="none")
    prompts = [[{"role": "user", "content": "I feel a bit lonely."}]]
    grpo_trainer(policy, rewards, args, prompts, tokenizer).train()
    ```
    """
    if capability_weights:
        functions = reward_functions(reward_funcs, list(capability_weights), tasks)
        args.reward_weights = list(capability_weights.values())
    else:
        functions = reward_functions(reward_funcs)
    trainer_class = RLOOTrainer if isinstance(args, RLOOConfig) else GRPOTrainer
    return trainer_class(
        model=model,
        reward_funcs=functions,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in train_dataset]),
        processing_class=processing_class,
        **options,
    )


def optimised_reward(rewards: TextRewards, capability_weights: Mapping[str, float] | None) -> TextScorer:
    """
    Return the optimised reward as one function of texts: the DMoERM's reward, or the weighted sum of capability scores.

    Example:

    ```python
    from dmoerm_trl import TextRewards, load_reward_model, optimised_reward

    rewards = TextRewards(*load_reward_model("runs/demo/model", max_length=512))
    reward = optimised_reward(rewards, {"empathy ability": 1.0})
    reward([[{"role": "user", "content": "Hello?"}]], ["Hi!"])
    ```
    """
    return rewards.weighted(capability_weights) if capability_weights else rewards
