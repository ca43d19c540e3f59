"""What PPO needs before it starts: a TRL that has it, and a reward model that reads the policy's token ids."""

import copy
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.formatting import Formatter


def ppo_classes() -> tuple[type, type]:
    """
    TRL's `(PPOConfig, PPOTrainer)`.

    Raises:
        ImportError: if this TRL has no PPO.
    """
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("trl"):
            raise
        raise ImportError(
            f"got TRL {version('trl')}, which has no PPO, need TRL 1.12.0, because PPO was removed in 1.13 and 1.12.0 is "
            'the last release with it: run `pip install "dmoerm-trl[ppo]"`, or use GRPO or RLOO, which every TRL has.'
        ) from error
    return PPOConfig, PPOTrainer


def check_tokenizers(policy_tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase) -> None:
    """
    PPO passes the policy's token ids to the reward model as they are, so the two tokenizers must agree; and it has the
    policy write right after the padded prompts, so the policy's tokenizer must pad on the left.

    Raises:
        ValueError: if their vocabularies, special tokens or chat templates differ; the message says in what. If the
            policy's tokenizer pads on the right.
    """
    if policy_tokenizer.padding_side != "left":
        raise ValueError(
            f"got a policy tokenizer with padding_side={policy_tokenizer.padding_side!r}, need 'left', because PPO has the "
            "policy write after the padding, and a response after padding cannot be told from text after the response's "
            'end: set policy_tokenizer.padding_side = "left".'
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
    if policy_tokenizer.chat_template != reward_tokenizer.chat_template:
        differences.append("their chat templates differ")
    if differences:
        raise ValueError(
            f"got tokenizers that do not agree: {'; '.join(differences)}. Need one tokenizer for both, because PPO passes "
            "token ids to the reward model: train the reward model on a base with the policy's tokenizer, or use GRPO or "
            "RLOO, which pass text."
        )


def ppo_trainer(
    policy: PreTrainedModel,
    value_model: PreTrainedModel,
    reward_model: PreTrainedModel,
    prompts: Sequence[list[dict]],
    formatter: Formatter,
    args: Any,
    **options: Any,
) -> Any:
    """
    TRL's `PPOTrainer` with a DMoERM as its reward model, after the checks that PPO itself does not make.

    Args:
        policy (`PreTrainedModel`): a causal language model; its frozen copy is the reference.
        value_model (`PreTrainedModel`): a sequence classification model with one label, trained along.
        reward_model (`PreTrainedModel`): the DMoERM, or any other reward model.
        prompts (`Sequence[list[dict]]`): turns, the last of the user. The formatter turns them into tokens, as it did in
            the reward model's training.
        formatter (`Formatter`): the reward model's.
        args (`PPOConfig`): as TRL's. Without `stop_token` it becomes `"eos"`: a response that goes on after its end could
            open a new turn and choose its own judge.
        options: further arguments of `PPOTrainer`, such as `callbacks` and `eval_dataset`.

    Raises:
        ImportError: if this TRL has no PPO.
    """
    _, trainer_class = ppo_classes()
    if args.stop_token is None and args.stop_token_id is None:
        args.stop_token = "eos"
    tokenizer = copy.deepcopy(formatter.tokenizer)
    tokenizer.padding_side = "left"
    check_tokenizers(tokenizer, formatter.tokenizer)
    dataset = prompt_dataset(prompts, formatter)
    options.setdefault("eval_dataset", dataset)  # PPOTrainer needs one, whether it evaluates or not
    return trainer_class(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=dataset,
        **options,
    )


def prompt_dataset(prompts: Sequence[list[dict]], formatter: Formatter) -> Dataset:
    """What a policy is given: a dataset with `input_ids`, the tokens up to where the response begins."""
    encodings = [formatter.encode(prompt, "") for prompt in prompts]
    return Dataset.from_dict({"input_ids": [encoding.input_ids[: encoding.prompt_length] for encoding in encodings]})
