"""Pipeline that runs each stage of a recipe once and resumes a killed run."""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..distributed.processes import check_joined, is_main, start_worker, wait_for_all
from ..files import as_json, locked_folder, read_json, write_json
from .checks import check_models, check_places
from .recipe import DEFAULTS, Recipe
from .recipe_stages import RecipeStages
from .rehearsal import rehearse
from .run_changes import Growth
from .stages import History, Manifest, stage_records


class Pipeline(RecipeStages):
    """
    Run of a recipe in a folder, to which its stages write their results:

    ```
    manifest.json               settings and inputs of each finished stage, and the seconds that it took
    data/                       the rows of each part, such as test.jsonl, and report.txt
    router/                     the outer layer
    <task>/phase1/              the task's base
    <task>/experts/<point>/     its experts, ordinary PEFT adapters of the base, each with its history
    <task>/phase3/              the task's inner model; overall/phase3 is DMoERM-w/o-Outer
    ensemble/<i>/               the baselines; 0 is the single reward model
    model/                      the DMoERM
    ```

    The folder of a stage appears by a rename when the stage is finished. With `joint_experts`, `<task>/experts` is one stage;
    otherwise, each expert is a stage. While a stage trains, its checkpoints are in `work/<stage>/`, in a folder named after
    its settings and inputs. Other files in the folder are not touched.

    A finished stage is kept if its settings and inputs are unchanged; see [`~dmoerm_trl.training.run_changes.Growth`].

    If a launcher starts several processes, they train each stage together, and only the main process writes.

    Example:

    ```python
    from dmoerm_trl import Pipeline, Recipe

    run = Pipeline(Recipe("runs/mine", "runs/demo/base", "runs/demo/data/test.jsonl"))
    run.trainings[:2]  # run.run() trains those that are not finished
    ```
    """

    def history(self, training: str) -> History:
        """Return the log history of one of [`Pipeline.trainings`]."""
        folder = self.root / training
        return read_json(folder / "history.json", f"put it back, or delete {folder} to run this stage again")

    @property
    def trainings(self) -> list[str]:
        """Folders of all trainings in the order of the stages, one per expert even if experts are trained jointly."""
        names = [stage.trainings or (name,) for name, stage in self.stages.items() if name not in ("data", "model")]
        return [name for of_stage in names for name in of_stage]

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of `manifest.json`; see [`~dmoerm_trl.training.stages.Manifest`]."""
        return Manifest(self.root).content

    # Checks before training

    def check(self) -> None:
        """
        Check the run before any training: the folder and its finished stages, the settings of all stages, the tokenizers, the
        LoRA targets, the weights and positions of the bases, the rows and their labels.

        Raises:
            ValueError: If a check fails. The message says what is wrong and how to fix it.
        """
        self._source  # noqa: B018  (checks that `extend` is a run)
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
        return finished.record("data")["settings"] == as_json(self._data_settings)

    def check_finished(self) -> None:
        """
        Check that the finished stages in the folder belong to this recipe.

        Raises:
            ValueError: If a finished stage differs from the recipe's, or is no longer complete.
        """
        finished = Manifest(self.root)
        there = [name for name in self.stages if finished.has(name)]
        for name in there:
            finished.check_files(name)
        if not set(there) - {"data"}:
            return
        changed, digests = [], self._digests
        if "data" not in there or not self._data_stays(finished):
            now = as_json(self._data_settings)
            before = finished.record("data")["settings"] if "data" in there else now
            changed = [key for key in now if before.get(key) != now[key]]
            try:
                digests = self.run_data.digests(self.tasks)
            except ValueError:
                digests = self._digests_of(finished)  # compare only the settings
                if not self._growth(finished, digests, changed).keys:
                    raise
        growth = self._growth(finished, digests, changed)
        if not growth.again and not growth.gone:
            return
        step = "; with another number of processes, change `gradient_accumulation_steps` so that a step keeps its size"
        raise ValueError(
            f"{self.root}: got finished stages of a recipe that differs in {growth.keys}, need the same recipe to resume: "
            f"choose another `output_dir`; with `--extend {self.root}` its run copies the stages that stay"
            + (step if any(key.startswith(("prompts a step", "batches a step")) for key in growth.keys) else "")
            + f".\n{growth}"
        )

    def _growth(self, finished: Manifest, digests: dict[str, Any], changed: Sequence[str]) -> Growth:
        return Growth.of(self.stages, stage_records(self.stages, digests), finished, changed)

    def _digests_of(self, finished: Manifest) -> dict[str, Any]:
        """Return the digests of the finished stages' rows."""
        digests: dict[str, Any] = {}
        for name, stage in self.stages.items():
            if stage.rows and finished.has(name):
                first, *point = stage.rows
                rows = finished.record(name)["rows"]
                digests[first] = {**digests.get(first, {}), point[0]: rows} if point else rows
        return digests

    def _step(self, name: str) -> str | None:
        """Return the key of the recipe that holds the settings of a stage's training."""
        return next((step for step in DEFAULTS if step in self.stages[name].settings), None)

    # Stages of an extended run

    def _take_over(self) -> None:
        """Print what can stay of the extended run, and copy its stages. Joint experts are copied when their stage runs."""
        source = self._source
        before = source.record("data")["settings"] if source.has("data") else {}
        now = as_json(self._data_settings)
        changed = [key for key in now if before.get(key) != now[key]]
        print(f"compared with {source.root}:\n{self._growth(source, self._digests, changed)}")
        for name in self.stages:
            if name != "data" and not self._done(name) and self._source_has(name):
                source.check_files(name)
                self._begin(name)
                folder = self._work_folder(name) / "result"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(source.root / name, folder)
                self._put(name, folder)
                self._note(name, 0.0)

    # Running the stages

    @property
    def finished(self) -> bool:
        return all(self._done(name) for name in self.stages)

    def run(self) -> None:
        """
        Run all unfinished stages in order while the folder is locked. Until the first training is finished, the recipe may
        still change; from then on, the folder belongs to the recipe.
        """
        check_joined(self.recipe.workers)
        with locked_folder(self.root):
            self.check()
            finished = Manifest(self.root)
            done = {name for name in self.stages if self._done(name)}
            if "data" in done and not self._data_stays(finished):
                done.remove("data")
            wait_for_all()  # until all have looked for files, which the main process changes now
            if is_main():
                self._claim(finished, anew="data" not in done)
            self._run_rest(done)

    def _claim(self, finished: Manifest, anew: bool) -> None:
        if anew and finished.has("data"):  # no finished training depends on the changes
            for path in finished["files"].get("data", {}):
                (self.root / "data" / path).unlink(missing_ok=True)
            with suppress(OSError):
                (self.root / "data").rmdir()
            check_places(self.root, ["data"])
        for name in self.stages:  # a run may have been killed right after a stage
            if self._done(name) and name not in finished["files"]:
                finished.note_files(name)
        finished.content["recipe"] = as_json(self.recipe.fingerprint())
        if self._source is not None:
            finished.content["extends"] = str(self._source.root)
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
                stop.set()  # otherwise the error would wait for the other stages, which may take hours
                raise

    def run_stage(self, name: str) -> float:
        """Run one stage, whose needs must be finished, and return the seconds that it took."""
        start = time.perf_counter()
        work = self._work_folder(name)
        folder = work / "result"
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        wait_for_all()
        history = self.stages[name].run(folder)
        wait_for_all()  # another process may still read the checkpoints, which are deleted now
        if is_main():
            write_json(folder / "history.json", history)
            self._put(name, folder)
        wait_for_all()
        return time.perf_counter() - start

    def _put(self, name: str, folder: Path) -> None:
        """Rename the result of a finished stage to the stage's folder, and delete its working folder."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        folder.rename(self.root / name)
        work = self._work_folder(name)
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            work.parent.rmdir()

    def _begin(self, name: str) -> None:
        """Record the settings and inputs of a stage. The record counts once the stage's folder is there."""
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
        """Delete the folders in which stages were started, and the parent folders that are then empty."""
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
