"""
GRPO or RLOO with a DMoERM as the reward function, or with one function for each capability point.

    python examples/grpo.py --config recipes/qwen1.5-1.8b-chat/grpo.yaml
    python examples/grpo.py --config recipes/qwen1.5-1.8b-chat/grpo.yaml --trainer rloo

Policy and reward model may have different tokenizers: the reward is computed from text. A run that was killed goes on from
its last checkpoint when it is started again. What it leaves in `output_dir`: the policy, checkpoints, and `monitor.jsonl`
with the responses beside it.
"""

from dmoerm_trl.console import run  # first, so that the libraries are quiet

# isort: split

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dmoerm_trl import DMoERMForSequenceClassification, Formatter
from dmoerm_trl.arguments import Parser
from dmoerm_trl.folders import held
from dmoerm_trl.modeling.loading import loading
from dmoerm_trl.rl.monitor import PolicyMonitor, every
from dmoerm_trl.rl.prompts import load_prompts
from dmoerm_trl.rl.reward_functions import TextRewards, gold_rewards, reward_functions
from dmoerm_trl.rl.rollout import check_chat_template
from dmoerm_trl.rl.routes import keep_tasks, routed_tasks
from dmoerm_trl.training.distributed import is_main, start_deepspeed
from dmoerm_trl.training.trainer import train

TRAINERS = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}


@dataclass
class Arguments:
    policy: str = field(metadata={"help": "Causal language model with a chat template."})
    reward_model: str = field(metadata={"help": "Folder or hub name of a DMoERM."})
    prompts: str = field(metadata={"help": "JSONL or Parquet of prompts or preference rows, to optimise on."})
    trainer: Literal["grpo", "rloo"] = field(default="grpo", metadata={"help": "TRL's GRPOTrainer or RLOOTrainer."})
    capability_weights: dict[str, float] | None = field(
        default=None, metadata={"help": "Capability point -> weight; without it the aggregated reward is used."}
    )
    eval_prompts: str | None = field(
        default=None, metadata={"help": "The same to measure on; some of `prompts` are held out if absent."}
    )
    reward_prompts: str | None = field(
        default=None, metadata={"help": "What the reward model was trained on: an error if a prompt recurs."}
    )
    max_prompt_length: int = field(default=1024, metadata={"help": "Tokens; longer prompts are left out."})
    monitor_every: int = field(default=100, metadata={"help": "Steps between the lines of monitor.jsonl."})
    monitor_prompts: int = field(default=100, metadata={"help": "Held-out prompts that are measured on."})
    gold: str | None = field(default=None, metadata={"help": "Gold reward: a reward model, or module:function."})


def main(argv: list[str] | None = None) -> None:
    (chosen,) = Parser((Arguments,), prog="grpo.py", add_help=False).parse(argv, pass_over_unknown=True)
    config_class, trainer_class = TRAINERS[chosen.trainer]
    arguments, args = Parser((Arguments, config_class), prog="grpo.py", description=__doc__).parse(argv)
    start_deepspeed(args)
    unset_hf_deepspeed_config()  # each process loads whole models, of which the trainer divides the policy
    if args.reward_weights is not None:
        raise ValueError(
            f"got reward_weights={args.reward_weights}, need capability_weights, which name their points."
        )

    with loading(arguments.policy, "a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(arguments.policy, padding_side="left")
    check_chat_template(tokenizer)
    max_length = arguments.max_prompt_length + 2 * args.max_completion_length  # another tokenizer may take more tokens
    train_rows, eval_rows = load_prompts(
        arguments.prompts,
        Formatter(tokenizer, max_length),
        max_prompt_length=arguments.max_prompt_length,
        eval_prompts=arguments.eval_prompts,
        reward_prompts=arguments.reward_prompts,
        held_out=arguments.monitor_prompts,
    )
    prompts, eval_prompts = [row["prompt"] for row in train_rows], [row["prompt"] for row in eval_rows]

    dtype = "bfloat16" if args.bf16 else "float32"
    with loading(arguments.reward_model, "a DMoERM"):
        reward_model = DMoERMForSequenceClassification.from_pretrained(arguments.reward_model, dtype=dtype)
        reward_tokenizer = AutoTokenizer.from_pretrained(arguments.reward_model)
    formatter = Formatter.for_model(reward_model.config, reward_tokenizer, max_length)
    if reward_model.model.router is not None:
        reward_model.model.router.to(args.device)
    routed = routed_tasks(reward_model, prompts + eval_prompts, formatter)
    print(f"tasks of the prompts: {routed}")
    keep_tasks(reward_model, list(routed))
    rewards = TextRewards(reward_model.to(args.device), formatter)
    functions, proxy = reward_functions(rewards), rewards
    if weights := arguments.capability_weights:
        functions, proxy = reward_functions(rewards, list(weights), list(routed)), rewards.weighted(weights)
        args.reward_weights = list(weights.values())

    monitor = PolicyMonitor(
        Path(args.output_dir) / "monitor.jsonl",
        eval_prompts,
        Formatter(tokenizer, max_length),
        AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=dtype if args.deepspeed_plugin else "float32"),
        steps=every(arguments.monitor_every),
        proxy=proxy,
        gold=gold_rewards(arguments.gold, eval_rows, max_length=max_length) if arguments.gold and is_main() else None,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        batch_size=args.per_device_train_batch_size,
    )
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(arguments.policy, dtype="float32"),
        reward_funcs=functions,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[monitor],
    )
    with held(args.output_dir):
        train(trainer)  # from the last whole checkpoint, if there is one
        trainer.save_model(args.output_dir)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run(main)
