"""What `dmoerm train --config recipe.yaml` reads."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..modeling.quantised import quantization
from ..tasks import OVERALL, TaskTable
from .trainer import PhaseConfig


@dataclass
class Recipe:
    """
    One whole training: data, model, the router, the three phases, the baselines. Each key can stand in a YAML file or on
    the command line (a stage's settings there as JSON); the keys of `router`, `phase1`, `phase2`, `phase3` and `baselines` are those of
    [`~dmoerm_trl.training.trainer.PhaseConfig`], which are those of TRL's `RewardConfig`.
    """

    output_dir: str = field(metadata={"help": "Folder of the run. A run that was killed goes on there."})
    base_model: str = field(metadata={"help": "Pretrained model, anything `AutoModel` loads: a hub name or a folder."})
    train_data: str = field(metadata={"help": "Preference rows: a file, a folder or a hub name; recipes/DATA.md."})

    # Data
    test_data: str | None = field(default=None, metadata={"help": "Test rows; without it a share of `train_data`."})
    tasks: str = field(default="paper", metadata={"help": "'paper', 'paper-zh' (table 12), or a YAML file."})
    on_error: str = field(
        default="raise", metadata={"help": "What to do with a bad row: 'raise', or 'skip' and count."}
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
        if self.ensemble_size < 0 or self.workers < 1:
            raise ValueError(
                f"got ensemble_size={self.ensemble_size} and workers={self.workers}, need at least 0 and 1."
            )
        if str(self.lora_layers).isdecimal():  # a number on the command line is text
            self.lora_layers = int(self.lora_layers)
        for stage in DEFAULTS:
            settings = getattr(self, stage)
            try:  # on the command line they are JSON
                settings = json.loads(settings) if isinstance(settings, str) else settings or {}
            except json.JSONDecodeError as error:
                raise ValueError(f"`{stage}` of the recipe: got {settings!r}, need JSON: {error}.") from error
            setattr(self, stage, settings)
            self.phase(stage, output_dir=self.output_dir)
        if quantization(self.load_in_4bit, self.load_in_8bit) and self.phase2.get("deepspeed"):  # not after phase 1
            raise ValueError(
                f"`phase2` of the recipe: got deepspeed={self.phase2['deepspeed']!r} and a quantised base, need one of them, "
                "because ZeRO cannot divide such a base: leave `deepspeed` out, so that each GPU has all of it."
            )

    @property
    def task_table(self) -> TaskTable:
        return TaskTable.load(self.tasks)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The arguments of `DMoERMConfig` that the recipe sets."""
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers")
        return {name: getattr(self, name) for name in (*names, "aggregator_hidden_size", "activation", "share_base")}

    def phase(self, stage: str, output_dir: str, seed: int | None = None, **more: Any) -> PhaseConfig:
        """
        The training arguments of one stage: its defaults, overridden by the recipe.

        Args:
            stage (`str`): `"router"`, `"phase1"`, `"phase2"`, `"phase3"` or `"baselines"`.
            output_dir (`str`): folder of its checkpoints.

        Raises:
            ValueError: if the recipe sets a key that training arguments do not have, or a number is none.
        """
        fields = PhaseConfig.__dataclass_fields__
        if unknown := set(getattr(self, stage)) - set(fields) | set(getattr(self, stage)) & set(TOP_LEVEL):
            raise ValueError(
                f"`{stage}` of the recipe: got the unknown keys {sorted(unknown)}, need arguments of trl.RewardConfig "
                f"(such as learning_rate, num_train_epochs, per_device_train_batch_size) or `patience`; {TOP_LEVEL} are "
                "keys of the whole recipe."
            )
        settings = {**DEFAULTS[stage], **getattr(self, stage), **more}
        for name, value in settings.items():
            if isinstance(value, str) and isinstance(fields[name].default, float):  # YAML reads 1e-7 as text
                try:
                    settings[name] = float(value)
                except ValueError as error:
                    raise ValueError(f"`{stage}` of the recipe: got {name}={value!r}, need a number.") from error
        return PhaseConfig(
            output_dir=output_dir, seed=self.seed if seed is None else seed, report_to=self.report_to, **settings
        )

    def fingerprint(self) -> dict[str, Any]:
        """All settings on which the result depends; of the tasks and of data in files, what stands in them."""
        settings = {
            key: value for key, value in asdict(self).items() if key not in ("output_dir", "workers", "report_to")
        }
        table = self.task_table
        settings["tasks"] = {task: list(points) for task, points in {**table.tasks, OVERALL: table.overall}.items()}
        for name in ("train_data", "test_data"):
            if settings[name] is not None and Path(settings[name]).is_file():
                settings[f"sha256 of {name}"] = hashlib.sha256(Path(settings[name]).read_bytes()).hexdigest()
        return settings


TOP_LEVEL = ("output_dir", "report_to", "seed", "max_length", "load_in_8bit", "load_in_4bit")

DEFAULTS: dict[str, dict[str, Any]] = {
    "router": {"learning_rate": 5e-5, "per_device_train_batch_size": 16},
    "phase1": {"learning_rate": 1e-7},  # table 4
    "phase2": {"learning_rate": 5e-5},
    "phase3": {"learning_rate": 1e-6},
    "baselines": {"learning_rate": 1e-7},
}
