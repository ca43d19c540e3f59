"""The options of best of n, as recipes and the command line give them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class BestOfNArguments:
    """
    The keys of a best-of-n recipe.

    Example:

    ```python
    from dmoerm_trl import BestOfNArguments

    BestOfNArguments(
        output_dir="runs/bon", reward_models={"length": "length"}, gold="length", n=4, policy="runs/demo/base",
        prompts="runs/demo/data/test.jsonl",
    )
    ```
    """

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

    @property
    def rows(self) -> list[dict]:
        """The prompts, read from their file."""
        from ..generation.prompts import read_prompts

        return read_prompts(self.prompts or self.responses, self.num_prompts, self.task)

    @property
    def sampler(self) -> Any:
        """What writes the responses: a [`~dmoerm_trl.generation.samplers.SamplerSpec`], or a file of them."""
        from ..generation.samplers import SamplerSpec

        return self.responses or SamplerSpec(
            self.policy,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            batch_size=self.batch_size,
            backend=self.backend,
            dtype=self.policy_dtype,
            max_length=self.max_length,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of [`~dmoerm_trl.evaluation.best_of_n.run_best_of_n`] by the same names."""
        names = ("n", "grid", "show", "show_prompts", "seed", "shard_size", "workers", "max_length", "dtype")
        return {name: getattr(self, name) for name in names}
