"""
Many responses a prompt and their scores, on disk: written shard by shard by several processes, never twice.

A shard is a Parquet file that appears whole or not at all, and what stands in it depends on the settings, the prompt and the
shard's number alone. So a run that was killed goes on with the shards that are not there, and ends with what an unbroken one
has; and memory holds a shard's texts and a prompt's scores, however many responses there are.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..files import write_json, writing
from ..workers import start_worker

RESPONSES = "responses"


class Shard(NamedTuple):
    prompt: int
    number: int

    @property
    def file(self) -> str:
        return f"{self.prompt:05d}-{self.number:05d}.parquet"


class Source(Protocol):
    """What makes texts or scores: hashable, so that a process loads it once, and small, so that it can be sent there."""

    def load(self) -> Callable: ...


class ResponseStore:
    """
    n responses to each of P prompts, and scores of them, in one folder:

    ```
    manifest.json                        what each part below depends on
    responses/00003-00012.parquet        the 13th shard of the 4th prompt: `response`, and `gold` where it was given
    <scores>/00003-00012.parquet         `score` of each text that no earlier response to the prompt has
    ```

    Args:
        root (`Path`): the folder.
        prompts (`int`): P.
        n (`int`): responses a prompt.
        shard_size (`int`): responses a shard.
    """

    def __init__(self, root: str | os.PathLike, prompts: int, n: int, shard_size: int = 1000):
        if min(prompts, n, shard_size) < 1:
            raise ValueError(f"got {prompts} prompts, n={n} and shard_size={shard_size}, need at least 1 of each.")
        self.root, self.prompts, self.n, self.shard_size = Path(root), prompts, n, shard_size

    # Shards

    def shards(self, prompt: int) -> list[Shard]:
        """Those of one prompt."""
        return [Shard(prompt, number) for number in range(-(-self.n // self.shard_size))]

    def size(self, shard: Shard) -> int:
        """Its responses; the last of a prompt may have fewer than the others."""
        return min(self.shard_size, self.n - shard.number * self.shard_size)

    def missing(self, part: str) -> list[Shard]:
        """The shards of a part that are still to be written."""
        folder = self.root / part
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        return [shard for prompt in range(self.prompts) for shard in self.shards(prompt) if shard.file not in there]

    def write(self, part: str, shard: Shard, **columns: Any) -> None:
        """
        Writes a shard, which is on the disk when this returns.

        Raises:
            OSError: the disk is full, or another fault of it.
        """
        path = self.root / part / shard.file
        try:
            with writing(path, binary=True) as file:
                pq.write_table(pa.table(columns), file, compression="zstd")
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path}: {os.strerror(error.errno) if error.errno else error}. The shards that were written are whole: make "
                "room and run the same command again, which goes on from them",
            ) from error

    def read(self, part: str, shard: Shard, column: str) -> pa.ChunkedArray:
        return pq.read_table(self.root / part / shard.file, columns=[column])[column]

    def column(self, part: str, prompt: int, column: str) -> np.ndarray:
        """A numeric column of all shards of a prompt."""
        return np.concatenate([self.read(part, shard, column).to_numpy() for shard in self.shards(prompt)])

    # Texts

    def text(self, prompt: int, index: int) -> str:
        """One response."""
        number, row = divmod(index, self.shard_size)
        return self.read(RESPONSES, Shard(prompt, number), "response")[row].as_py()

    def distinct(self, prompt: int) -> np.ndarray:
        """Of each of the n responses to a prompt, the number of its text: texts are numbered as they first occur."""
        numbers: dict[bytes, int] = {}
        result = np.empty(self.n, dtype=np.int64)
        for shard in self.shards(prompt):
            for row, text in enumerate(self.read(RESPONSES, shard, "response").to_pylist()):
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                result[shard.number * self.shard_size + row] = numbers.setdefault(digest, len(numbers))
        return result

    def scores(self, part: str, prompt: int, distinct: np.ndarray) -> torch.Tensor:
        """The scores of all responses to a prompt, shape (n,), in float32."""
        return torch.from_numpy(self.column(part, prompt, "score")[distinct])

    # Settings

    def claim(self, part: str, settings: dict[str, Any]) -> None:
        """
        Notes down what a part depends on, which its first shard makes fast: until then the settings may change.

        Raises:
            ValueError: if there are shards of the part from other settings, or `manifest.json` is another file.
        """
        path = self.root / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if not isinstance(manifest, dict) or not all("shard_size" in claimed for claimed in manifest.values()):
                raise TypeError("it is another file")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: got a file that best of n did not write ({error}), need its own, because it tells what the responses and the "
                "scores depend on: choose another `output_dir`."
            ) from error
        settings = {**settings, "prompts": self.prompts, "n": self.n, "shard_size": self.shard_size}
        now = json.loads(json.dumps(settings))
        before = manifest.get(part, {}) if any((self.root / part).glob("*.parquet")) else now
        if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            raise ValueError(
                f"{self.root}: got {part!r} that were begun with other settings of {changed}, need the same to go on: "
                "choose another `output_dir`, or delete this one."
            )
        if manifest.get(part) != now:
            write_json(path, {**manifest, part: now})


# Filling it

Run = Callable[[Callable[..., int], Iterable[tuple]], Iterator[int]]
"""(function, arguments of each call) -> results, as they come."""


@contextmanager
def worker_pool(workers: int) -> Iterator[Run]:
    """Runs calls in so many processes, each with its share of the threads; one means in this process, in order."""
    if workers == 1:
        try:
            yield lambda function, calls: (function(*call) for call in calls)
        finally:
            _loaded.cache_clear()
        return
    threads = max(1, torch.get_num_threads() // workers)
    options = {"mp_context": get_context("spawn"), "initializer": start_worker, "initargs": (os.getpid(), threads)}
    with ProcessPoolExecutor(workers, **options) as pool:

        def run(function: Callable[..., int], calls: Iterable[tuple]) -> Iterator[int]:
            futures: list[Future] = [pool.submit(function, *call) for call in calls]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

        yield run


@contextmanager
def _own_share(missing: list[Shard], processes: PartialState | None) -> Iterator[list[Shard]]:
    """
    This process's part of the missing shards. None writes before all know what is missing, and none goes on before all is
    written.
    """
    if processes is None:
        yield missing
        return
    processes.wait_for_everyone()
    yield missing[processes.process_index :: processes.num_processes]
    processes.wait_for_everyone()


def write_responses(
    store: ResponseStore,
    rows: Sequence[dict],
    policy: Source,
    seed: int,
    run: Run,
    processes: PartialState | None = None,
) -> None:
    """
    Generates the responses that are not there yet.

    Args:
        rows (`Sequence[dict]`): P rows with `prompt`.
        policy (`Source`): loads as a [`~dmoerm_trl.rl.rollout.Sampler`].
        processes (`PartialState`, *optional*): those that share the shards. Each calls this.
    """
    with _own_share(store.missing(RESPONSES), processes) as missing:
        calls = [(store, policy, rows[shard.prompt]["prompt"], shard, seed) for shard in missing]
        total = store.prompts * store.n
        done = total - sum(map(store.size, missing))
        _with_progress("generating", run(_generate, calls), done, total)


def _generate(store: ResponseStore, policy: Source, prompt: list[dict], shard: Shard, seed: int) -> int:
    (shard_seed,) = np.random.SeedSequence([seed, *shard]).generate_state(1, np.uint64)
    texts = _loaded(policy)(prompt, store.size(shard), int(shard_seed >> np.uint64(1)))
    store.write(RESPONSES, shard, response=texts)
    return len(texts)


def write_scores(
    store: ResponseStore,
    part: str,
    rows: Sequence[dict],
    scorer: Source,
    run: Run,
    processes: PartialState | None = None,
) -> None:
    """
    Scores what is not scored yet of the distinct responses, all of which must be there.

    Args:
        part (`str`): where the scores go.
        scorer (`Source`): loads as a [`~dmoerm_trl.evaluation.scorers.Scorer`].
        processes (`PartialState`, *optional*): those that share the shards. Each calls this.
    """
    with _own_share(store.missing(part), processes) as missing:
        places = {}
        for prompt in {shard.prompt for shard in missing}:
            _, first = np.unique(store.distinct(prompt), return_index=True)  # the n-th distinct text's first place
            for number, of_shard in enumerate(np.split(first, np.searchsorted(first, _bounds(store)))):
                places[Shard(prompt, number)] = of_shard - number * store.shard_size
        calls = [(store, part, scorer, rows[shard.prompt], shard, places[shard]) for shard in missing]
        _with_progress(f"scoring: {part}", run(_score, calls), 0, sum(len(places[shard]) for shard in missing))


def _bounds(store: ResponseStore) -> range:
    """The first response of each shard but the first."""
    return range(store.shard_size, store.n, store.shard_size)


def _score(store: ResponseStore, part: str, scorer: Source, row: dict, shard: Shard, places: np.ndarray) -> int:
    texts = store.read(RESPONSES, shard, "response").take(places).to_pylist()
    try:
        scores = _loaded(scorer)(row, texts) if texts else torch.empty(0)
    except ValueError as error:
        raise ValueError(f"{part}: {error} It was scoring responses to prompt {shard.prompt}.") from error
    if scores.shape != (len(texts),):
        raise ValueError(
            f"{part}: got scores of shape {tuple(scores.shape)} for {len(texts)} responses, need one score a response."
        )
    scores = scores.float()
    store.write(part, shard, score=scores.numpy())
    return len(texts)


@lru_cache(maxsize=1)
def _loaded(source: Source) -> Callable:
    """One model a process at a time."""
    return source.load()


def _with_progress(description: str, counts: Iterator[int], done: int, total: int) -> None:
    """Counts texts, at the mean speed of this run: shards differ in size, and distinct texts become rarer."""
    with tqdm(total=total, initial=done, desc=description, unit=" texts", smoothing=0, delay=1) as progress:
        for count in counts:
            progress.update(count)
