"""The recipe that `dmoerm train --config recipe.yaml` reads."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ..arguments import fit
from ..files import file_digest
from ..tasks import OVERALL, TaskTable

if TYPE_CHECKING:  # takes seconds to import, which would delay the list of options
    from .ranked_config import RankedRewardConfig


@dataclass
class Recipe:
    """
    Settings of a complete training: data, model, router, the three phases and the baselines. Each key can be given in a YAML
    file or on the command line, where the settings of a stage are JSON. The keys of `router`, `phase1`, `phase2`, `phase3` and
    `baselines` are those of [`~dmoerm_trl.training.ranked_config.RankedRewardConfig`], which extends TRL's `RewardConfig`.

    Example:

    ```python
    from dmoerm_trl import Recipe

    recipe = Recipe("runs/mine", "runs/demo/base", "runs/demo/data/test.jsonl", phase1={"learning_rate": 1e-5})
    ```
    """

    output_dir: str = field(metadata={"help": "Folder of the run. A killed run resumes from it."})
    base_model: str = field(
        metadata={"help": "Pretrained model or reward model that `AutoModel` can load: a hub name or a folder."}
    )
    train_data: str = field(metadata={"help": "Preference rows: a file, a folder or a hub name; see recipes/DATA.md."})

    extend: str | None = field(
        default=None,
        metadata={
            "help": "Folder of another run. Its stages with the same settings and rows are copied; that run is not changed."
        },
    )

    # Data
    test_data: str | None = field(
        default=None, metadata={"help": "Test rows; by default, `test_share` of the prompts of `train_data`."}
    )
    tasks: str = field(
        default="paper", metadata={"help": "Table of tasks: 'paper', 'paper-zh' (table 12), or a YAML file."}
    )
    on_error: str = field(
        default="raise",
        metadata={"help": "What to do with a row that is invalid or too long: 'raise', or 'skip' and count it."},
    )
    max_length: int = field(
        default=2048, metadata={"help": "Maximum number of tokens of prompt and response; older turns are cut."}
    )
    score_thinking: bool = field(
        default=False,
        metadata={
            "help": "Score the thoughts (<think>...</think>) of a reasoning model too; by default, they are left out."
        },
    )
    test_share: float = field(
        default=0.2,
        metadata={"help": "Share of the prompts that is held out for the test if there is no `test_data`."},
    )
    phase1_share: float = field(
        default=0.6, metadata={"help": "Share of the training prompts that phase 1 uses (table 4)."}
    )
    phase3_rows: str = field(
        default="rest",
        metadata={
            "help": "Rows of phase 3: the 'rest', which phase 1 did not use (paper), or 'all', for few ranked rows."
        },
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "Share of each phase's prompts that is used for validation."}
    )

    # Model
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model."})
    task_base_models: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={
            "help": "Other base models for some tasks: task -> a model with the same shape and tokens as `base_model`."
        },
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Padding token; by default, that of the tokenizer, or its eos token if it has none."},
    )
    share_base: bool = field(default=False, metadata={"help": "Share one base between all tasks, which saves memory."})
    lora_rank: int = field(default=32, metadata={"help": "LoRA rank of the experts (table 5)."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha of the experts (table 5)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout of the experts (table 5)."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear modules that LoRA adapts (table 5)."}
    )
    lora_layers: str = field(
        default="all",
        metadata={
            "help": "Layers that LoRA adapts, from the top: 'all' (paper), 'top half', 'top third', or a number."
        },
    )
    aggregator_input: str = field(
        default="embeddings",
        metadata={
            "help": "What the aggregator reads of each expert: its 'embeddings' (paper), or its 'scores', for few ranked rows."
        },
    )
    aggregator_hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden size of the aggregator; by default, that of the base."}
    )
    aggregator_members: int = field(
        default=1,
        metadata={
            "help": "Number of aggregators that phase 3 trains, each validated on another part of its rows, and averages."
        },
    )
    activation: str = field(
        default="sigmoid", metadata={"help": "Activation of equations 4 and 6: 'sigmoid' (paper) or 'none'."}
    )
    unit_variance: bool = field(
        default=False, metadata={"help": "Normalise DMoERM's rewards to unit variance, not only to zero mean."}
    )

    # Training
    router_model: str | None = field(
        default=None, metadata={"help": "Model for the router's backbone; by default, `base_model`."}
    )
    router_layers: int | None = field(
        default=None, metadata={"help": "Number of the backbone's layers that the router keeps; all by default."}
    )
    router_balance: float = field(
        default=0.0,
        metadata={
            "help": "0 weighs all rows of the router's training equally; 1 weighs all tasks equally, for tasks with few rows."
        },
    )
    router: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Settings of the router's training."}
    )
    phase1: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "Settings of phase 1."})
    phase2: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "Settings of phase 2."})
    phase3: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "Settings of phase 3."})
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantise the frozen base to 8 bits in phase 2; needs bitsandbytes."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Quantise the frozen base to 4 bits in phase 2 (NF4, as in QLoRA); needs bitsandbytes."},
    )
    joint_experts: bool = field(
        default=True, metadata={"help": "Train all experts of a task in one run instead of one after the other."}
    )
    without_outer: bool = field(default=True, metadata={"help": "Train DMoERM-w/o-Outer too."})
    ensemble_size: int = field(
        default=5,
        metadata={"help": "Number of models in the baseline ensemble; the first one is the baseline 'single'."},
    )
    baselines: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Settings of the baselines' training."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the splits, the weights and the order of the data."})
    workers: int = field(
        default=1, metadata={"help": "Number of stages trained in parallel, each in a process with one thread (CPU)."}
    )
    report_to: str = field(default="none", metadata={"help": "Where to report metrics, such as 'tensorboard'."})

    def __post_init__(self):
        for name, hint in get_type_hints(Recipe).items():
            try:
                setattr(self, name, fit(getattr(self, name), hint))
            except ValueError as error:
                raise ValueError(f"`{name}` of the recipe: got {getattr(self, name)!r}, need {error}.") from error
        for name, (right, need) in RANGES.items():
            if getattr(self, name) is not None and not right(getattr(self, name)):
                raise ValueError(f"`{name}` of the recipe: got {name}={getattr(self, name)!r}, need {need}.")
        if self.lora_layers.isdecimal():  # a number on the command line is text
            self.lora_layers = int(self.lora_layers)
        for stage in (*DEFAULTS, "task_base_models"):
            settings = getattr(self, stage)
            try:  # the command line gives them as JSON
                settings = json.loads(settings) if isinstance(settings, str) else settings or {}
            except json.JSONDecodeError as error:
                raise ValueError(f"`{stage}` of the recipe: got {settings!r}, need JSON: {error}.") from error
            if not isinstance(settings, dict):
                raise ValueError(f"`{stage}` of the recipe: got {settings!r}, need `key: value` pairs.")
            setattr(self, stage, settings)
        for stage in DEFAULTS:
            self.phase(stage, output_dir=self.output_dir)
        from ..modeling.quantization import quantization

        if quantization(self.load_in_4bit, self.load_in_8bit) and self.phase2.get("deepspeed"):  # found before phase 1
            raise ValueError(
                f"`phase2` of the recipe: got deepspeed={self.phase2['deepspeed']!r} and a quantised base, need one of them, "
                "because ZeRO cannot shard a quantised base: leave `deepspeed` out, so that each GPU holds the whole base."
            )
        if self.task_base_models and self.share_base:
            raise ValueError(
                f"`task_base_models` of the recipe: got {self.task_base_models} and share_base=True, need one of them, because "
                "a shared base is the same for all tasks: leave `share_base` out."
            )

    @property
    def task_table(self) -> TaskTable:
        return TaskTable.load(self.tasks)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The arguments of `DMoERMConfig` that the recipe sets."""
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers")
        names += ("aggregator_input", "aggregator_hidden_size", "aggregator_members", "activation", "share_base")
        return {name: getattr(self, name) for name in names}

    def phase(self, stage: str, output_dir: str, seed: int | None = None, **more: Any) -> "RankedRewardConfig":
        """
        Return the training arguments of one stage: its defaults, overridden by the recipe.

        Args:
            stage (`str`): `"router"`, `"phase1"`, `"phase2"`, `"phase3"` or `"baselines"`.
            output_dir (`str`): Folder of its checkpoints.

        Raises:
            ValueError: If the recipe sets an unknown key, or an invalid value.
        """
        from .ranked_config import RankedRewardConfig

        names = {field.name for field in fields(RankedRewardConfig)}
        if lost := [name for name in ("save_only_model", "ignore_data_skip") if getattr(self, stage).get(name)]:
            raise ValueError(
                f"`{stage}` of the recipe: got {lost[0]}=True, need False, because a killed run could not resume as it was."
            )
        if tokenizers := [name for name in OF_THE_TOKENIZER if getattr(self, stage).get(name) is not None]:
            raise ValueError(
                f"`{stage}` of the recipe: got {tokenizers}, need one tokenizer for all stages, because texts are tokenised "
                "once: set it in the base model's folder."
            )
        if unknown := set(getattr(self, stage)) - names | set(getattr(self, stage)) & set(TOP_LEVEL):
            raise ValueError(
                f"`{stage}` of the recipe: got the unknown keys {sorted(unknown)}, need arguments of trl.RewardConfig "
                f"(such as learning_rate, num_train_epochs, per_device_train_batch_size) or `patience`; {TOP_LEVEL} are "
                "keys of the whole recipe."
            )
        settings = {**DEFAULTS[stage], **getattr(self, stage), **more}
        for name, value in settings.items():
            try:
                settings[name] = fit(value, _phase_hints()[name])
            except ValueError as error:
                raise ValueError(f"`{stage}` of the recipe: got {name}={value!r}, need {error}.") from error
        seed = self.seed if seed is None else seed
        try:
            return RankedRewardConfig(output_dir=output_dir, seed=seed, report_to=self.report_to, **settings)
        except UNUSABLE as error:
            raise ValueError(f"`{stage}` of the recipe: {_culprit(settings, output_dir)}{error}") from error

    def step_settings(self, stage: str, processes: int) -> dict[str, Any]:
        """
        Return the settings of a stage on which its result depends. They include the total size of a step, which is the same
        however the step is divided over processes.
        """
        from .ranked_config import RankedRewardConfig

        given = {**DEFAULTS[stage], **getattr(self, stage)}
        own = {name: getattr(RankedRewardConfig, name) for name in DIVISION} | given
        prompts, batches, _ = (own.pop(name) for name in DIVISION)
        kept = {name: own[name] for name in own.keys() & given.keys() - NOT_OF_THE_RESULT}
        size = batches * processes
        if own.get("train_tokens_per_batch") is None:
            return {stage: kept, f"prompts a step of {stage}": prompts * size}
        return {stage: kept, f"batches a step of {stage}": size}

    def recorded(self, names: Iterable[str]) -> dict[str, Any]:
        """Return settings as the manifest of a run records them: those of [`ADDED`] only if they are not the default."""
        settings = asdict(self)
        return {name: settings[name] for name in names if name not in ADDED or settings[name] != ADDED[name]}

    def fingerprint(self) -> dict[str, Any]:
        """Return all settings on which the result depends, including the content of the task table and of data files."""
        elsewhere = ("output_dir", "workers", "report_to", "extend")
        settings = self.recorded([key for key in asdict(self) if key not in elsewhere])
        table = self.task_table
        settings["tasks"] = {task: list(points) for task, points in {**table.tasks, OVERALL: table.overall}.items()}
        for name in ("train_data", "test_data"):
            if settings[name] is not None and Path(settings[name]).is_file():
                settings[f"sha256 of {name}"] = file_digest([Path(settings[name])])
        return settings


