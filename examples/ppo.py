"""
PPO with a DMoERM, or an ensemble of reward models, as TRL's reward model.

    python examples/ppo.py --config recipes/qwen1.5-1.8b-chat/ppo.yaml

Needs TRL's PPO: pip install "dmoerm-trl[ppo]". A run that was killed goes on from its last checkpoint when it is started
again. What it leaves in `output_dir`: the policy, checkpoints, and `monitor.jsonl` with the responses beside it.
"""

from dmoerm_trl.console import run  # first, so that the libraries are quiet

# isort: split

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from dmoerm_trl import Formatter, ppo_trainer
from dmoerm_trl.arguments import Parser
from dmoerm_trl.folders import held
from dmoerm_trl.modeling.loading import loading
from dmoerm_trl.rl.ensemble import RewardEnsemble, load_reward_model
from dmoerm_trl.rl.monitor import PolicyMonitor, every
from dmoerm_trl.rl.ppo import ppo_classes
from dmoerm_trl.rl.prompts import load_prompts
from dmoerm_trl.rl.reward_functions import TextRewards, gold_rewards
from dmoerm_trl.rl.rollout import check_chat_template
from dmoerm_trl.rl.routes import keep_tasks, routed_tasks, value_model_of
from dmoerm_trl.training.checkpoints import last_checkpoint
from dmoerm_trl.training.distributed import is_main


@dataclass
class Arguments:
    policy: str = field(metadata={"help": "Causal language model with the reward model's tokenizer."})
    reward_model: dict[str, list[str]] | str | None = field(
        metadata={"help": "Folder or hub name of a DMoERM; in a recipe also {mean | WCO | UWO: members}."}
    )
    prompts: str = field(metadata={"help": "JSONL or Parquet of prompts or preference rows, to optimise on."})
    value_model: str | None = field(
        default=None,
        metadata={"help": "Model that the values start from; the reward model's base of the prompts' task if absent."},
    )
    eval_prompts: str | None = field(
        default=None, metadata={"help": "The same to measure on; some of `prompts` are held out if absent."}
    )
    reward_prompts: str | None = field(
        default=None, metadata={"help": "What the reward model was trained on: an error if a prompt recurs."}
    )
    max_prompt_length: int = field(default=1024, metadata={"help": "Tokens; longer prompts are left out (table 7)."})
    top_p: float = field(default=0.8, metadata={"help": "Of the rollout (table 7)."})
    monitor_every: int = field(default=100, metadata={"help": "Steps between the lines of monitor.jsonl."})
    monitor_prompts: int = field(default=100, metadata={"help": "Held-out prompts that are measured on."})
    gold: str | None = field(default=None, metadata={"help": "Gold reward: a reward model, or module:function."})


def main(argv: list[str] | None = None) -> None:
    config_class, _ = ppo_classes()
    arguments, args = Parser((Arguments, config_class), prog="ppo.py", description=__doc__).parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = True  # the weights are fp32, see below
    set_seed(args.seed)  # a value model's new head is drawn

    with loading(arguments.policy, "a causal language model"):
        policy_tokenizer = AutoTokenizer.from_pretrained(arguments.policy)
    check_chat_template(policy_tokenizer)
    reward_model, tokenizer = load_reward_model(arguments.reward_model)
    max_length = arguments.max_prompt_length + 2 * args.response_length  # text tokenised again may take more tokens
    members = reward_model.members if isinstance(reward_model, RewardEnsemble) else [reward_model]
    formatter = Formatter.for_model(members[0].config, tokenizer, max_length)
    train_rows, eval_rows = load_prompts(
        arguments.prompts,
        formatter,
        max_prompt_length=arguments.max_prompt_length,
        eval_prompts=arguments.eval_prompts,
        reward_prompts=arguments.reward_prompts,
        held_out=arguments.monitor_prompts,
    )
    prompts, eval_prompts = [row["prompt"] for row in train_rows], [row["prompt"] for row in eval_rows]

    for member in members:
        if member.model.router is not None:
            member.model.router.to(args.device)
        routed = routed_tasks(member, prompts + eval_prompts, formatter)
        print(f"tasks of the prompts: {routed}")
        keep_tasks(member, list(routed))

    # In fp32: at this learning rate a step is smaller than what bf16 weights can tell apart.
    with loading(arguments.policy, "a causal language model"):
        policy = AutoModelForCausalLM.from_pretrained(arguments.policy, dtype="float32")
        reference = AutoModelForCausalLM.from_pretrained(arguments.policy, dtype="float32")
    if arguments.value_model is None:
        value_model = value_model_of(member, next(iter(routed)))  # of an ensemble the last member's
    else:
        with loading(arguments.value_model, "a model that gets one label"):
            value_model = AutoModelForSequenceClassification.from_pretrained(
                arguments.value_model, num_labels=1, dtype="float32"
            )

    monitor = PolicyMonitor(
        Path(args.output_dir) / "monitor.jsonl",
        eval_prompts,
        formatter,
        reference,
        steps=every(arguments.monitor_every),
        proxy=TextRewards(reward_model, formatter),
        gold=gold_rewards(arguments.gold, eval_rows, max_length=max_length) if arguments.gold and is_main() else None,
        max_new_tokens=args.response_length,
        temperature=args.temperature,
        top_p=arguments.top_p,
        batch_size=args.per_device_train_batch_size,
    )
    trainer = ppo_trainer(
        policy,
        value_model,
        reward_model,
        prompts,
        formatter,
        args,
        policy_tokenizer=policy_tokenizer,
        ref_model=reference,
        top_p=arguments.top_p,
        callbacks=[monitor],
    )
    with held(args.output_dir):
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
        trainer.save_model(args.output_dir)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run(main)
