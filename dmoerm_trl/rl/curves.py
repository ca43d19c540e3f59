"""Gold and proxy reward of trained policies against their KL (the paper's figure 5, right half)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .monitor import read_monitor


def plot_policy_curves(
    runs: Mapping[str, Sequence[str | Path]], path: str | Path, *, estimator: Literal["k1", "k2", "k3"] = "k3"
) -> Path:
    """
    Draws one line a method: the mean over seeds of the gold reward (solid) and of the proxy (dashed) at each monitored step,
    over the mean KL at that step, with a band of one standard deviation over the seeds. The x-axis has a square-root scale.

    Args:
        runs (`Mapping[str, Sequence[str]]`): method -> the files of its seeds, written by
            [`~dmoerm_trl.rl.monitor.PolicyMonitor`].
        path (`str` or `Path`): the image to write, its format by the suffix. Missing folders are made.
        estimator (`str`): of the KL; the paper's is k2, and k3 is unbiased.

    Returns:
        `Path`: The image.

    Raises:
        ValueError: if a method has no files, a file has no line, or the seeds of a method were measured at different steps.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    curves = {method: _seeds(method, files, estimator) for method, files in runs.items()}
    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (method, seeds) in enumerate(curves.items()):
        kl = seeds[estimator].mean(0).clip(min=0)  # k1 may come out below 0 near the start
        for name, style in (("gold", "-"), ("proxy", "--")):
            if name in seeds:
                mean, deviation = seeds[name].mean(0), seeds[name].std(0)
                axes.plot(kl, mean, style, color=f"C{number}", linewidth=1.6, marker=".", markersize=4)
                axes.fill_between(kl, mean - deviation, mean + deviation, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.plot([], [], color=f"C{number}", label=f"{method} ({len(runs[method])} seeds)")
    for name, style in (("gold", "-"), ("proxy", "--")):
        if any(name in seeds for seeds in curves.values()):
            axes.plot([], [], style, color="0.4", label=name)
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"KL from the initial policy, {estimator} (nats, square-root scale)", fontsize=11)
    axes.set_ylabel("reward", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=9, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _seeds(method: str, files: Sequence[str | Path], estimator: str) -> dict[str, np.ndarray]:
    """Arrays of shape (seeds, steps): the KL, the proxy, and gold where every file has it."""
    lines = [read_monitor(file) for file in files]
    steps = [[line["step"] for line in seed] for seed in lines]
    if not files or not steps[0] or any(seed != steps[0] for seed in steps):
        raise ValueError(
            f"{method}: got files {[str(file) for file in files]} with {[len(seed) for seed in steps]} lines, need one or "
            "more files measured at the same steps, because seeds are averaged step by step: let all runs come to their "
            "end, or take out those that have not."
        )
    names = [estimator, "proxy"] + (["gold"] if all("gold" in line for seed in lines for line in seed) else [])
    return {name: np.array([[line[name] for line in seed] for seed in lines]) for name in names}
