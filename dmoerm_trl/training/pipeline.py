"""The whole training as a list of stages, each done once: a run that was killed goes on where it was."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cached_property, partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..data.formatting import Formatter
from ..data.rows import PreferenceRow, check_capability_labels, load_rows, merge_same_tokens, write_rows
from ..data.splits import split_rows, split_rows_beside_test
from ..modeling.assembly import assemble, export_expert, with_task
from ..modeling.card import write_model_card
from ..modeling.configuration import DMoERMConfig
from ..modeling.experts import check_target_modules
from ..modeling.loading import loading
from ..modeling.modeling import DMoERMForSequenceClassification
from ..modeling.quantised import quantization
from ..modeling.router import Router
from ..tasks import OVERALL, slug
from ..workers import start_worker
from .distributed import check_joined, is_main, processes, wait_for_all
from .phases import History, normalise, phase1, phase2, phase3, train_router
from .recipe import DEFAULTS, Recipe
from .trainer import PhaseConfig


class Stage(NamedTuple):
    """A step of the training: it writes the folder `output_dir/<name>`, after those that it needs."""

    run: Callable[[Path], History]
    needs: tuple[str, ...] = ()
    trainings: tuple[str, ...] | None = None  # folders in it that have a history each; None for the whole


class Pipeline:
    """
    The stages of a recipe and the folder in which they leave their results:

    ```
    manifest.json               the recipe's settings, the number of processes, the seconds that each finished stage took
    data/                       the rows of each part, test.jsonl among them; report.txt
    router/                     the outer layer
    <task>/phase1/              the task's base
    <task>/experts/<point>/     its experts, ordinary PEFT adapters of the base, each with its history
    <task>/phase3/              the task's inner model; overall/phase3 is DMoERM-w/o-Outer
    ensemble/<i>/               the baselines; 0 is the single reward model
    model/                      the DMoERM
    ```

    A stage's folder appears when the stage is done, by a rename; `<task>/experts` is one stage with `joint_experts`, else
    each expert is. While a stage trains, its checkpoints are in `work/`.

    Of several processes, started by a launcher, all train each stage together; the main one alone writes.
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
        stages = {"data": Stage(self._data), "router": Stage(self._router, ("data",))}
        bases = {task: OVERALL if recipe.share_base else task for task in points}
        for base in dict.fromkeys(bases.values()):
            stages[f"{slug(base)}/phase1"] = Stage(partial(self._phase1, base), ("data",))
        for task, task_points in points.items():
            base, together = f"{slug(bases[task])}/phase1", f"{slug(task)}/experts"
            experts = tuple(f"{together}/{slug(point)}" for point in task_points)
            if recipe.joint_experts:
                stages[together] = Stage(partial(self._experts, task, base, task_points), (base,), experts)
                experts = (together,)
            else:
                for name, point in zip(experts, task_points, strict=True):
                    stages[name] = Stage(partial(self._expert, task, base, point), (base,))
            stages[f"{slug(task)}/phase3"] = Stage(partial(self._phase3, task, base), (base, *experts))
        for member in range(recipe.ensemble_size):
            stages[f"ensemble/{member}"] = Stage(partial(self._member, member), ("data",))
        inner = tuple(f"{slug(task)}/phase3" for task in table.tasks)
        stages["model"] = Stage(self._assemble, ("router", *inner))
        return stages

    # What a run is made of

    @cached_property
    def formatter(self) -> Formatter:
        with loading(self.recipe.base_model, "a base model"):
            tokenizer = AutoTokenizer.from_pretrained(
                self.recipe.base_model, trust_remote_code=self.recipe.trust_remote_code
            )
        return Formatter(tokenizer, self.recipe.max_length, self.recipe.score_thinking)

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
        return json.loads((self.root / training / "history.json").read_text())

    @property
    def trainings(self) -> list[str]:
        """The folders of all that is trained, one an expert however the experts are trained, in the stages' order."""
        names = [stage.trainings or (name,) for name, stage in self.stages.items() if name not in ("data", "model")]
        return [name for of_stage in names for name in of_stage]

    @property
    def manifest(self) -> dict[str, Any]:
        path = self.root / "manifest.json"
        if path.exists():
            return json.loads(path.read_text())
        return {"recipe": self.recipe.fingerprint(), "processes": processes(), "seconds": {}}

    # The stages

    def _data(self, folder: Path) -> History:
        if not is_main():
            return []
        recipe = self.recipe
        rows, report = load_rows(recipe.train_data, tasks=self.tasks, on_error=recipe.on_error)
        if not rows:
            raise ValueError(f"{recipe.train_data}: got no rows, need some to train on: name another file.")
        lines = [str(report)]
        shares = {"phase1": recipe.phase1_share, "validation": recipe.validation_share, "seed": recipe.seed}
        if recipe.test_data is None:
            parts = split_rows(rows, test=recipe.test_share, **shares)
        else:
            test_rows, report = load_rows(recipe.test_data, tasks=self.tasks, on_error=recipe.on_error)
            parts, removed = split_rows_beside_test(rows, test_rows, **shares)
            lines += [str(report), f"{removed} training rows removed because their prompt is in the test rows"]
        said = {}
        for name, part in parts.items():
            encodings, cuts = self.formatter.encode_rows(part)
            parts[name], same = merge_same_tokens(part, encodings)
            tokens = f"; {same} labelled pairs left out: the same tokens" if same else ""
            said[name] = f"{cuts}{tokens}"
        training = parts["phase1_train"] + parts["phase3_train"]
        for what, part in (("training rows", training), ("rows that validate phase 2", parts["phase1_validation"])):
            try:
                check_capability_labels(part, self.tasks, overall=recipe.without_outer)
            except ValueError as error:
                raise ValueError(f"{recipe.train_data}: in the {len(part)} {what}: {error}") from error
        self._check_preferences(parts)
        for name, part in parts.items():
            unranked = sum(not row.pairs_of() for row in part)
            for_experts = f", {unranked} of them without an overall preference" if unranked else ""
            lines += [f"{name}: {len(part)} rows{for_experts}; {said[name]}"]
            write_rows(part, folder / f"{name}.jsonl")
        (folder / "report.txt").write_text("\n".join(lines) + "\n")
        return []

    def _check_preferences(self, parts: dict[str, list[PreferenceRow]]) -> None:
        """Rows may have capability labels alone, but phases 1 and 3 and the test need others."""
        for name, part in parts.items():
            together = name == "test" or (name.startswith("phase1") and self.recipe.share_base)
            for task in [OVERALL] if together else self.tasks.tasks:
                rows = [row for row in part if task in (OVERALL, row.task)]
                if rows and not any(row.pairs_of() for row in rows):
                    source = self.recipe.test_data if name == "test" else None
                    raise ValueError(
                        f"{source or self.recipe.train_data}: got {len(rows)} rows of the task {task!r} in the part {name}, none "
                        "with two distinct `ranks`, need one because a base and an aggregator learn from the overall preference "
                        "and are tested by it: rank responses to more of the task's prompts."
                    )

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
            self.recipe.base_model,
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
        model, histories = self._phase2(task, base, points, folder)
        for point, history in histories.items():
            if is_main():
                export_expert(model, task, point, folder / slug(point))
                (folder / slug(point) / "history.json").write_text(json.dumps(history))
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
            with_task(self.load(base, **options), task),
            points,
            self.rows("phase1_train", "phase3_train", task=task),
            self.rows("phase1_validation", task=task),
            self.formatter,
            args,
        )

    def _phase3(self, task: str, base: str, folder: Path) -> History:
        points = self.tasks.overall if task == OVERALL else self.tasks.tasks[task]
        model, history = phase3(
            with_task(self.load(base), task),
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

    # Running them

    def check(self) -> None:
        """
        Finds what can be found wrong before any training: rows, labels, tokenizer, LoRA targets, the base's weights.

        Raises:
            ValueError: naming what is wrong and the way out.
        """
        self._check_recipe()
        recipe = self.recipe
        folders = {"data", "router", "ensemble", "model", "work", "judges", OVERALL}
        if taken := [task for task in self.tasks.tasks if slug(task) in folders]:
            raise ValueError(f"{recipe.tasks}: got the task {taken[0]!r}, whose folder is another's: rename it.")
        models = [
            DMoERMForSequenceClassification.from_base(name, task=OVERALL, trust_remote_code=recipe.trust_remote_code)
            for name in (recipe.base_model, recipe.router_model)
            if name is not None
        ]
        check_target_modules(models[0].model.backbones[OVERALL], recipe.lora_target_modules)
        configs = {
            "backbone_config": models[0].config.backbone_config,
            "router_config": models[-1].config.backbone_config,
        }
        for table in (self.tasks.tasks, {OVERALL: self.tasks.overall}):
            DMoERMConfig(tasks=table, **configs, **recipe.model_settings).layers_with_lora  # noqa: B018  (checks it)
        tokens = self.formatter.tokenizer.get_vocab()  # the tokenizer may lack a pad token
        if recipe.router_model is not None:
            tokenizer = AutoTokenizer.from_pretrained(recipe.router_model, trust_remote_code=recipe.trust_remote_code)
            if tokenizer.get_vocab() != tokens:
                raise ValueError(
                    f"`router_model` of the recipe: got {recipe.router_model}, whose tokenizer has other tokens than that of "
                    f"{recipe.base_model}, need the same, because texts are tokenised once: choose a router of the base's family."
                )

    def _check_recipe(self) -> None:
        before = _result_of(self.manifest["recipe"], self.manifest.get("processes", processes()))
        now = _result_of(self.recipe.fingerprint(), processes())
        if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            raise ValueError(
                f"{self.root}: got a run whose recipe differs in {changed}, need the same recipe to go on: choose another "
                "`output_dir`, or delete this one; with another number of processes, change `gradient_accumulation_steps` so "
                "that a step has as much as before."
            )

    @property
    def finished(self) -> bool:
        return all(self._done(name) for name in self.stages)

    def run(self) -> None:
        """Runs every stage that is not done, in an order in which each finds what it needs."""
        check_joined(self.recipe.workers)
        if self.finished:
            self._check_recipe()
        else:
            self.check()
        done = {name for name in self.stages if self._done(name)}
        wait_for_all()  # before one of them changes what the others look for
        self.root.mkdir(parents=True, exist_ok=True)
        self._write_manifest(self.manifest)
        bar = {"desc": "training", "unit": " stages", "disable": not is_main()}
        with tqdm(total=len(self.stages), initial=len(done), **bar) as progress:
            if not self._done("data"):
                self._finished("data", self.run_stage("data"), done, progress)
            if self.recipe.workers > 1:
                self._run_in_workers(done, progress)
            for name in self.stages:
                if name not in done:
                    progress.set_postfix_str(name)
                    self._finished(name, self.run_stage(name), done, progress)
        if is_main():
            shutil.rmtree(self.root / "work", ignore_errors=True)

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
                            running[pool.submit(_run_stage, self.recipe, name)] = name
                    progress.set_postfix_str(", ".join(sorted(running.values())))
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._finished(running.pop(future), future.result(), done, progress)
            except BaseException:
                stop.set()  # else the error would wait for the other stages, which may take hours
                raise

    def run_stage(self, name: str) -> float:
        """Runs one stage, whose needs must be there, and returns the seconds that it took."""
        start = time.perf_counter()
        folder = self.root / "work" / name / "result"
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        wait_for_all()
        history = self.stages[name].run(folder)
        wait_for_all()  # another may still read from the checkpoints, which go now
        if is_main():
            (folder / "history.json").write_text(json.dumps(history))
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            folder.rename(self.root / name)
            shutil.rmtree(self.root / "work" / name, ignore_errors=True)
        wait_for_all()
        return time.perf_counter() - start

    def _done(self, name: str) -> bool:
        return (self.root / name / "history.json").exists()

    def _work(self, result: Path) -> Path:
        return result.parent / "checkpoints"

    def _finished(self, name: str, seconds: float, done: set[str], progress: tqdm) -> None:
        done.add(name)
        progress.update()
        manifest = self.manifest
        manifest["seconds"][name] = manifest["seconds"].get(name, 0) + seconds
        self._write_manifest(manifest)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        if not is_main() or (self.root / "manifest.json").exists() and manifest == self.manifest:
            return
        temporary = self.root / "manifest.json.tmp"
        temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
        temporary.replace(self.root / "manifest.json")


def _result_of(recipe: dict[str, Any], processes: int) -> dict[str, Any]:
    """A recipe's fingerprint, in which a stage's step has its size, however it is divided over processes."""
    settings = dict(recipe)
    for stage, defaults in DEFAULTS.items():
        own = {name: getattr(PhaseConfig, name) for name in DIVISION} | defaults | recipe[stage]
        prompts, batches, _ = (own.pop(name) for name in DIVISION)
        settings[stage] = {name: own[name] for name in own.keys() & recipe[stage].keys()}
        if own.get("train_tokens_per_batch") is None:
            settings[f"prompts a step of {stage}"] = prompts * batches * processes
        else:
            settings[f"batches a step of {stage}"] = batches * processes
    return settings


DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed")
"""Settings of a stage with which the result is the same if the prompts of a step are as many."""


def _start_worker(parent: int, stop: Event) -> None:
    start_worker(parent, threads=1, stop=stop)
    sys.stdout = open(os.devnull, "w")  # the trainers print their logs


_pipelines: dict[str, Pipeline] = {}


def _run_stage(recipe: Recipe, name: str) -> float:
    pipeline = _pipelines.setdefault(recipe.output_dir, Pipeline(recipe))
    return pipeline.run_stage(name)
