"""Options of best of n, for recipes and the command line."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class BestOfNArguments:
    """
    Keys of a best-of-n recipe.

    Example:

    ```python
    from dmoerm_trl import BestOfNArguments

    BestOfNArguments(
        output_dir="runs/bon", reward_models={"length": "length"}, gold="length", n=4, policy="runs/demo/base",
        prompts="runs/demo/data/test.jsonl",
    )
    ```
    """

    output_dir: str = field(metadata={"help": "Folder for the responses, scores, table, curves and winners."})
    reward_models: dict[str, Any] = field(
        metadata={
            "help": "Name -> folder or hub name of a reward model, 'length', 'module:function', or {mean | WCO | UWO: members}."
        }
    )
    gold: str = field(
        metadata={"help": "Name of the gold reward model, or 'file' for the column `gold` of `responses`."}
    )
    n: int = field(metadata={"help": "Number of responses per prompt."})

    # Prompts and responses
    policy: str | None = field(
        default=None,
        metadata={"help": "Causal language model that generates the responses; give either this or `responses`."},
    )
    responses: str | None = field(
        default=None, metadata={"help": "JSONL or Parquet file with `prompt`, `response` and optionally `gold`."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "JSONL or Parquet file with `prompt`; by default, the prompts of `responses`."}
    )
    num_prompts: int | None = field(
        default=None, metadata={"help": "Number of prompts to use, from the first on; all by default."}
    )
    task: str | None = field(default=None, metadata={"help": "Use only the prompts of this task."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Maximum number of tokens of a response (table 7)."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling (table 7)."})
    top_p: float = field(default=0.8, metadata={"help": "Top-p of the sampling (table 7)."})
    backend: str = field(
        default="transformers", metadata={"help": "Library that generates: 'transformers' or 'vllm'."}
    )
    batch_size: int = field(default=500, metadata={"help": "Number of responses that transformers generates at once."})
    policy_dtype: str = field(
        default="float32", metadata={"help": "Data type of the policy: 'float32', 'bfloat16' or 'float16'."}
    )

    # Scoring and evaluation
    max_length: int = field(
        default=2048, metadata={"help": "Maximum number of tokens of prompt and response; older turns are cut."}
    )
    dtype: str = field(default="float32", metadata={"help": "Data type of the reward models."})
    grid: list[int] | None = field(
        default=None, metadata={"help": "Values of n; by default, about 12 values up to `n`."}
    )
    show: list[int] = field(
        default_factory=lambda: [1, 30, 1000, 6000, 60_000], metadata={"help": "Values of n whose winners are shown."}
    )
    show_prompts: int = field(default=3, metadata={"help": "Number of prompts whose winners are shown."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling and of the bootstrap."})
    shard_size: int = field(
        default=1000,
        metadata={"help": "Responses per file. If the run is killed, each worker loses at most one file."},
    )
    workers: int = field(default=1, metadata={"help": "Number of processes that share the CPU; use 1 on a GPU."})

    def __post_init__(self):
        if (self.policy is None) == (self.responses is None):
            raise ValueError(f"got policy={self.policy!r} and responses={self.responses!r}, need exactly one of them.")
        if self.prompts is None and self.responses is None:
            raise ValueError("got a policy without `prompts`, need a file of prompts.")

    @property
    def rows(self) -> list[dict]:
        """The prompts, read from their file."""
        from ..generation.prompts import read_prompts

        return read_prompts(self.prompts or self.responses, self.num_prompts, self.task)

    @property
    def sampler(self) -> Any:
        """Source of the responses: a [`~dmoerm_trl.generation.samplers.SamplerSpec`], or the path of a file."""
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
        """Arguments of [`~dmoerm_trl.evaluation.best_of_n.run_best_of_n`] that have the same names here."""
        names = ("n", "grid", "show", "show_prompts", "seed", "shard_size", "workers", "max_length", "dtype")
        return {name: getattr(self, name) for name in names}
