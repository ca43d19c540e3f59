"""Gold and proxy reward of trained policies against their KL (the paper's figure 5, right half)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..evaluation.plots import legend_above, style_panel
from ..files import save_figure
from .monitor import read_monitor

Estimator = Literal["k1", "k2", "k3"]


def plot_policy_curves(
    runs: Mapping[str, Sequence[str | Path]], path: str | Path, *, estimator: Estimator = "k3"
) -> Path:
    """
    Draw one line a method: the mean over seeds of the gold reward and, in a panel beside it, of the proxy at each monitored
    step, over the mean KL at that step, with a band of one standard deviation over the seeds. The x-axis has a square-root
    scale. Proxies have each the scale of their reward model.

    Args:
        runs (`Mapping[str, Sequence[str]]`): method -> the files of its seeds, written by
            [`~dmoerm_trl.rl.monitor.PolicyMonitor`].
        path (`str` or `Path`): the image to write, its format by the suffix. Missing folders are made.
        estimator (`str`): of the KL; the paper's is k2, and k3 is unbiased.

    Returns:
        `Path`: The image.

    Raises:
        ValueError: if a method has no files, a file has no line, or the seeds of a method were measured at different steps.

    Example:

    ```python
    import json
    from dmoerm_trl import plot_policy_curves

    line = {"step": 0, "k1": 0.0, "k2": 0.0, "k3": 0.0, "proxy": 0.1, "gold": 0.2}
    with open("monitor.jsonl", "w") as file:
        print(json.dumps(line), file=file)
    plot_policy_curves({"DMoERM": ["monitor.jsonl"]}, "curves.png")
    ```
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    draw_policy_curves(
        figure, {method: read_seeds(method, files) for method, files in runs.items()}, estimator=estimator
    )
    return save_figure(figure, path)


def draw_policy_curves(
    figure: Any, curves: Mapping[str, Mapping[str, np.ndarray]], *, estimator: Estimator = "k3"
) -> None:
    """
    [`plot_policy_curves`] on a figure, or a part of one, of matplotlib's.

    Args:
        curves (`Mapping`): method -> what [`read_seeds`] gives.
    """
    has_gold = any("gold" in seeds for seeds in curves.values())
    labels = {"gold": "gold reward"} if has_gold else {}
    labels["proxy"] = "proxy, on each reward model's scale"
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        largest = 0.0
        for number, (method, seeds) in enumerate(curves.items()):
            kl = seeds[estimator].mean(0).clip(min=0)  # k1 may come out below 0 near the start
            largest = max(largest, float(kl.max()))
            if name in seeds:
                mean, deviation = seeds[name].mean(0), seeds[name].std(0)
                panel.plot(kl, mean, color=f"C{number}", linewidth=1.6, marker=".", markersize=4, label=method)
                panel.fill_between(kl, mean - deviation, mean + deviation, color=f"C{number}", alpha=0.15, linewidth=0)
        style_panel(panel, largest, label)
    figure.supxlabel(
        f"KL from the initial policy, {estimator}, in nats a response; mean and deviation over seeds", fontsize=11
    )
    legend_above(figure, panels[-1])


def read_seeds(method: str, files: Sequence[str | Path]) -> dict[str, np.ndarray]:
    """
    The monitors of one method's seeds, key -> array of shape (seeds, steps), in float64: `step`, `k1`, `k2`, `k3`, `proxy`,
    and `gold` where every line has it.

    Raises:
        ValueError: if there are no files, a file has no line, or the seeds were measured at different steps.
    """
    lines = [read_monitor(file) for file in files]
    steps = [[line["step"] for line in seed] for seed in lines]
    if not files or not steps[0] or any(seed != steps[0] for seed in steps):
        raise ValueError(
            f"{method}: got files {[str(file) for file in files]} with {[len(seed) for seed in steps]} lines, need one or more files "
            "measured at the same steps, because seeds are averaged step by step: let all runs come to their end, or take "
            "out those that have not."
        )
    names = ["step", "k1", "k2", "k3", "proxy"]
    names += ["gold"] if all("gold" in line for seed in lines for line in seed) else []
    return {name: np.array([[line[name] for line in seed] for seed in lines], dtype=float) for name in names}
