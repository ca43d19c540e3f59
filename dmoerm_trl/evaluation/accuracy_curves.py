"""Accuracy curves of the training stages (the paper's figure 4), from the logs of transformers' trainer."""

import math
import textwrap
from pathlib import Path

from ..files import save_figure

_CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei")


def plot_accuracy_curves(histories: dict[str, list[dict]], path: str | Path) -> Path:
    """
    Plot the share of correctly ordered pairs over the steps, in training and in validation, with one panel per stage.

    Args:
        histories (`dict[str, list[dict]]`):
            Title of the stage, such as `"roleplay phase 1"` -> its `TrainerState.log_history`. Training logs contain
            `step` and `accuracy`, evaluation logs `step` and `eval_accuracy`; other logs and keys are ignored.
        path (`str` or `Path`):
            Image to write; the suffix determines the format (`.png`, `.pdf`, `.svg`). Missing folders are created.

    Returns:
        `Path`: The image. Stages that logged no accuracy get no panel, but are named below the panels.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no stage logged an accuracy.
    """
    try:
        from matplotlib import font_manager
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError as error:
        raise ImportError("accuracy curves need matplotlib, which is missing: `pip install matplotlib`.") from error

    curves = {stage: (_curve(logs, "accuracy"), _curve(logs, "eval_accuracy")) for stage, logs in histories.items()}
    drawn = {stage: pair for stage, pair in curves.items() if any(pair)}
    if not drawn:
        raise ValueError(
            f"got no log with `accuracy` or `eval_accuracy` in {len(histories)} stages, need at least one: set "
            "`logging_steps` or `eval_steps` below the number of steps."
        )

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _CJK_FONTS if name in installed)]  # the others are fallbacks per glyph
    columns = min(len(drawn), max(4, math.ceil(math.sqrt(len(drawn)))))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(max(4.2, 2.5 * columns), 2.2 * rows + 1), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for panel, (stage, (train, validation)) in zip(panels, drawn.items(), strict=False):
        panel.axhline(0.5, color="0.75", linewidth=0.8, linestyle="--", zorder=0)  # chance
        panel.plot(*_points(train), color="tab:blue", linewidth=1.2, marker=".", markersize=3, label="train")
        panel.plot(
            *_points(validation), color="tab:orange", linewidth=1.6, marker=".", markersize=5, label="validation"
        )
        panel.set_title(textwrap.fill(stage, 26), fontsize=10, fontfamily=fonts)
        panel.locator_params(axis="x", nbins=4, integer=True)
        panel.tick_params(labelsize=9)
        panel.grid(alpha=0.25, linewidth=0.5)
    for panel in panels[len(drawn) :]:
        panel.remove()

    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=11, frameon=False
    )
    figure.supylabel("accuracy on pairs", fontsize=11)
    missing = [stage for stage in curves if stage not in drawn]
    note = f"\nno accuracy logged: {', '.join(missing)}" if missing else ""
    figure.supxlabel(
        "steps" + textwrap.fill(note, 34 * columns, replace_whitespace=False), fontsize=11, fontfamily=fonts
    )

    return save_figure(figure, path)


def _curve(logs: list[dict], key: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of the logs that hold `key`."""
    return [(log["step"], log[key]) for log in logs if key in log]


def _points(curve: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Convert a list of points to the form that matplotlib expects: all x, all y."""
    return [step for step, _ in curve], [value for _, value in curve]
