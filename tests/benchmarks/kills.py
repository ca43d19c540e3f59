"""
Kills: whatever kills a run at whatever moment, the same command goes on and ends with the files of an unbroken run.

    python tests/benchmarks/kills.py --json runs/kills.json [--kills 100] [--only train ppo] [--seed 0]

Six subjects, each a real process with tiny models: `train` (one process), `workers` (two of them), `launched` (two processes of
torchrun's agent), `labelling` (a judge's server on loopback), `best_of_n` (two workers), `ppo`. A run is killed up to five times and then
left to its end. The ways are drawn by the seed:

- `all`: SIGKILL to all its processes, at a random moment;
- `main`: the same to the first one alone, whose workers have to end by themselves while the run is started again;
- `write`: SIGKILL to all as the first one is about to write, rename or remove a file of the run for the n-th time;
- `term`, `int`: SIGTERM or SIGINT to the first one alone, which has to end all.

Then every file of the run is compared with the unbroken run's, byte for byte, but for these: in JSON, times (keys that end in one of
`TIMES`) and the sizes of files that hold them, `train_loss`, which transformers takes over the steps since the last start, the order
of keys, which it sorts in a checkpoint, and that of `target_modules`, a set that PEFT writes as it comes; in the labelling's SQLite
file, the order of the answers and the time of each.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from ctypes import c_long
from dataclasses import dataclass, field
from multiprocessing import RawValue
from pathlib import Path
from typing import Any

from forks import ROOT, Fork, preload

TIMES = ("seconds", "runtime", "samples_per_second", "steps_per_second", "tokens_per_second", "eps")
"""Ends of the keys of JSON whose values are not compared."""

NOT_COMPARED = (*TIMES, "train_loss", "history.json")
"""The same of all keys; the last are those of the manifest under which the sizes of files of times stand."""

SERVER = ROOT / "tests" / "labelling" / "server.py"
LIMIT = 300
"""Seconds after which a start is taken to hang."""
WAYS = ("all", "main", "write", "term", "int")
PRELOAD = [
    *(f"dmoerm_trl.commands.{name}" for name in ("train", "label")),
    *(
        f"dmoerm_trl.{name}"
        for name in ("rl.ppo_trainer", "rl.setup", "rl.monitor", "evaluation.best_of_n", "generation.samplers")
    ),
    *("trl.trainer.reward_trainer", "trl.experimental.ppo", "openai", "matplotlib.pyplot", "models"),
]


@dataclass
class Subject:
    """What is run with a recipe, and the ways in which it is killed."""

    start: Callable[[list[str]], Any]
    recipe: dict[str, Any]
    ways: tuple[str, ...] = WAYS


@dataclass
class Result:
    """What became of the runs of a subject."""

    seconds: float = 0.0  # of the unbroken run
    runs: int = 0
    ways: Counter = field(default_factory=Counter)  # way -> kills
    identical: int = 0  # runs
    differing: Counter = field(default_factory=Counter)  # file -> runs
    faults: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- subjects


def dmoerm(words: list[str]) -> None:
    """`dmoerm WORDS`."""
    from dmoerm_trl.cli import main

    sys.argv = ["dmoerm", *words]
    sys.exit(main())


def command(name: str) -> Callable[[list[str]], Any]:
    return lambda arguments: dmoerm([name, *arguments])


def launched(arguments: list[str]) -> None:
    """`torchrun --standalone --nproc_per_node 2 dmoerm train`, whose processes are forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    at = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": f"{os.getpid()}-{time.time_ns()}"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, start_method="fork", **at)

    def process(arguments: list[str]) -> None:
        for number, action in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            signal.signal(number, action)  # not the agent's
        command("train")(arguments)

    elastic_launch(config, process)(arguments)


def example(name: str) -> Callable[[list[str]], Any]:
    """`python examples/NAME.py`."""
    path = str(ROOT / "examples" / f"{name}.py")

    def start(arguments: list[str]) -> None:
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")

    return start


