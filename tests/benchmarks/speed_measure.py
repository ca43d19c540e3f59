"""How a case of `speed.py` is measured: time, peak memory, FLOPs, exactness, and the machine's peak."""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm


@dataclass
class Case:
    """
    Variants that do the same work, each a function.

    Attributes:
        variants (`dict`): name -> what is measured; `single` is the unit.
        limits (`dict[str, float]`): variant -> the least FLOPs with which it can be done.
        exactness (`Callable`): takes the variants' results, returns variant -> largest relative difference from the truth.
        factors (`dict[str, float]`): variant -> by how much the work is greater than the part that the function does.
        once: variants that are timed in the first repetition alone, because they take long.
    """

    variants: dict[str, Callable[[], Tensor]]
    limits: dict[str, float]
    exactness: Callable[[dict[str, Tensor]], dict[str, float]]
    factors: dict[str, float] = field(default_factory=dict)
    once: Collection[str] = ()


def measure(case: Case, repeats: int, description: str = "") -> dict[str, dict[str, Any]]:
    """
    Runs each variant once to count its FLOPs and to read the peak of memory, less what was in use before; then all in turn,
    `repeats` times, to take the time.

    Returns:
        `ratio` (median over the repetitions of a variant's time to that of `single`), `seconds`, `flops`,
        `peak_memory_mib` and `exactness`, each variant -> value, and the case's `once` and `scaled` (its factors). Ratios,
        seconds and FLOPs are those of the whole work.
    """
    names = list(case.variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    flops, memory, results = {}, {}, {}
    rounds = [names, *[[name for name in names if name not in case.once]] * (repeats - 1)]
    with tqdm(total=len(names) + sum(map(len, rounds)), desc=description, delay=3, leave=False) as progress:
        for name in names:  # apart from the timing, because counting slows small batches down by a fifth
            progress.set_postfix_str(f"counting {name}")
            before = _watch_memory()
            with counter() as count:
                results[name] = case.variants[name]()
            flops[name] = case.factors.get(name, 1) * count.get_total_flops()
            memory[name] = _peak_memory(before)
            progress.update()
        for chosen in rounds:
            for name in chosen:
                progress.set_postfix_str(name)
                seconds[name].append(case.factors.get(name, 1) * timed(case.variants[name])[0])
                progress.update()
    units = seconds["single"]
    return {
        "ratio": {
            name: statistics.median(s / unit for s, unit in zip(seconds[name], units, strict=False)) for name in names
        },
        "seconds": seconds,
        "flops": {name: flops_entry(flops[name], case.limits.get(name)) for name in names},
        "peak_memory_mib": memory,
        "exactness": case.exactness(results),
        "once": sorted(case.once),
        "scaled": case.factors,
    }


def flops_entry(counted: float, limit: float | None) -> dict[str, float | None]:
    return {"counted": counted, "limit": limit, "ratio": counted / limit if limit else None}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    _wait()
    start = time.perf_counter()
    result = function()
    _wait()
    return time.perf_counter() - start, result


def matmul_peak(device: str, dtype: str, size: int | None = None) -> float:
    """FLOPs a second of a large matrix product, the best of five."""
    size = size or (8192 if device == "cuda" else 2048)
    matrix = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    return 2 * size**3 / min(timed(lambda: matrix @ matrix)[0] for _ in range(5))


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: __import__(name).__version__ for name in ("torch", "transformers", "peft", "trl")},
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Peak memory: of the GPU, else the high-water mark of this process's resident set, which Linux lets us set back.


def _watch_memory() -> int | None:
    """Sets the high-water mark back and returns the bytes in use; None where that cannot be done."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier runs left in the heap would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _peak_memory(before: int | None) -> float | None:
    """MiB above `before`."""
    if before is None:
        return None
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
    return (peak - before) / 2**20


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# PyTorch's counter does not know the attention kernel of the CPU.


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def _attention_flops(query, key, value, dropout_p=0.0, is_causal=False, *args, out_shape=None, **kwargs) -> float:
    """Two products over all pairs of a query and a key, which are half as many under a causal mask that is implied."""
    batch, heads, queries, width = query
    keys = key[2]
    visible = queries * (queries + 1) / 2 if is_causal else queries * keys
    return 4 * batch * heads * width * visible


def _attention_backward_flops(
    grad, query, key, value, out, logsumexp, dropout_p=0.0, is_causal=False, *args, out_shape=None, **kwargs
) -> float:
    """Five products: the scores once more, and the gradients of scores, queries, keys and values."""
    return 2.5 * _attention_flops(query, key, value, dropout_p, is_causal)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
