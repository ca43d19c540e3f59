"""
Best of n against several reward models: figure 5 (left) and table 11 of the paper.

    python examples/bon_eval.py --config recipes/demo/bon.yaml

A killed run goes on where it was. Every key can also stand on the command line: --n 6000 --output_dir runs/bon_6000
On several GPUs, which share the responses and give the same files: accelerate launch examples/bon_eval.py --config ...
"""

from dmoerm_trl.console import run  # first, so that the libraries are quiet

# isort: split

from dataclasses import dataclass, field
from typing import Any

from dmoerm_trl.arguments import Parser
from dmoerm_trl.evaluation.best_of_n import run_best_of_n
from dmoerm_trl.evaluation.response_files import read_prompts
from dmoerm_trl.rl.rollout import PolicySource
from dmoerm_trl.workers import launched_processes


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder of the run: responses, scores, table, curves, winners."})
    reward_models: dict[str, Any] = field(
        metadata={
            "help": "Name -> folder or hub name of a reward model, 'length', 'module:function', or {mean | WCO | UWO: members}."
        }
    )
    gold: str = field(metadata={"help": "The same, or 'file': the column `gold` of `responses`."})
    n: int = field(metadata={"help": "Responses a prompt."})

    # Prompts and responses
    policy: str | None = field(default=None, metadata={"help": "Causal language model; either this or `responses`."})
    responses: str | None = field(
        default=None, metadata={"help": "JSONL or Parquet file with `prompt`, `response` and maybe `gold`."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "JSONL or Parquet file with `prompt`; those of `responses` if absent."}
    )
    num_prompts: int | None = field(default=None, metadata={"help": "The first so many; all if absent."})
    task: str | None = field(default=None, metadata={"help": "Only prompts of this task."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Tokens of a response (table 7)."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling (table 7)."})
    top_p: float = field(default=0.8, metadata={"help": "Of the sampling (table 7)."})
    backend: str = field(default="transformers", metadata={"help": "'transformers' or 'vllm'."})
    batch_size: int = field(default=500, metadata={"help": "Responses generated at a time by transformers."})
    policy_dtype: str = field(default="float32", metadata={"help": "'float32', 'bfloat16' or 'float16'."})

    # Scoring and evaluation
    max_length: int = field(default=2048, metadata={"help": "Tokens of prompt and response; older turns are cut."})
    dtype: str = field(default="float32", metadata={"help": "Of the reward models."})
    grid: list[int] | None = field(default=None, metadata={"help": "Values of n; about 12 up to `n` if absent."})
    show: list[int] = field(
        default_factory=lambda: [1, 30, 1000, 6000, 60_000], metadata={"help": "Values of n whose winners are shown."}
    )
    show_prompts: int = field(default=3, metadata={"help": "Prompts whose winners are shown."})
    seed: int = field(default=0, metadata={"help": "Of the sampling and the bootstrap."})
    shard_size: int = field(default=1000, metadata={"help": "Responses a file; a kill loses so many a worker."})
    workers: int = field(default=1, metadata={"help": "Processes that share the CPU; 1 on a GPU."})

    def __post_init__(self):
        if (self.policy is None) == (self.responses is None):
            raise ValueError(f"got policy={self.policy!r} and responses={self.responses!r}, need exactly one of them.")
        if self.prompts is None and self.responses is None:
            raise ValueError("got a policy without `prompts`, need a file of them.")


def main(argv: list[str] | None = None) -> None:
    (arguments,) = Parser((Arguments,), prog="bon_eval.py", description=__doc__).parse(argv)
    prompts = arguments.responses if arguments.prompts is None else arguments.prompts
    rows = read_prompts(prompts, arguments.num_prompts, arguments.task)
    policy = arguments.responses or PolicySource(
        arguments.policy,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        batch_size=arguments.batch_size,
        backend=arguments.backend,
        dtype=arguments.policy_dtype,
        max_length=arguments.max_length,
    )
    settings = ("n", "grid", "show", "show_prompts", "seed", "shard_size", "workers", "max_length", "dtype")
    processes = launched_processes()
    result = run_best_of_n(
        arguments.output_dir,
        rows,
        policy,
        arguments.reward_models,
        arguments.gold,
        **{name: getattr(arguments, name) for name in settings},
        processes=processes,
    )
    if processes.is_main_process:
        folder = result.save(arguments.output_dir)
        print(result)
        print(
            f"table: {folder / 'best_of_n.md'}\ncurves: {folder / 'best_of_n.png'}\nwinners: {folder / 'winners.md'}"
        )
    processes.destroy_process_group()


if __name__ == "__main__":
    run(main)