def subjects(folder: Path, url: str) -> dict[str, Subject]:
    """The subjects, whose models and rows are written into a folder; `url` is the judge's."""
    train = training(folder)
    bon = {
        "policy": str(folder / "policy"), "prompts": str(folder / "prompts.jsonl"), "n": 60, "shard_size": 10, "batch_size": 10,
        "max_new_tokens": 8, "workers": 2, "num_prompts": 4, "reward_models": {"DMoERM": str(folder / "reward_model")},
        "gold": "length", "show": [1, 60], "show_prompts": 2,
    }  # fmt: skip
    judge = {"kind": "server", "base_url": url, "model": "judge", "api_key_env": None, "concurrency": 4}
    label = {"rows": str(folder / "unlabelled.jsonl"), "tasks": train["tasks"], "judge": judge}
    ppo = {
        "policy": str(folder / "policy"), "reward_model": str(folder / "reward_model"),
        "prompts": str(folder / "prompts.jsonl"), "max_prompt_length": 60, "response_length": 6, "total_episodes": 32,
        "per_device_train_batch_size": 4, "num_ppo_epochs": 1, "num_sample_generations": 0, "learning_rate": 1e-2,
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 1, "monitor_every": 2, "monitor_prompts": 2,
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    return {
        "train": Subject(command("train"), train),
        "workers": Subject(command("train"), train | {"workers": 2}),
        "launched": Subject(launched, train, ("all", "write", "term", "int")),  # torchrun's processes outlive it
        "labelling": Subject(command("label"), label),
        "best_of_n": Subject(example("bon_eval"), bon),
        "ppo": Subject(example("ppo"), ppo),
    }


def training(folder: Path) -> dict[str, Any]:
    """A recipe of two tasks with two experts each, eight prompts a step's part; a base, a policy, a DMoERM, rows and prompts."""
    from models import PROMPTS, RESPONSES, make_backbone, make_tokenizer
    from rl_runs import write_run

    tokenizer = make_tokenizer()
    make_backbone(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_run(folder, prompts=14)
    points = {"maths": ["correctness", "logic"], "chitchat": ["logic", "empathy"]}
    (folder / "tasks.yaml").write_text(json.dumps({"tasks": points, "overall": ["logic"]}))
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as labelled, (folder / "unlabelled.jsonl").open("w") as unlabelled:
        for number in range(48):
            task = ["maths", "chitchat"][number % 2]
            texts = [f"{text} {number}." for text in RESPONSES]
            ranks, *labels = (draw.sample([1, 2, 3], 3) for _ in range(3))
            row = {"prompt": f"{PROMPTS[task]} {number}", "responses": texts, "ranks": ranks, "task": task}
            unlabelled.write(json.dumps(row) + "\n")
            labelled.write(json.dumps(row | {"capability_ranks": dict(zip(points[task], labels, strict=True))}) + "\n")
    few = {"max_steps": 8, "eval_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "logging_steps": 2}
    return {
        "base_model": str(folder / "base"), "train_data": str(folder / "rows.jsonl"), "tasks": str(folder / "tasks.yaml"),
        "lora_rank": 4, "lora_alpha": 4, "max_length": 256, "without_outer": False, "ensemble_size": 1,
        **dict.fromkeys(("router", "phase1", "phase2", "phase3", "baselines"), few | {"per_device_train_batch_size": 2}),
    }  # fmt: skip


@contextmanager
def judge_server() -> Iterator[str]:
    """The address of a judge in a process of its own, which prefers the longer response."""
    with subprocess.Popen(
        [sys.executable, str(SERVER), "--latency", "0.02"], stdout=subprocess.PIPE, text=True
    ) as server:
        yield server.stdout.readline().strip()
        server.kill()


# -------------------------------------------------------------------------------------------------- killing


def counting_writes(root: Path, writes: Any, last: int | None) -> None:
    """Counts a process's changes of files below a folder in `writes`; before the `last` one it kills its whole session."""

    def hook(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(str(root)):
            writes.value += 1
            if writes.value == last:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


def started(subject: Subject, recipe: Path, root: Path, writes: Any, last: int | None) -> None:
    counting_writes(root, writes, last)
    subject.start(["--config", str(recipe)])


class Runs:
    """The runs of one subject, all of them at the same path, since some files name it."""

    def __init__(self, name: str, subject: Subject, folder: Path):
        self.subject, self.root, self.result = subject, folder / name / "run", Result()
        self.root.parent.mkdir()
        self.recipe = self.root.with_suffix(".json")  # JSON is YAML
        self.recipe.write_text(json.dumps(subject.recipe | {"output_dir": str(self.root)}))
        self.writes, start = RawValue(c_long), time.perf_counter()
        status = self._start().wait(LIMIT)
        if status != 0:
            raise RuntimeError(f"{name}: an unbroken run ended with {status}: {self._log.read_text()[-3000:]}")
        self.result.seconds, self.all_writes = time.perf_counter() - start, self.writes.value
        self.unbroken = contents(self.root)

    @property
    def _log(self) -> Path:
        return self.root.with_suffix(".log")

    def _start(self, last: int | None = None) -> Fork:
        self.writes.value = 0
        return Fork(started, self.subject, self.recipe, self.root, self.writes, last, log=self._log)

    def run(self, kills: int, draw: random.Random) -> None:
        """One run with at most so many kills, compared with the unbroken one."""
        shutil.rmtree(self.root)
        self._log.unlink()
        self.result.runs += 1
        number = 0
        while number < kills:
            way = draw.choice(self.subject.ways)
            status = self._killed(way, draw)
            if status == 0:  # it was faster
                break
            self.result.ways[way] += 1
            number += 1
        else:
            process = self._start()
            status = process.wait(LIMIT)
            process.kill()
        if status != 0:
            self.result.faults.append(f"ended with {status} after {number} kills: {self._log.read_text()[-2000:]}")
            return
        found = contents(self.root)
        different = sorted(
            name for name in found.keys() | self.unbroken.keys() if found.get(name) != self.unbroken.get(name)
        )
        self.result.differing.update(different)
        self.result.identical += not different

    def _killed(self, way: str, draw: random.Random) -> int | None:
        """Starts and kills; 0 if the run had ended before."""
        last = draw.randrange(1, max(2, self.all_writes // 2)) if way == "write" else None
        process = self._start(last)
        status = process.wait(LIMIT if way == "write" else draw.uniform(0.02, 0.6 * self.result.seconds))
        if status is None and way in ("term", "int", "main"):
            process.send({"term": signal.SIGTERM, "int": signal.SIGINT, "main": signal.SIGKILL}[way])
            status = process.wait(60)
            if way == "main":
                return status
        if status is None and way != "all":
            self.result.faults.append(f"hangs after {way}: {self._log.read_text()[-2000:]}")
        process.kill()
        return status


def contents(root: Path) -> dict[str, Any]:
    """File -> what of it is compared."""
    return {str(path.relative_to(root)): compared(path) for path in sorted(root.rglob("*")) if path.is_file()}


def compared(path: Path) -> Any:
    if path.suffix == ".json":
        return json.dumps(without_times(json.loads(path.read_text())), sort_keys=True)  # NaN equals itself
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
            answers = "SELECT key, judge, choice, text, prompt_tokens, completion_tokens FROM answers ORDER BY key"
            return [store.execute(f"SELECT * FROM {table}").fetchall() for table in ("judges", "asking_again")] + [
                store.execute(answers).fetchall()
            ]
    return path.read_bytes()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        ordered = value | {key: sorted(value[key]) for key in value.keys() & {"target_modules"}}
        return {key: without_times(item) for key, item in ordered.items() if not key.endswith(NOT_COMPARED)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


# -------------------------------------------------------------------------------------------------- results


def table(results: dict[str, Result]) -> str:
    lines = [
        "| subject | unbroken | runs | kills | identical | differing files, faults |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, result in results.items():
        wrong = [f"{file} ({runs})" for file, runs in result.differing.items()] + [
            fault[:80] for fault in result.faults
        ]
        cells = [
            name,
            f"{result.seconds:.1f} s",
            result.runs,
            result.ways.total(),
            result.identical,
            "; ".join(wrong) or "none",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def run(names: list[str], kills: int, seed: int, folder: Path, minutes: float = 60.0) -> dict[str, Result]:
    """
    Kills each subject as often as the others until there are so many kills in all, or no time is left.

    Returns:
        Subject -> its result.
    """
    preload(PRELOAD)
    end, draw = time.monotonic() + 60 * minutes, random.Random(seed)
    with judge_server() as url:
        folder.mkdir(parents=True, exist_ok=True)
        every = subjects(folder, url)
        runs = {name: Runs(name, every[name], folder) for name in names}
        while (left := kills - sum(one.result.ways.total() for one in runs.values())) > 0 and time.monotonic() < end:
            name = min(runs, key=lambda name: runs[name].result.ways.total())
            runs[name].run(min(left, -(-kills // len(names)), draw.randint(2, 5)), draw)
            print(table({name: runs[name].result}).splitlines()[-1], flush=True)
    return {name: one.result for name, one in runs.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--kills", type=int, default=100, help="of all subjects together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="these subjects")
    parser.add_argument("--minutes", type=float, default=60.0, help="no run starts after so many")
    parser.add_argument("--work", type=Path, help="folder for the runs, kept; else a temporary one")
    options = parser.parse_args(argv)
    names = options.only or ["train", "workers", "launched", "labelling", "best_of_n", "ppo"]
    with tempfile.TemporaryDirectory() as temporary:
        results = run(names, options.kills, options.seed, options.work or Path(temporary), options.minutes)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {"seed": options.seed, "kills": sum(result.ways.total() for result in results.values())}
    options.json.write_text(json.dumps(settings | {name: vars(result) for name, result in results.items()}, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()
