"""Build TRL's PPOTrainer after checks that it does not make: of the TRL version, the arguments and the tokenizers."""

import copy
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat_template import fix_date
from ..data.formatting import Formatter
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification


def ppo_config() -> type:
    """
    Return the class of a recipe's arguments: TRL's `PPOConfig`, with which a DeepSpeed configuration can be given.

    Raises:
        ImportError: If this TRL has no PPO.

    Example:

    ```python
    from dmoerm_trl import ppo_config

    args = ppo_config()(output_dir="runs/ppo", bf16=False)
    ```
    """
    try:
        import trl.experimental.ppo  # noqa: F401
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("trl"):
            raise
        raise ImportError(
            f"got TRL {version('trl')}, which has no PPO, need TRL 1.12.0, because PPO was removed in 1.13 and 1.12.0 is "
            'the last release with it: run `pip install "dmoerm-trl[ppo]"`, or use GRPO or RLOO, which every TRL has.'
        ) from error
    from .ppo_trainer import DeepSpeedPPOConfig

    return DeepSpeedPPOConfig


def check_tokenizers(policy_tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that the policy's and the reward model's tokenizers agree, because PPO passes token ids from one to the other. Check
    that the policy's tokenizer pads on the left, because PPO generates right after the padded prompts.

    Raises:
        ValueError: If their vocabularies, special tokens or chat templates differ, which the message lists, or if the policy's
            tokenizer pads on the right.
    """
    if policy_tokenizer.padding_side != "left":
        raise ValueError(
            f"got a policy tokenizer with padding_side={policy_tokenizer.padding_side!r}, need 'left', because PPO "
            "generates after the padding, and a response after padding looks like text after the end of the response: "
            'set policy_tokenizer.padding_side = "left".'
        )
    differences = []
    policy, reward = policy_tokenizer.get_vocab(), reward_tokenizer.get_vocab()
    if odd := sorted(token for token in policy.keys() | reward.keys() if policy.get(token) != reward.get(token)):
        differences.append(
            f"{len(odd)} tokens of their vocabularies differ (such as {odd[0]!r}, which is {policy.get(odd[0])} to the "
            f"policy and {reward.get(odd[0])} to the reward model)"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(policy_tokenizer, name), getattr(reward_tokenizer, name)
        if ids[0] != ids[1]:
            differences.append(f"{name} is {ids[0]} to the policy and {ids[1]} to the reward model")
    templates = {"policy": policy_tokenizer.chat_template, "reward model": reward_tokenizer.chat_template}
    if missing := [name for name, template in templates.items() if not template]:
        if len(missing) == 1:
            differences.append(f"the chat template of the {missing[0]} is missing")
    elif templates["policy"] != templates["reward model"]:
        differences.append("their chat templates differ")
    if differences:
        raise ValueError(
            f"got tokenizers that do not agree: {'; '.join(differences)}. Need one tokenizer for both, because PPO passes "
            "token ids to the reward model: train the reward model on a base with the policy's tokenizer, or use GRPO or "
            "RLOO, which pass text."
        )


_UNREAD = {
    "max_steps": "total_episodes = steps x batch",
    "max_grad_norm": "cliprange and cliprange_value, which bound the update; gradients are not clipped",
    "eval_strategy": "a PolicyMonitor",
    "load_best_model_at_end": "save_steps, and choose a checkpoint by the monitor's file",
    "label_smoothing_factor": "nothing: the losses are fixed",
    "neftune_noise_alpha": "nothing: the losses are fixed",
    "use_liger_kernel": "the kernels when the policy is loaded",
    "torch_compile": "torch.compile on the policy",
    "auto_find_batch_size": "per_device_train_batch_size",
    "dataloader_num_workers": "nothing: the prompts are in memory",
    "data_seed": "seed",
    "dataset_num_proc": "nothing: the prompts are already tokenised",
    "sft_model_path": "policy",
    "reward_model_path": "reward_model",
    "resume_from_checkpoint": "output_dir: a run resumes from its last checkpoint there",
    "batch_size": "per_device_train_batch_size and gradient_accumulation_steps",
    "mini_batch_size": "num_mini_batches",
    "micro_batch_size": "per_device_train_batch_size",
    "local_batch_size": "per_device_train_batch_size and gradient_accumulation_steps",
    "local_mini_batch_size": "num_mini_batches",
    "num_total_batches": "total_episodes",
    "world_size": "the launcher's number of processes",
}
"""Keys of PPOConfig that TRL 1.12's PPOTrainer never reads, or overwrites -> what to set instead."""

_ABOVE_ZERO = (
    "temperature",
    "total_episodes",
    "response_length",
    "num_ppo_epochs",
    "num_mini_batches",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


def check_arguments(args: Any) -> None:
    """
    Check that PPOTrainer reads every argument that is set, and that the numbers are valid.

    Raises:
        ValueError: If `args` (a fresh `PPOConfig`) sets an argument that PPOTrainer would silently ignore, or a number that is
            out of range.
    """
    values = {field.name: getattr(args, field.name) for field in fields(args)}
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    bad += [name for name in _ABOVE_ZERO if values[name] is not None and not values[name] > 0]
    bad += ["learning_rate"] * (args.learning_rate < 0)
    if bad:
        raise ValueError(
            f"got {', '.join(f'{name}={values[name]!r}' for name in dict.fromkeys(bad))}, need finite numbers, a learning rate "
            f"of 0 or more, and {', '.join(_ABOVE_ZERO)} above 0: fix the recipe."
        )
    unread = [
        f"{field.name}={getattr(args, field.name)!r} (set {_UNREAD[field.name]})"
        for field in fields(args)
        if field.name in _UNREAD and getattr(args, field.name) not in (field.default, "no")
    ]
    if args.total_episodes is not None and args.num_train_epochs != type(args).num_train_epochs:
        unread.append(f"num_train_epochs={args.num_train_epochs} (it counts only without total_episodes)")
    if args.bf16 and not args.deepspeed and os.environ.get("ACCELERATE_MIXED_PRECISION") != "bf16":
        unread.append("bf16=True (set bf16: false, or run `accelerate launch --mixed_precision bf16`)")
    if unread:
        raise ValueError(
            f"got {', '.join(unread)}, which TRL {version('trl')}'s PPOTrainer does not read. Need only keys that have an "
            "effect, because a recipe must do what it says: set what the brackets say, or take the key out."
        )


def ppo_trainer(
    args: Any,
    processing_class: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    ref_model: PreTrainedModel | None,
    reward_model: PreTrainedModel,
    train_dataset: Sequence[list[dict]],
    value_model: PreTrainedModel,
    *,
    formatter: Formatter | None = None,
    **options: Any,
) -> Any:
    """
    Build TRL's `PPOTrainer` with a DMoERM as its reward model, as a [`~dmoerm_trl.rl.ppo_trainer.ResumablePPOTrainer`], after
    checks that PPO itself does not make. The arguments are those of `PPOTrainer`, in the same order.

    Args:
        args (`PPOConfig`): The arguments of `PPOTrainer`. `stop_token` becomes `"eos"` if it is not set, because a response
            that continues after its end could open a new turn, and so choose the task that scores it.
        processing_class (`PreTrainedTokenizerBase`): Tokenizer of the policy; it must agree with that of the reward model.
        model (`PreTrainedModel`): The policy, a causal language model.
        ref_model (`PreTrainedModel`, *optional*): The reference policy; a frozen copy of the policy if None.
        reward_model (`PreTrainedModel`): The DMoERM, a [`~dmoerm_trl.scoring.ensemble.RewardEnsemble`], or any other reward
            model.
        train_dataset (`Sequence[list[dict]]`): Prompts as lists of turns; the last turn is the user's. The formatter tokenises
            them as in the training of the reward model.
        value_model (`PreTrainedModel`): A sequence classification model with one label, which PPO trains; see
            [`~dmoerm_trl.rl.value_model.value_model_from`].
        formatter (`Formatter`, *optional*): The formatter of the reward model; needed if its tokenizer is not the object of the
            policy.
        options: `top_p` of the rollout, and further arguments of `PPOTrainer`, such as `callbacks`.

    Raises:
        ImportError: If this TRL has no PPO.
        ValueError: If `args` has a key that PPO does not read; if the tokenizers differ from each other or from the tokenizer
            of the reward model's training; or if the chat template ends a turn with another token than eos.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, ppo_config, ppo_trainer, value_model_from
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained("runs/demo/base", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained("runs/demo/base")
    reward_model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    args = ppo_config()(output_dir="runs/ppo", total_episodes=2, per_device_train_batch_size=2, response_length=4, bf16=False,
                        gradient_checkpointing=False, num_sample_generations=0, num_mini_batches=1, save_strategy="no",
                        report_to="none")
    prompts = [[{"role": "user", "content": text}] for text in ("I feel a bit lonely.", "Tell me a story.")]
    ppo_trainer(args, tokenizer, policy, None, reward_model, prompts, value_model_from(reward_model, "chitchat")).train()
    ```
    """
    ppo_config()
    from .ppo_trainer import ResumablePPOTrainer

    torch.backends.cuda.matmul.allow_tf32 = True  # the weights are fp32
    check_arguments(args)
    if args.stop_token is None and args.stop_token_id is None:
        args.stop_token = "eos"
    members = [
        member
        for member in getattr(reward_model, "members", [reward_model])
        if isinstance(member, DMoERMForSequenceClassification)
    ]
    if formatter is None and members:
        formatter = Formatter.for_model(members[0].config, processing_class, sys.maxsize)
    elif formatter is None:
        formatter = Formatter(processing_class, sys.maxsize)
    tokenizer = copy.deepcopy(processing_class)
    tokenizer.padding_side = "left"
    fix_date(tokenizer)  # as the formatter does in the reward model's
    for member in members:
        formatter.check_model(member.config)
    check_tokenizers(tokenizer, formatter.tokenizer)
    end = formatter.markers.end_of_turn[0]
    if args.stop_token == "eos" and tokenizer.eos_token_id != end:
        raise ValueError(
            f"got a tokenizer whose eos is {tokenizer.eos_token!r}, need {tokenizer.convert_ids_to_tokens(end)!r}, with which "
            "the chat template ends a turn, because PPO cuts a response at eos, and one that goes on could open a new turn and "
            "choose its own judge: set `eos_token` of the policy's and the reward model's tokenizer."
        )
    dataset = prompt_dataset(train_dataset, formatter)
    options.setdefault("eval_dataset", dataset)  # PPOTrainer needs one, whether it evaluates or not
    return ResumablePPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=model,
        ref_model=ref_model,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=dataset,
        **options,
    )


def prompt_dataset(prompts: Sequence[list[dict]], formatter: Formatter) -> Dataset:
    """Build PPO's dataset of prompts: `input_ids` are the tokens up to the beginning of the response."""
    return Dataset.from_dict({"input_ids": [formatter.generation_prompt(prompt) for prompt in prompts]})
