"""
On-disk store of many responses per prompt and their scores. Several processes write it in shards, each shard only once.

A shard is a Parquet file that is written atomically and whose content depends only on the settings, the prompt and the shard's
number. So a killed run resumes with the missing shards, and its result equals that of an uninterrupted run. Memory needs to
hold only the texts of one shard and the scores of one prompt, however many responses there are.
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

from ..distributed.processes import start_worker
from ..files import as_json, changed_keys, write_json, writing

RESPONSES = "responses"


class Shard(NamedTuple):
    """One file of a part: a range of the responses to a prompt."""

    prompt: int
    number: int

    @property
    def file(self) -> str:
        return f"{self.prompt:05d}-{self.number:05d}.parquet"


class Loadable(Protocol):
    """Specification of a sampler or scorer. It is hashable, so that a process loads it only once, and small enough to send."""

    def load(self) -> Callable: ...


class ResponseStore:
    """
    Store of n responses to each of P prompts, and of their scores, in one folder:

    ```
    manifest.json                        settings that each part below depends on
    responses/00003-00012.parquet        the 13th shard of the 4th prompt: `response`, and `gold` if it was imported
    <scores>/00003-00012.parquet         `score` of each text that is not a duplicate of an earlier response to the prompt
    ```

    Args:
        root (`str` or `os.PathLike`): The folder.
        prompts (`int`): P, the number of prompts.
        n (`int`): Responses per prompt.
        shard_size (`int`, *optional*, defaults to 1000): Responses per shard.
    """

    def __init__(self, root: str | os.PathLike, prompts: int, n: int, shard_size: int = 1000):
        if min(prompts, n, shard_size) < 1:
            raise ValueError(f"got {prompts} prompts, n={n} and shard_size={shard_size}, need at least 1 of each.")
        self.root, self.prompts, self.n, self.shard_size = Path(root), prompts, n, shard_size

    # Shards

    def shards(self, prompt: int) -> list[Shard]:
        """List the shards of one prompt."""
        return [Shard(prompt, number) for number in range(-(-self.n // self.shard_size))]

    def size(self, shard: Shard) -> int:
        """Return the number of responses of a shard. The last shard of a prompt may be smaller."""
        return min(self.shard_size, self.n - shard.number * self.shard_size)

    def missing(self, part: str) -> list[Shard]:
        """List the shards of a part that are not written yet."""
        folder = self.root / part
        written = {path.name for path in folder.iterdir()} if folder.exists() else set()
        return [shard for prompt in range(self.prompts) for shard in self.shards(prompt) if shard.file not in written]

    def write(self, part: str, shard: Shard, **columns: Any) -> None:
        """
        Write a shard. It is on disk when this method returns.

        Raises:
            OSError: If the disk is full or has another problem.
        """
        path = self.root / part / shard.file
        try:
            with writing(path, binary=True) as file:
                pq.write_table(pa.table(columns), file, compression="zstd")
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path}: {os.strerror(error.errno) if error.errno else error}. The shards written so far are "
                "complete: free some space and run the same command again to resume from them",
            ) from error

    def read(self, part: str, shard: Shard, column: str) -> pa.ChunkedArray:
        """Read a column of a shard."""
        return pq.read_table(self.root / part / shard.file, columns=[column])[column]

    def column(self, part: str, prompt: int, column: str) -> np.ndarray:
        """Read a numeric column of all shards of a prompt."""
        return np.concatenate([self.read(part, shard, column).to_numpy() for shard in self.shards(prompt)])

    # Texts

    def text(self, prompt: int, index: int) -> str:
        """Read one response."""
        number, row = divmod(index, self.shard_size)
        return self.read(RESPONSES, Shard(prompt, number), "response")[row].as_py()

    def distinct(self, prompt: int) -> np.ndarray:
        """
        Number the distinct texts among the n responses to a prompt by first occurrence, and return each response's number.
        """
        numbers: dict[bytes, int] = {}
        result = np.empty(self.n, dtype=np.int64)
        for shard in self.shards(prompt):
            for row, text in enumerate(self.read(RESPONSES, shard, "response").to_pylist()):
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                result[shard.number * self.shard_size + row] = numbers.setdefault(digest, len(numbers))
        return result

    def scores(self, part: str, prompt: int, distinct: np.ndarray) -> torch.Tensor:
        """Read the scores of all responses to a prompt, of shape (n,), in float32."""
        return torch.from_numpy(self.column(part, prompt, "score")[distinct])

    # Settings

    def claim(self, part: str, settings: dict[str, Any]) -> None:
        """
        Record the settings that a part depends on. They may still change until the first shard of the part is written.

        Raises:
            ValueError: If the part has shards from other settings, or `manifest.json` is not a file of this store.
        """
        path = self.root / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if not isinstance(manifest, dict) or not all("shard_size" in claimed for claimed in manifest.values()):
                raise TypeError("it is another file")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: got a file that best of n did not write ({error}), need its own file, because it records what the "
                "responses and the scores depend on: choose another `output_dir`."
            ) from error
        settings = {**settings, "prompts": self.prompts, "n": self.n, "shard_size": self.shard_size}
        now = as_json(settings)
        before = manifest.get(part, {}) if any((self.root / part).glob("*.parquet")) else now
        if changed := changed_keys(before, now):
            raise ValueError(
                f"{self.root}: got {part!r} that were started with other settings of {changed}, need the same to resume: "
                "choose another `output_dir`, or delete this one."
            )
        if manifest.get(part) != now:
            write_json(path, {**manifest, part: now})


# Writing responses and scores

Submit = Callable[[Callable[..., int], Iterable[tuple]], Iterator[int]]
"""(function, arguments of each call) -> results, in the order in which they become available."""


@contextmanager
def worker_pool(workers: int) -> Iterator[Submit]:
    """
    Context manager that runs calls in worker processes, which share the threads equally. One worker is this process itself.
    """
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
    Context manager for this process's share of the missing shards. No process starts writing before all have listed what is
    missing, and none continues before all are finished.
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
    policy: Loadable,
    seed: int,
    run: Submit,
    processes: PartialState | None = None,
) -> None:
    """
    Generate the missing responses.

    Args:
        store (`ResponseStore`): Store to write to.
        rows (`Sequence[dict]`): P rows with `prompt`.
        policy (`Loadable`): Specification that loads a [`~dmoerm_trl.generation.samplers.Sampler`].
        seed (`int`): Seed of the sampling.
        run (`Submit`): Runs calls, see [`worker_pool`].
        processes (`PartialState`, *optional*): Processes that share the shards; each of them must call this.
    """
    with _own_share(store.missing(RESPONSES), processes) as missing:
        calls = [(store, policy, rows[shard.prompt]["prompt"], shard, seed) for shard in missing]
        total = store.prompts * store.n
        done = total - sum(map(store.size, missing))
        _with_progress("generating", run(_generate, calls), done, total)


def _generate(store: ResponseStore, policy: Loadable, prompt: list[dict], shard: Shard, seed: int) -> int:
    (shard_seed,) = np.random.SeedSequence([seed, *shard]).generate_state(1, np.uint64)
    texts = _loaded(policy)(prompt, store.size(shard), int(shard_seed >> np.uint64(1)))
    store.write(RESPONSES, shard, response=texts)
    return len(texts)


def write_scores(
    store: ResponseStore,
    part: str,
    rows: Sequence[dict],
    scorer: Loadable,
    run: Submit,
    processes: PartialState | None = None,
) -> None:
    """
    Score the distinct responses that have no scores yet. All responses must be in the store.

    Args:
        store (`ResponseStore`): Store to read from and write to.
        part (`str`): Part of the store for the scores.
        rows (`Sequence[dict]`): P rows with `prompt`.
        scorer (`Loadable`): Specification that loads a [`~dmoerm_trl.scoring.reward_models.Scorer`].
        run (`Submit`): Runs calls, see [`worker_pool`].
        processes (`PartialState`, *optional*): Processes that share the shards; each of them must call this.
    """
    with _own_share(store.missing(part), processes) as missing:
        places = {}
        for prompt in {shard.prompt for shard in missing}:
            _, first = np.unique(store.distinct(prompt), return_index=True)  # first occurrence of each distinct text
            for number, indices in enumerate(np.split(first, np.searchsorted(first, _bounds(store)))):
                places[Shard(prompt, number)] = indices - number * store.shard_size
        calls = [(store, part, scorer, rows[shard.prompt], shard, places[shard]) for shard in missing]
        _with_progress(f"scoring: {part}", run(_score, calls), 0, sum(len(places[shard]) for shard in missing))


def _bounds(store: ResponseStore) -> range:
    """Return the index of the first response of each shard except the first."""
    return range(store.shard_size, store.n, store.shard_size)


def _score(store: ResponseStore, part: str, scorer: Loadable, row: dict, shard: Shard, places: np.ndarray) -> int:
    texts = store.read(RESPONSES, shard, "response").take(places).to_pylist()
    try:
        scores = _loaded(scorer)(row, texts) if texts else torch.empty(0)
    except ValueError as error:
        raise ValueError(f"{part}: {error} It was scoring responses to prompt {shard.prompt}.") from error
    if scores.shape != (len(texts),):
        raise ValueError(
            f"{part}: got scores of shape {tuple(scores.shape)} for {len(texts)} responses, need one score per response."
        )
    scores = scores.float()
    store.write(part, shard, score=scores.numpy())
    return len(texts)


@lru_cache(maxsize=1)
def _loaded(spec: Loadable) -> Callable:
    """Load a model, keeping only one per process."""
    return spec.load()


def _with_progress(description: str, counts: Iterator[int], done: int, total: int) -> None:
    """Show progress in texts. The speed is the mean of this run, because shards differ in their number of distinct texts."""
    with tqdm(total=total, initial=done, desc=description, unit=" texts", smoothing=0, delay=1) as progress:
        for count in counts:
            progress.update(count)
