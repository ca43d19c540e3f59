"""The recipe that `dmoerm train --config recipe.yaml` reads."""

import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ..arguments import fit
from ..files import file_digest
from ..tasks import OVERALL, TaskTable

if TYPE_CHECKING:  # the options are listed without it, which takes seconds to import
    from .ranked_trainer import RankedRewardConfig


@dataclass
class Recipe:
    """
    Settings of a complete training: data, model, router, the three phases and the baselines. Each key can be given in a YAML
    file or on the command line, where the settings of a stage are JSON. The keys of `router`, `phase1`, `phase2`, `phase3` and
    `baselines` are those of [`~dmoerm_trl.training.ranked_trainer.RankedRewardConfig`], which extends TRL's `RewardConfig`.

    Example:

    ```python
    from dmoerm_trl import Recipe

    recipe = Recipe("runs/mine", "runs/demo/base", "runs/demo/data/test.jsonl", phase1={"learning_rate": 1e-5})
    ```
    """

    output_dir: str = field(metadata={"help": "Folder of the run. A run that was killed goes on there."})
    base_model: str = field(
        metadata={"help": "Pretrained model or reward model, anything `AutoModel` loads: a hub name or a folder."}
    )
    train_data: str = field(metadata={"help": "Preference rows: a file, a folder or a hub name; recipes/DATA.md."})

    extend: str | None = field(
        default=None,
        metadata={
            "help": "Folder of another run, of which every stage with the same settings and rows is taken over; it is not changed."
        },
    )

    # Data
    test_data: str | None = field(default=None, metadata={"help": "Test rows; without it a share of `train_data`."})
    tasks: str = field(default="paper", metadata={"help": "'paper', 'paper-zh' (table 12), or a YAML file."})
    on_error: str = field(
        default="raise",
        metadata={"help": "What to do with a row that is bad or does not fit: 'raise', or 'skip' and count."},
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens of prompt and response; older turns are cut."})
    score_thinking: bool = field(
        default=False,
        metadata={
            "help": "Score the thoughts of a model that reasons (<think>...</think>) too; else they are left out."
        },
    )
    test_share: float = field(
        default=0.2, metadata={"help": "Share of the prompts for the test, without `test_data`."}
    )
    phase1_share: float = field(default=0.6, metadata={"help": "Share of the training prompts for phase 1 (table 4)."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of each phase's prompts that validates it."})

    # Model
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model."})
    task_base_models: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": "Other bases for some tasks: task -> a model of the same shape and tokens as `base_model`."},
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Token that fills batches; the tokenizer's own if absent, or else its eos."}
    )
    share_base: bool = field(default=False, metadata={"help": "One base for all tasks, to save memory."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the experts (table 5)."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the experts (table 5)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the experts (table 5)."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear modules with LoRA (table 5)."}
    )
    lora_layers: str = field(
        default="all",
        metadata={"help": "Layers with LoRA, from the top: 'all' (paper), 'top half', 'top third', or a number."},
    )
    aggregator_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the MLP; the base's if absent."}
    )
    activation: str = field(default="sigmoid", metadata={"help": "Of equations 4 and 6: 'sigmoid' (paper) or 'none'."})
    unit_variance: bool = field(default=False, metadata={"help": "Normalise DMoERM's rewards to unit variance too."})

    # Training
    router_model: str | None = field(default=None, metadata={"help": "Backbone of the router; the base's if absent."})
    router_layers: int | None = field(default=None, metadata={"help": "Layers of it to keep; all if absent."})
    router_balance: float = field(
        default=0.0, metadata={"help": "0 weighs each row of its training alike, 1 each task, for tasks of few rows."}
    )
    router: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Settings of the router's training."}
    )
    phase1: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "Settings of phase 1."})
    phase2: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "Settings of phase 2."})
    phase3: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "Settings of phase 3."})
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Phase 2: quantise the frozen base to 8 bits; needs bitsandbytes."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Phase 2: quantise it to 4 bits (NF4, as QLoRA); needs bitsandbytes."}
    )
    joint_experts: bool = field(
        default=True, metadata={"help": "Train all experts of a task in one run, not one after the other."}
    )
    without_outer: bool = field(default=True, metadata={"help": "Train DMoERM-w/o-Outer too."})
    ensemble_size: int = field(
        default=5, metadata={"help": "Members of the baseline ensemble; the first is 'single'."}
    )
    baselines: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Settings of the baselines' training."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the splits, the weights and the order of the data."})
    workers: int = field(
        default=1, metadata={"help": "Stages trained at once, each in a process of one thread (CPU)."}
    )
    report_to: str = field(default="none", metadata={"help": "Where metrics are reported, such as 'tensorboard'."})

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
            try:  # on the command line they are JSON
                settings = json.loads(settings) if isinstance(settings, str) else settings or {}
            except json.JSONDecodeError as error:
                raise ValueError(f"`{stage}` of the recipe: got {settings!r}, need JSON: {error}.") from error
            if not isinstance(settings, dict):
                raise ValueError(f"`{stage}` of the recipe: got {settings!r}, need `key: value` pairs.")
            setattr(self, stage, settings)
        for stage in DEFAULTS:
            self.phase(stage, output_dir=self.output_dir)
        from ..modeling.quantization import quantization

        if quantization(self.load_in_4bit, self.load_in_8bit) and self.phase2.get("deepspeed"):  # not after phase 1
            raise ValueError(
                f"`phase2` of the recipe: got deepspeed={self.phase2['deepspeed']!r} and a quantised base, need one of them, "
                "because ZeRO cannot divide such a base: leave `deepspeed` out, so that each GPU has all of it."
            )
        if self.task_base_models and self.share_base:
            raise ValueError(
                f"`task_base_models` of the recipe: got {self.task_base_models} and share_base=True, need one of them, because "
                "tasks that share a base have one: leave `share_base` out."
            )

    @property
    def task_table(self) -> TaskTable:
        return TaskTable.load(self.tasks)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The arguments of `DMoERMConfig` that the recipe sets."""
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers")
        return {name: getattr(self, name) for name in (*names, "aggregator_hidden_size", "activation", "share_base")}

    def phase(self, stage: str, output_dir: str, seed: int | None = None, **more: Any) -> "RankedRewardConfig":
        """
        The training arguments of one stage: its defaults, overridden by the recipe.

        Args:
            stage (`str`): `"router"`, `"phase1"`, `"phase2"`, `"phase3"` or `"baselines"`.
            output_dir (`str`): folder of its checkpoints.

        Raises:
            ValueError: if the recipe sets a key that training arguments do not have, or a value that they cannot have.
        """
        from .ranked_trainer import RankedRewardConfig

        names = {field.name for field in fields(RankedRewardConfig)}
        if lost := [name for name in ("save_only_model", "ignore_data_skip") if getattr(self, stage).get(name)]:
            raise ValueError(
                f"`{stage}` of the recipe: got {lost[0]}=True, need False, because a run that was killed would not go on as it was."
            )
        if tokenizers := [name for name in OF_THE_TOKENIZER if getattr(self, stage).get(name) is not None]:
            raise ValueError(
                f"`{stage}` of the recipe: got {tokenizers}, need one tokenizer for all stages, because texts are tokenised once: "
                "set it in the base model's folder."
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
        """A stage's settings on which its result depends; its step has its size, however it is divided over processes."""
        from .ranked_trainer import RankedRewardConfig

        given = {**DEFAULTS[stage], **getattr(self, stage)}
        own = {name: getattr(RankedRewardConfig, name) for name in DIVISION} | given
        prompts, batches, _ = (own.pop(name) for name in DIVISION)
        kept = {name: own[name] for name in own.keys() & given.keys() - NOT_OF_THE_RESULT}
        size = batches * processes
        if own.get("train_tokens_per_batch") is None:
            return {stage: kept, f"prompts a step of {stage}": prompts * size}
        return {stage: kept, f"batches a step of {stage}": size}

    def fingerprint(self) -> dict[str, Any]:
        """All settings on which the result depends; of the tasks and of data in files, what stands in them."""
        settings = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("output_dir", "workers", "report_to", "extend")
        }
        table = self.task_table
        settings["tasks"] = {task: list(points) for task, points in {**table.tasks, OVERALL: table.overall}.items()}
        for name in ("train_data", "test_data"):
            if settings[name] is not None and Path(settings[name]).is_file():
                settings[f"sha256 of {name}"] = file_digest([Path(settings[name])])
        return settings


