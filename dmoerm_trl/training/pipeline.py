"""The whole training as a list of stages, each done once: a run that was killed goes on where it was."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from functools import cached_property, partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.formatting import Formatter
from ..data.rows import PreferenceRow, load_rows
from ..distributed.processes import check_joined, is_main, processes, start_worker, wait_for_all
from ..files import locked_folder, read_json, write_json
from ..modeling.assembly import assemble, export_expert, with_task
from ..modeling.card import write_model_card
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..modeling.quantization import quantization
from ..modeling.router import Router
from ..tasks import OVERALL, slug
from .checks import check_models, check_places, formatter_of
from .growth import Growth
from .phases import normalise, phase1, phase2, phase3, train_router
from .recipe import DEFAULTS, Recipe
from .rehearsal import rehearse
from .run_data import DIGESTS, RunData, parts_of, read_run_data
from .stages import History, Manifest, Stage, StageRecord, identities, identity, stage_records


class Pipeline:
    """
    The stages of a recipe and the folder in which they leave their results:

    ```
    manifest.json               what each finished stage was made of, and the seconds that it took
    data/                       the rows of each part, test.jsonl among them; report.txt
    router/                     the outer layer
    <task>/phase1/              the task's base
    <task>/experts/<point>/     its experts, ordinary PEFT adapters of the base, each with its history
    <task>/phase3/              the task's inner model; overall/phase3 is DMoERM-w/o-Outer
    ensemble/<i>/               the baselines; 0 is the single reward model
    model/                      the DMoERM
    ```

    A stage's folder appears when the stage is done, by a rename; `<task>/experts` is one stage with `joint_experts`, else
    each expert is. While a stage trains, its checkpoints are in `work/<stage>/`, in a folder for what it is made of. Nothing else
    in the folder is touched.

    A finished stage stays if it is made of the same as the recipe says now; see [`~dmoerm_trl.training.growth.Growth`].

    Of several processes, started by a launcher, all train each stage together; the main one alone writes.

    Example:

    ```python
    from dmoerm_trl import Pipeline, Recipe

    run = Pipeline(Recipe("runs/mine", "runs/demo/base", "runs/demo/data/test.jsonl"))
    run.trainings[:2]  # run.run() trains all of them, or those that are left
    ```
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
        aggregator = self._of("aggregator_hidden_size", "unit_variance", step="phase3")
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
        """Settings of the recipe, and those of a stage's training."""
        settings = {name: getattr(self.recipe, name) for name in names}
        return settings if step is None else settings | self.recipe.step_settings(step, processes())

    @cached_property
    def _data_settings(self) -> dict[str, Any]:
        """What the rows of the parts depend on; of data in files what stands in them, not where they are."""
        settings = self.recipe.fingerprint()
        names = ("tasks", "on_error", "max_length", "test_share", "phase1_share", "validation_share", "seed")
        names += ("base_model", "score_thinking", "pad_token", "share_base", "without_outer")
        sources = {name: settings.get(f"sha256 of {name}", settings[name]) for name in ("train_data", "test_data")}
        return sources | {name: settings[name] for name in names}

    # What a run is made of

    @cached_property
    def formatter(self) -> Formatter:
        return formatter_of(self.recipe)

    def rows(self, *parts: str, task: str = OVERALL) -> list[PreferenceRow]:
        """The rows of some parts of the data, of one task or of all."""
        rows = []
        for part in parts:
            rows += load_rows(str(self.root / "data" / f"{part}.jsonl"), tasks=self.tasks)[0]
        return [row for row in rows if task in (OVERALL, row.task)]

    def load(self, stage: str, **options: Any) -> DMoERMForSequenceClassification:
        """The model that a stage left; with further arguments of `from_pretrained`."""
        return DMoERMForSequenceClassification.from_pretrained(str(self.root / stage), **options)

    def history(self, training: str) -> History:
        """The log history of one of [`Pipeline.trainings`]."""
        folder = self.root / training
        return read_json(folder / "history.json", f"put it back, or delete {folder} to make this stage anew")

    @property
    def trainings(self) -> list[str]:
        """The folders of all that is trained, one an expert however the experts are trained, in the stages' order."""
        names = [stage.trainings or (name,) for name, stage in self.stages.items() if name not in ("data", "model")]
        return [name for of_stage in names for name in of_stage]

    @property
    def manifest(self) -> dict[str, Any]:
        """What stands in `manifest.json`; see [`~dmoerm_trl.training.stages.Manifest`]."""
        return Manifest(self.root).content

    # The stages

    def _data(self, folder: Path) -> History:
        if is_main():
            self.run_data.save(folder, self.tasks)
        return []

    @cached_property
    def run_data(self) -> RunData:
        """The rows as the recipe says now, read anew."""
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
        ranked = [row for row in eval_rows if row.pairs_of()]  # rows for the experts alone are not of this training
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
        """What phase 1 left, for a task's experts as the recipe has them now: it does not depend on theirs."""
        model = with_task(self.load(stage, **options), task)
        for name, value in self.recipe.model_settings.items():
            setattr(model.config, name, value)
        return model

    def _phase3(self, task: str, base: str, folder: Path) -> History:
        points = self.tasks.overall if task == OVERALL else self.tasks.tasks[task]
        model, history = phase3(
            self._base(base, task),
            {point: self.root / slug(task) / "experts" / slug(point) for point in points},
            self.rows("phase3_train", task=task),
            self.rows("phase3_validation", task=task),
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

    # What is found before any training

    def check(self) -> None:
        """
        Find what can be found wrong before any training: the folder and what is finished in it, the settings of all stages as
        their trainers read them, tokenizers, LoRA targets, the bases' weights and positions, rows and labels.

        Raises:
            ValueError: naming what is wrong and the way out.
        """
        self._source  # noqa: B018  (is it a run)
        self.check_finished()
        if self.finished:
            return
        check_places(self.root, [name for name in self.stages if not self._done(name)])
        check_models(self.recipe, self.tasks, self.formatter)
        steps = {self._step(name) for name in self.stages if not self._done(name)} - {None}
        rehearse(self.recipe, self.formatter, steps)
        if is_main() and not (self._done("data") and self._data_stays(Manifest(self.root))):
            self.run_data  # noqa: B018  (reads and checks the rows)

    def _data_stays(self, finished: Manifest) -> bool:
        return finished.record("data")["settings"] == json.loads(json.dumps(self._data_settings))

    def check_finished(self) -> None:
        """
        Check that what is finished in the folder belongs to this recipe.

        Raises:
            ValueError: if what is finished would be another by the recipe, or is not whole any more.
        """
        finished = Manifest(self.root)
        there = [name for name in self.stages if finished.has(name)]
        for name in there:
            finished.check_files(name)
        if not set(there) - {"data"}:
            return
        changed, digests = [], self._digests
        if "data" not in there or not self._data_stays(finished):
            now = json.loads(json.dumps(self._data_settings))
            before = finished.record("data")["settings"] if "data" in there else now
            changed = [key for key in now if before.get(key) != now[key]]
            try:
                digests = self.run_data.digests(self.tasks)
            except ValueError:
                digests = self._digests_of(finished)  # the settings alone are compared
                if not self._growth(finished, digests, changed).keys:
                    raise
        growth = self._growth(finished, digests, changed)
        if not growth.again and not growth.gone:
            return
        step = "; with another number of processes, change `gradient_accumulation_steps` so that a step has as much as before"
        raise ValueError(
            f"{self.root}: got finished stages of a recipe that differs in {growth.keys}, need the same to go on: choose another "
            f"`output_dir`; with `--extend {self.root}` its run takes over what stays"
            + (step if any(key.startswith(("prompts a step", "batches a step")) for key in growth.keys) else "")
            + f".\n{growth}"
        )

    def _growth(self, finished: Manifest, digests: dict[str, Any], changed: Sequence[str]) -> Growth:
        return Growth.of(self.stages, stage_records(self.stages, digests), finished, changed)

    def _digests_of(self, finished: Manifest) -> dict[str, Any]:
        """Those of the finished stages' rows."""
        digests: dict[str, Any] = {}
        for name, stage in self.stages.items():
            if stage.rows and finished.has(name):
                first, *point = stage.rows
                rows = finished.record(name)["rows"]
                digests[first] = {**digests.get(first, {}), point[0]: rows} if point else rows
        return digests

    def _step(self, name: str) -> str | None:
        """The key of the recipe under which a stage's training has its settings."""
        return next((step for step in DEFAULTS if step in self.stages[name].settings), None)

    # What is taken over

    @cached_property
    def _source(self) -> Manifest | None:
        """The run that this one extends."""
        folder = self.recipe.extend or Manifest(self.root).content.get("extends")
        if folder is None:
            return None
        source = Manifest(Path(folder))
        if not source.path.exists() or source.root.resolve() == self.root.resolve():
            raise ValueError(
                f"`extend` of the recipe: got {folder}, need the folder of another run, with its manifest.json, because finished "
                "stages are taken over from there: name one, or leave it out."
            )
        return source

    def _source_has(self, name: str, point: str | None = None) -> bool:
        """Whether the other run has a stage, or one of a stage's experts, made of the same."""
        source = self._source
        if source is None or not source.has(name):
            return False
        training = name if point is None else f"{name}/{point}"
        now, before = (identities(name, record) for record in (self._record(name), source.record(name)))
        return training in now and now[training] == before.get(training)

    def _take_over(self) -> None:
        """Copy the stages that the other run has, and say which; experts are taken over one by one, in their stage's turn."""
        source = self._source
        before = source.record("data")["settings"] if source.has("data") else {}
        now = json.loads(json.dumps(self._data_settings))
        changed = [key for key in now if before.get(key) != now[key]]
        print(f"of {source.root}:\n{self._growth(source, self._digests, changed)}")
        for name in self.stages:
            if name != "data" and not self._done(name) and self._source_has(name):
                source.check_files(name)
                self._begin(name)
                folder = self._work_folder(name) / "result"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(source.root / name, folder)
                self._put(name, folder)
                self._note(name, 0.0)

    # Running them

    @property
    def finished(self) -> bool:
        return all(self._done(name) for name in self.stages)

    def run(self) -> None:
        """
        Run every stage that is not done, in an order in which each finds what it needs, in a folder that no other run writes
        meanwhile. The folder is a run's from its first finished stage on; until then the recipe may change at will.
        """
        check_joined(self.recipe.workers)
        with locked_folder(self.root):
            self.check()
            finished = Manifest(self.root)
            done = {name for name in self.stages if self._done(name)}
            if "data" in done and not self._data_stays(finished):
                done.remove("data")
            wait_for_all()  # before one of them changes what the others look for
            if is_main():
                self._claim(finished, anew="data" not in done)
            self._run_rest(done)

    def _claim(self, finished: Manifest, anew: bool) -> None:
        if anew and finished.has("data"):  # no training depends on what changed in it
            for path in finished["files"].get("data", {}):
                (self.root / "data" / path).unlink(missing_ok=True)
            with suppress(OSError):
                (self.root / "data").rmdir()
            check_places(self.root, ["data"])
        for name in self.stages:  # of a run that was killed right after it
            if self._done(name) and name not in finished["files"]:
                finished.note_files(name)
        finished.content["recipe"] = json.loads(json.dumps(self.recipe.fingerprint()))
        if self._source is not None:
            finished.content["extends"] = str(self._source.root)
        for name in self.stages:
            if self._done(name) and name not in finished["files"]:  # a kill came between its end and the note of it
                finished.note_files(name)
        finished.save()

    def _run_rest(self, done: set[str]) -> None:
        bar = {"desc": "training", "unit": " stages", "disable": not is_main()}
        with tqdm(total=len(self.stages), initial=len(done), **bar) as progress:
            if "data" not in done:
                self._begin("data")
                self._finished("data", self.run_stage("data"), done, progress)
            if self._source is not None:
                if is_main():
                    self._take_over()
                wait_for_all()
                done.update(name for name in self.stages if self._done(name))
                progress.update(len(done) - progress.n)
            if self.recipe.workers > 1:
                self._run_in_workers(done, progress)
            for name in self.stages:
                if name not in done:
                    progress.set_postfix_str(name)
                    self._begin(name)
                    self._finished(name, self.run_stage(name), done, progress)
        if is_main():
            self._tidy()

    def _run_in_workers(self, done: set[str], progress: tqdm) -> None:
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        arguments = {"max_workers": self.recipe.workers, "mp_context": context, "initializer": _start_worker}
        with ProcessPoolExecutor(**arguments, initargs=(os.getpid(), stop)) as pool:
            running = {}
            try:
                while len(done) < len(self.stages):
                    for name, stage in self.stages.items():
                        ready = name not in done and name not in running.values() and done.issuperset(stage.needs)
                        if ready and len(running) < self.recipe.workers:
                            self._begin(name)
                            running[pool.submit(_run_stage, self.recipe, name)] = name
                    progress.set_postfix_str(", ".join(sorted(running.values())))
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._finished(running.pop(future), future.result(), done, progress)
            except BaseException:
                stop.set()  # else the error would wait for the other stages, which may take hours
                raise

    def run_stage(self, name: str) -> float:
        """Run one stage, whose needs must be there, and return the seconds that it took."""
        start = time.perf_counter()
        work = self._work_folder(name)
        folder = work / "result"
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        wait_for_all()
        history = self.stages[name].run(folder)
        wait_for_all()  # another may still read from the checkpoints, which go now
        if is_main():
            write_json(folder / "history.json", history)
            self._put(name, folder)
        wait_for_all()
        return time.perf_counter() - start

    def _put(self, name: str, folder: Path) -> None:
        """A finished stage's folder appears at once, and what it was made in goes."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        folder.rename(self.root / name)
        work = self._work_folder(name)
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            work.parent.rmdir()

    def _done(self, name: str) -> bool:
        trainings = self.stages[name].trainings or ()
        return all((self.root / one / "history.json").is_file() for one in (name, *trainings))

    @property
    def _digests(self) -> dict[str, Any]:
        """Those of the rows in `data/`."""
        path = self.root / "data" / DIGESTS
        return read_json(path, f"put it back, or delete {path.parent} to read the rows anew") if path.is_file() else {}

    def _record(self, name: str) -> StageRecord:
        """What a stage is made of."""
        return stage_records(self.stages, self._digests)[name]

    def _work_folder(self, name: str) -> Path:
        """Where a stage is made: the checkpoints of other settings are elsewhere."""
        return self.root / "work" / name / identity(self._record(name))

    def _work(self, result: Path) -> Path:
        return result.parent / "checkpoints"

    def _begin(self, name: str) -> None:
        """Note what a stage is made of; it counts from when the stage's folder is there."""
        if not is_main():
            return
        manifest = Manifest(self.root)
        manifest["stages"][name] = self._record(name)
        begun = manifest["begun"].setdefault(name, [])
        if (folder := self._work_folder(name).name) not in begun:
            begun.append(folder)
        manifest.save()

    def _finished(self, name: str, seconds: float, done: set[str], progress: tqdm) -> None:
        done.add(name)
        progress.update()
        if is_main():
            self._note(name, seconds)

    def _note(self, name: str, seconds: float) -> None:
        manifest = Manifest(self.root)
        manifest["seconds"][name] = manifest["seconds"].get(name, 0) + seconds
        manifest.note_files(name)
        manifest.save()

    def _tidy(self) -> None:
        """Delete what stages were begun in, and folders that are then empty."""
        manifest = Manifest(self.root)
        for name, folders in manifest["begun"].items():
            for folder in folders:
                shutil.rmtree(self.root / "work" / name / folder, ignore_errors=True)
            for path in (self.root / "work" / name, *(self.root / "work" / name).parents):
                if path == self.root:
                    break
                with suppress(OSError):
                    path.rmdir()
        manifest["begun"].clear()
        manifest.save()


def _start_worker(parent: int, stop: Event) -> None:
    start_worker(parent, threads=1, stop=stop)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the trainers print their logs


_pipelines: dict[str, Pipeline] = {}


def _run_stage(recipe: Recipe, name: str) -> float:
    pipeline = _pipelines.setdefault(recipe.output_dir, Pipeline(recipe))
    return pipeline.run_stage(name)
