"""
PPO with a DMoERM as TRL's reward model.

    python examples/ppo.py --policy runs/demo/base --reward_model runs/demo/model --prompts runs/demo/data/test.jsonl \
        --output_dir runs/ppo --total_episodes 64 --response_length 64

Needs TRL's PPO: pip install "dmoerm-trl[ppo]". `--prompts` is a file of preference rows, of which the prompts are taken.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import TrlParser

from dmoerm_trl import DMoERMForSequenceClassification, Formatter, ppo_trainer
from dmoerm_trl.data.rows import load_rows
from dmoerm_trl.rl.ppo import ppo_classes
from dmoerm_trl.tasks import TaskTable


@dataclass
class Arguments:
    policy: str = field(metadata={"help": "Causal language model with the reward model's tokenizer."})
    reward_model: str = field(metadata={"help": "Folder or hub name of a DMoERM."})
    prompts: str = field(metadata={"help": "Preference rows, see recipes/DATA.md."})
    tasks: str = field(default="paper", metadata={"help": "'paper', 'paper-zh', or a YAML file."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a prompt; older turns are cut."})


def main() -> None:
    config_class, _ = ppo_classes()
    arguments, args = TrlParser((Arguments, config_class)).parse_args_and_config(fail_with_unknown_args=True)
    policy = AutoModelForCausalLM.from_pretrained(arguments.policy)
    value_model = AutoModelForSequenceClassification.from_pretrained(arguments.policy, num_labels=1)
    reward_model = DMoERMForSequenceClassification.from_pretrained(arguments.reward_model)
    formatter = Formatter(AutoTokenizer.from_pretrained(arguments.reward_model), arguments.max_length)
    rows, report = load_rows(arguments.prompts, tasks=TaskTable.load(arguments.tasks))
    print(report)
    trainer = ppo_trainer(policy, value_model, reward_model, [row.prompt for row in rows], formatter, args)
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