def _culprit(settings: dict[str, Any], output_dir: str) -> str:
    """Name a setting that training arguments refuse even on its own, if there is one."""
    from .ranked_config import RankedRewardConfig

    for name, value in settings.items():
        try:
            RankedRewardConfig(output_dir=output_dir, **{name: value})
        except UNUSABLE:
            return f"got {name}={value!r}: "
    return ""


@cache
def _phase_hints() -> dict[str, Any]:
    from .ranked_config import RankedRewardConfig

    return get_type_hints(RankedRewardConfig)


def _share(value: float) -> bool:
    return 0 <= value < 1


RANGES = {
    "on_error": (("raise", "skip").__contains__, "'raise' or 'skip'"),
    "max_length": (lambda value: value >= 1, "at least 1 token"),
    "test_share": (_share, "a share of the prompts, from 0 to below 1"),
    "phase1_share": (lambda value: 0 < value < 1, "a share of the prompts, between 0 and 1"),
    "phase3_rows": (("rest", "all").__contains__, "'rest' or 'all'"),
    "validation_share": (lambda value: 0 < value < 1, "a share of the prompts, between 0 and 1"),
    "router_layers": (lambda value: value >= 1, "at least 1 layer"),
    "router_balance": (lambda value: 0 <= value <= 1, "0 (each row weighs the same) to 1 (each task does)"),
    "ensemble_size": (lambda value: value >= 0, "at least 0"),
    "seed": (lambda value: 0 <= value < 2**31, "a number from 0 to 2**31 - 1"),
    "workers": (lambda value: value >= 1, "at least 1"),
    "lora_rank": (lambda value: value >= 1, "at least 1"),
    "lora_alpha": (lambda value: value > 0, "more than 0"),
    "lora_dropout": (_share, "a share, from 0 to below 1"),
    "lora_target_modules": (bool, "at least one name of a linear module"),
    "aggregator_hidden_size": (lambda value: value >= 1, "at least 1"),
    "aggregator_members": (lambda value: value >= 1, "at least 1"),
}
"""Key -> a check of its value, and a description of the values that pass."""

