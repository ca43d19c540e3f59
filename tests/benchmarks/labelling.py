"""
How fast and how small the labeller is.

    python tests/benchmarks/labelling.py --json FILE

`answers_per_second_share`: a judge on loopback, in a process of its own, answers after 200 ms, and 64 questions are under way at
once: the answers a second, as a share of the 64 / 0.2 = 320 that are possible; `again` is that of a run over answers that are
all there. `rss_early` and `rss_late`: resident memory (MiB) after a tenth of the rows and over the last tenth of them, while a
Python function labels 100,000 pairs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.data.rows import iter_rows, write_rows
from dmoerm_trl.labelling.answer_store import AnswerStore
from dmoerm_trl.labelling.comparisons import Plan
from dmoerm_trl.labelling.judges import Judge, judge_from_config
from dmoerm_trl.labelling.labeller import Labeller
from dmoerm_trl.tasks import TaskTable

SERVER = Path(__file__).parents[1] / "labelling" / "server.py"
TASKS = TaskTable({"chat": ("content richness",)}, overall=("content richness",))


def write_pairs(path: Path, pairs: int) -> None:
    """Rows of one pair each, with some hundred words."""

    def rows() -> Iterator[PreferenceRow]:
        for number in range(pairs):
            prompt = [{"role": "user", "content": f"Tell me of number {number}. " * 20}]
            responses = [
                f"Of {number} there is this and that to say. " * (10 + (number * step) % 7) for step in (2, 3)
            ]
            yield PreferenceRow(prompt, [f"{text}{place}" for place, text in enumerate(responses)], [1, 2], "chat")

    write_rows(rows(), path)


def labeller(folder: Path, judge: Judge) -> Labeller:
    rows = partial(iter_rows, folder / "rows.jsonl", tasks=TASKS)
    return Labeller(rows, Plan(TASKS), judge, AnswerStore(folder / "answers.sqlite", judge.identity), stop_early=False)


def measure_speed(folder: Path, questions: int, latency: float, concurrency: int) -> dict[str, float]:
    write_pairs(folder / "rows.jsonl", questions // 2)
    command = [sys.executable, str(SERVER), "--latency", str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip()
        asking = {"kind": "server", "base_url": url, "model": "judge", "api_key_env": None, "concurrency": concurrency}
        labelling = labeller(folder, judge_from_config(asking))
        start, cpu = time.perf_counter(), time.process_time()
        stopped = labelling.ask(questions)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        server.kill()
    if stopped or labelling.answers.spent.calls != questions:
        raise RuntimeError(f"got {labelling.answers.spent.calls} answers of {questions}: {stopped}")
    start = time.perf_counter()
    labelling.ask(0)
    again = time.perf_counter() - start
    rate, ideal = questions / seconds, concurrency / latency
    return {
        "questions": questions,
        "answers_per_second": rate,
        "answers_per_second_share": rate / ideal,
        "cpu_ms_per_answer": 1000 * cpu / questions,
        "again_per_second": questions / again,
    }


def measure_memory(folder: Path, pairs: int) -> dict[str, float]:
    write_pairs(folder / "rows.jsonl", pairs)
    judge = judge_from_config({"kind": "function", "function": "dmoerm_trl.labelling.heuristics:content_richness"})
    labelling, resident = labeller(folder, judge), []
    read = labelling.rows

    def watched() -> Iterator[PreferenceRow]:
        for number, row in enumerate(read()):
            if number % max(1, pairs // 100) == 0:
                resident.append(psutil.Process().memory_info().rss / 2**20)
            yield row

    labelling.rows = watched
    labelling.ask(2 * pairs)
    return {"pairs": pairs, "rss_early": resident[10], "rss_late": max(resident[90:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--questions", type=int, default=6400, help="for the speed")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds of the judge")
    parser.add_argument("--concurrency", type=int, default=64, help="questions under way at once")
    parser.add_argument("--pairs", type=int, default=100_000, help="for the memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure_speed(Path(folder), options.questions, options.latency, options.concurrency)
    with tempfile.TemporaryDirectory() as folder:
        result |= measure_memory(Path(folder), options.pairs)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2))
    print("| | |\n| --- | ---: |")
    for name, value in result.items():
        print(f"| {name} | {value:,.3g} |" if isinstance(value, float) else f"| {name} | {value:,} |")


if __name__ == "__main__":
    main()