def _culprit(settings: dict[str, Any], output_dir: str) -> str:
    """Name the setting that training arguments cannot have, whatever the others are, if there is one."""
    from .ranked_trainer import RankedRewardConfig

    for name, value in settings.items():
        try:
            RankedRewardConfig(output_dir=output_dir, **{name: value})
        except UNUSABLE:
            return f"got {name}={value!r}: "
    return ""


@cache
def _phase_hints() -> dict[str, Any]:
    from .ranked_trainer import RankedRewardConfig

    return get_type_hints(RankedRewardConfig)


def _share(value: float) -> bool:
    return 0 <= value < 1


RANGES = {
    "on_error": (("raise", "skip").__contains__, "'raise' or 'skip'"),
    "max_length": (lambda value: value >= 1, "at least 1 token"),
    "test_share": (_share, "a share of the prompts, from 0 to below 1"),
    "phase1_share": (lambda value: 0 < value < 1, "a share of the prompts, between 0 and 1"),
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
}
"""Key -> whether a value can be, and what is needed."""

UNUSABLE = (ValueError, TypeError, ArithmeticError, AttributeError, KeyError, ImportError, OSError)
"""What training arguments raise for values that they cannot have."""

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
"""Settings of a stage with which the result is the same if the prompts of a step are as many."""

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
"""Settings of a stage that may change after it."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "router": {"learning_rate": 5e-5, "per_device_train_batch_size": 16},
    "phase1": {"learning_rate": 1e-7},  # table 4
    "phase2": {"learning_rate": 5e-5},
    "phase3": {"learning_rate": 1e-6},
    "baselines": {"learning_rate": 1e-7},
}
