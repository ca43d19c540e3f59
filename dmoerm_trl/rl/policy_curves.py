"""Plot the gold and proxy reward of trained policies over their KL (right half of the paper's figure 5)."""

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
    Plot the gold reward and, in a second panel, the proxy reward of each method over the KL: one point per monitored step, the
    mean over seeds, with a band of one standard deviation. The x-axis has a square-root scale. Each proxy is on the scale of
    its own reward model.

    Args:
        runs (`Mapping[str, Sequence[str]]`): Method -> the files of its seeds, written by
            [`~dmoerm_trl.rl.monitor.PolicyMonitor`].
        path (`str` or `Path`): The image to write; the suffix sets its format. Missing folders are created.
        estimator (`str`): Estimator of the KL; the paper uses k2, and k3 is unbiased.

    Returns:
        `Path`: The image.

    Raises:
        ValueError: If a method has no files, a file has no line, or the seeds of a method were measured at different steps.

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
    Draw the plot of [`plot_policy_curves`] on a matplotlib figure or subfigure.

    Args:
        curves (`Mapping`): Method -> result of [`read_seeds`].
    """
    has_gold = any("gold" in seeds for seeds in curves.values())
    labels = {"gold": "gold reward"} if has_gold else {}
    labels["proxy"] = "proxy, on each reward model's scale"
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        largest = 0.0
        for number, (method, seeds) in enumerate(curves.items()):
            kl = seeds[estimator].mean(0).clip(min=0)  # k1 may be below 0 near the start
            largest = max(largest, float(kl.max()))
            if name in seeds:
                mean, deviation = seeds[name].mean(0), seeds[name].std(0)
                panel.plot(kl, mean, color=f"C{number}", linewidth=1.6, marker=".", markersize=4, label=method)
                panel.fill_between(kl, mean - deviation, mean + deviation, color=f"C{number}", alpha=0.15, linewidth=0)
        style_panel(panel, largest, label)
    figure.supxlabel(
        f"KL from the initial policy, {estimator}, in nats per response; mean and standard deviation over seeds",
        fontsize=11,
    )
    legend_above(figure, panels[-1])


def read_seeds(method: str, files: Sequence[str | Path]) -> dict[str, np.ndarray]:
    """
    Read the monitor files of one method's seeds: key -> float64 array of shape (seeds, steps), for `step`, `k1`, `k2`, `k3`,
    `proxy`, and `gold` if every line has it.

    Raises:
        ValueError: If there are no files, a file has no line, or the seeds were measured at different steps.
    """
    lines = [read_monitor(file) for file in files]
    steps = [[line["step"] for line in seed] for seed in lines]
    if not files or not steps[0] or any(seed != steps[0] for seed in steps):
        raise ValueError(
            f"{method}: got files {[str(file) for file in files]} with {[len(seed) for seed in steps]} lines, need one or more "
            "files measured at the same steps, because seeds are averaged step by step: finish all runs, or leave out those "
            "that are not finished."
        )
    names = ["step", "k1", "k2", "k3", "proxy"]
    names += ["gold"] if all("gold" in line for seed in lines for line in seed) else []
    return {name: np.array([[line[name] for line in seed] for seed in lines], dtype=float) for name in names}
