"""The stages of a recipe: their settings and inputs, and the functions that run them."""

import shutil
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ..data.formatting import Formatter
from ..data.rows import PreferenceRow, load_rows
from ..distributed.processes import is_main, processes
from ..files import read_json, write_json
from ..modeling.assembly import assemble, export_expert, with_task
from ..modeling.card import write_model_card
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..modeling.quantization import quantization
from ..modeling.router import Router
from ..tasks import OVERALL, slug
from .checks import formatter_of
from .phases import normalise, phase1, phase2, phase3
from .recipe import Recipe
from .router_training import train_router
from .run_data import DIGESTS, RunData, parts_of, read_run_data
from .stages import History, Manifest, Stage, StageRecord, identities, identity, stage_records


class RecipeStages:
    """
    Stages of a recipe, in an order in which each follows the stages that it needs.
    [`~dmoerm_trl.training.pipeline.Pipeline`] runs them.

    Attributes:
        recipe (`Recipe`), tasks (`TaskTable`): The recipe and its tasks.
        root (`Path`): Folder of the run.
        stages (`dict[str, Stage]`): Folder of a stage's result -> the stage.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.root = Path(recipe.output_dir)
        self.tasks = recipe.task_table
        self.stages = self._stages()

    def _stages(self) -> dict[str, Stage]:
        recipe, table = self.recipe, self.tasks
        points = dict(table.tasks)
        if recipe.without_outer:
            points[OVERALL] = table.overall
        read = self._of("base_model", "trust_remote_code", "max_length", "score_thinking", "pad_token", "seed")
        router = self._of("router_model", "router_layers", "router_balance", step="router")
        lora = [name for name in recipe.model_settings if name.startswith("lora_")]
        experts_of = self._of(*lora, "activation", "load_in_8bit", "load_in_4bit", "joint_experts", step="phase2")
        of_aggregator = [name for name in recipe.model_settings if name.startswith("aggregator_")]
        aggregator = self._of(*of_aggregator, "phase3_rows", "unit_variance", step="phase3")
        stages = {
            "data": Stage(self._data, settings=self._data_settings),
            "router": Stage(
                self._router, ("data",), settings=read | router | {"tasks": list(table.tasks)}, rows=("router",)
            ),
        }
        bases = {task: OVERALL if recipe.share_base else task for task in points}
        for base in dict.fromkeys(bases.values()):
            own = {"task_base_models": recipe.task_base_models.get(base)}
            settings = read | own | self._of("share_base", "activation", step="phase1")
            name = f"{slug(base)}/phase1"
            stages[name] = Stage(partial(self._phase1, base), ("data",), settings=settings, rows=(name,))
        for task, task_points in points.items():
            base, together = f"{slug(bases[task])}/phase1", f"{slug(task)}/experts"
            experts = tuple(f"{together}/{slug(point)}" for point in task_points)
            settings = read | experts_of
            if recipe.joint_experts:
                stages[together] = Stage(
                    partial(self._experts, task, base, task_points), (base,), experts, settings, (together,)
                )
                needs = (together,)
            else:
                needs = experts
                for name, point in zip(experts, task_points, strict=True):
                    rows = (together, slug(point))
                    stages[name] = Stage(partial(self._expert, task, base, point), (base,), None, settings, rows)
            settings = read | aggregator | {"tasks": list(task_points)}
            name = f"{slug(task)}/phase3"
            stages[name] = Stage(partial(self._phase3, task, base), (base, *needs), settings=settings, rows=(name,))
        for member in range(recipe.ensemble_size):
            settings = read | self._of("activation", step="baselines")
            stages[f"ensemble/{member}"] = Stage(
                partial(self._member, member), ("data",), settings=settings, rows=("ensemble",)
            )
        inner = tuple(f"{slug(task)}/phase3" for task in table.tasks)
        stages["model"] = Stage(self._assemble, ("router", *inner))
        return stages

    def _of(self, *names: str, step: str | None = None) -> dict[str, Any]:
        """Select settings of the recipe and, if given, of a stage's training."""
        settings = self.recipe.recorded(names)
        return settings if step is None else settings | self.recipe.step_settings(step, processes())

    @cached_property
    def _data_settings(self) -> dict[str, Any]:
        """Return the settings on which the rows of the parts depend, with digests instead of the paths of data files."""
        settings = self.recipe.fingerprint()
        names = ("tasks", "on_error", "max_length", "test_share", "phase1_share", "validation_share", "seed")
        names += ("base_model", "score_thinking", "pad_token", "share_base", "without_outer")
        sources = {name: settings.get(f"sha256 of {name}", settings[name]) for name in ("train_data", "test_data")}
        return sources | {name: settings[name] for name in names}

    # Data and models of the run

    @cached_property
    def formatter(self) -> Formatter:
        return formatter_of(self.recipe)

    def rows(self, *parts: str, task: str = OVERALL) -> list[PreferenceRow]:
        """Load the rows of some parts of the data, of one task or of all."""
        rows = []
        for part in parts:
            rows += load_rows(str(self.root / "data" / f"{part}.jsonl"), tasks=self.tasks)[0]
        return [row for row in rows if task in (OVERALL, row.task)]

    def load(self, stage: str, **options: Any) -> DMoERMForSequenceClassification:
        """Load the model of a finished stage; `options` are further arguments of `from_pretrained`."""
        return DMoERMForSequenceClassification.from_pretrained(str(self.root / stage), **options)

    # The stages

    def _data(self, folder: Path) -> History:
        if is_main():
            self.run_data.save(folder, self.tasks)
        return []

    @cached_property
    def run_data(self) -> RunData:
        """The rows of the current recipe, read from their source instead of from `data/`."""
        part_of = {}
        if (source := self._source) is not None and source.has("data"):
            before, now = source.record("data")["settings"], self._data_settings
            if all(before[key] == now[key] for key in ("test_share", "phase1_share", "validation_share", "seed")):
                part_of = parts_of(source.root / "data")
        return read_run_data(self.recipe, self.tasks, self.formatter, part_of)

    def _router(self, folder: Path) -> History:
        router, history = train_router(
            self.recipe.router_model or self.recipe.base_model,
            list(self.tasks.tasks),
            self.rows("phase1_train", "phase3_train"),
            self.rows("phase1_validation", "phase3_validation"),
            self.formatter,
            self._arguments("router", folder),
            num_layers=self.recipe.router_layers,
            balance=self.recipe.router_balance,
            trust_remote_code=self.recipe.trust_remote_code,
        )
        if is_main():
            router.save_pretrained(folder)
        return history

    def _phase1(self, task: str, folder: Path) -> History:
        rows = self.rows("phase1_train", task=task), self.rows("phase1_validation", task=task)
        return self._full_fine_tuning(task, *rows, folder, self._arguments("phase1", folder), unit_variance=False)

    def _member(self, member: int, folder: Path) -> History:
        rows = self.rows("phase1_train", "phase3_train"), self.rows("phase1_validation", "phase3_validation")
        args = self._arguments("baselines", folder, seed=self.recipe.seed + member)
        return self._full_fine_tuning(OVERALL, *rows, folder, args, unit_variance=True)

    def _full_fine_tuning(self, task, train_rows, eval_rows, folder, args, unit_variance) -> History:
        model, history = phase1(
            self.recipe.task_base_models.get(task, self.recipe.base_model),
            task,
            train_rows,
            eval_rows,
            self.formatter,
            args,
            trust_remote_code=self.recipe.trust_remote_code,
            **self.recipe.model_settings,
        )
        ranked = [row for row in eval_rows if row.pairs_of()]  # the other rows are only for the experts
        normalise(model, ranked, self.formatter, unit_variance=unit_variance)
        self._save(model, folder)
        return history

    def _experts(self, task: str, base: str, points: Sequence[str], folder: Path) -> History:
        name = f"{slug(task)}/experts"
        kept = [point for point in points if self._source_has(name, slug(point))]
        for point in kept:
            if is_main():
                self._source.check_files(name)
                shutil.copytree(self._source.root / name / slug(point), folder / slug(point))
        if not (points := [point for point in points if point not in kept]):
            return []
        model, histories = self._phase2(task, base, points, folder)
        for point, history in histories.items():
            if is_main():
                export_expert(model, task, point, folder / slug(point))
                write_json(folder / slug(point) / "history.json", history)
        return []

    def _expert(self, task: str, base: str, point: str, folder: Path) -> History:
        model, histories = self._phase2(task, base, [point], folder)
        if is_main():
            export_expert(model, task, point, folder)
        return histories[point]

    def _phase2(self, task: str, base: str, points: Sequence[str], folder: Path) -> Any:
        args, options = self._arguments("phase2", folder), {}
        compute_dtype = torch.bfloat16 if args.bf16 else torch.float32
        if config := quantization(self.recipe.load_in_4bit, self.recipe.load_in_8bit, compute_dtype):
            options = {"quantization_config": config, "device_map": args.device}
        return phase2(
            self._base(base, task, **options),
            points,
            self.rows("phase1_train", "phase3_train", task=task),
            self.rows("phase1_validation", task=task),
            self.formatter,
            args,
        )

    def _base(self, stage: str, task: str, **options: Any) -> DMoERMForSequenceClassification:
        """Load the model of phase 1 with the recipe's current settings for the experts, on which phase 1 does not depend."""
        model = with_task(self.load(stage, **options), task)
        for name, value in self.recipe.model_settings.items():
            setattr(model.config, name, value)
        return model

    def _phase3(self, task: str, base: str, folder: Path) -> History:
        points = self.tasks.overall if task == OVERALL else self.tasks.tasks[task]
        phases = ("phase1", "phase3") if self.recipe.phase3_rows == "all" else ("phase3",)
        rows = (self.rows(*(f"{phase}_{part}" for phase in phases), task=task) for part in ("train", "validation"))
        model, history = phase3(
            self._base(base, task),
            {point: self.root / slug(task) / "experts" / slug(point) for point in points},
            *rows,
            self.formatter,
            self._arguments("phase3", folder),
            unit_variance=self.recipe.unit_variance,
        )
        self._save(model, folder)
        return history

    def _assemble(self, folder: Path) -> History:
        if not is_main():
            return []
        inner_models = {task: self.load(f"{slug(task)}/phase3") for task in self.tasks.tasks}
        router = Router.from_pretrained(str(self.root / "router"))
        self._save(assemble(inner_models, router), folder)
        return []

    def _arguments(self, stage: str, folder: Path, **options: Any) -> Any:
        if self.recipe.workers > 1:
            options["disable_tqdm"] = True
        return self.recipe.phase(stage, str(self._work(folder)), **options)

    def _save(self, model: DMoERMForSequenceClassification, folder: Path) -> None:
        if is_main():
            model.save_pretrained(folder)
            self.formatter.tokenizer.save_pretrained(folder)
            write_model_card(model, folder)

    # Folders and finished stages

    @cached_property
    def _source(self) -> Manifest | None:
        """Manifest of the run that this one extends."""
        folder = self.recipe.extend or Manifest(self.root).content.get("extends")
        if folder is None:
            return None
        source = Manifest(Path(folder))
        if not source.path.exists() or source.root.resolve() == self.root.resolve():
            raise ValueError(
                f"`extend` of the recipe: got {folder}, need the folder of another run with its manifest.json, because "
                "finished stages are copied from there: name one, or leave `extend` out."
            )
        return source

    def _source_has(self, name: str, point: str | None = None) -> bool:
        """Return whether the extended run has the same stage, or the same expert of a stage."""
        source = self._source
        if source is None or not source.has(name):
            return False
        training = name if point is None else f"{name}/{point}"
        now, before = (identities(name, record) for record in (self._record(name), source.record(name)))
        return training in now and now[training] == before.get(training)

    def _done(self, name: str) -> bool:
        trainings = self.stages[name].trainings or ()
        return all((self.root / one / "history.json").is_file() for one in (name, *trainings))

    @property
    def _digests(self) -> dict[str, Any]:
        """Digests of the rows in `data/`."""
        path = self.root / "data" / DIGESTS
        return (
            read_json(path, f"put it back, or delete {path.parent} to read the rows again") if path.is_file() else {}
        )

    def _record(self, name: str) -> StageRecord:
        """Return the current record of a stage."""
        return stage_records(self.stages, self._digests)[name]

    def _work_folder(self, name: str) -> Path:
        """Return the working folder of a stage. Other settings or inputs have another folder."""
        return self.root / "work" / name / identity(self._record(name))

    def _work(self, result: Path) -> Path:
        return result.parent / "checkpoints"