ADDED = {"aggregator_input": "embeddings", "aggregator_members": 1, "phase3_rows": "rest"}
"""Keys that 0.1.0 did not have -> the default, by which its runs were trained."""

UNUSABLE = (ValueError, TypeError, ArithmeticError, AttributeError, KeyError, ImportError, OSError)
"""Errors that training arguments raise for invalid values."""

OF_THE_TOKENIZER = ("chat_template_path", "eos_token", "pad_token")

TOP_LEVEL = (
    "output_dir",
    "report_to",
    "seed",
    "max_length",
    "load_in_8bit",
    "load_in_4bit",
    "pad_token",
    "trust_remote_code",
)

DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed")
"""Settings of a stage that do not change its result as long as a step has the same number of prompts."""

NOT_OF_THE_RESULT = {
    *("disable_tqdm", "log_level", "log_level_replica", "logging_steps", "logging_first_step", "logging_strategy"),
    *("run_name", "project", "save_total_limit", "skip_memory_metrics"),
    *(
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
    ),
    *("ddp_timeout", "ddp_backend", "eval_tokens_per_batch", "per_device_eval_batch_size"),
}
"""Settings of a stage that may change afterwards, because its result does not depend on them."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "router": {"learning_rate": 5e-5, "per_device_train_batch_size": 16},
    "phase1": {"learning_rate": 1e-7},  # table 4
    "phase2": {"learning_rate": 5e-5},
    "phase3": {"learning_rate": 1e-6},
    "baselines": {"learning_rate": 1e-7},
}
