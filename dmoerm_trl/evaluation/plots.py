"""Panels of curves over KL, as in the paper's figure 5."""

from typing import Any

_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def style_panel(panel: Any, largest_kl: float, label: str) -> None:
    """Give a panel of curves over KL the paper's square-root axis from 0, and set the label of its y-axis."""
    panel.set_xscale("function", functions=(_root, lambda d: d**2))
    step = next((step for step in _TICKS if largest_kl <= 8 * step), largest_kl / 8)
    ticks = [0, step / 2, *(step * number for number in range(1, int(largest_kl / step) + 1))]
    panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.set_xlim(left=0)
    panel.minorticks_off()
    panel.tick_params(labelsize=9)
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.set_ylabel(label, fontsize=11)


def legend_above(figure: Any, panel: Any) -> None:
    """Draw one legend for all panels, with the lines of one of them."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), fontsize=10, frameon=False)


def _root(kl: Any) -> Any:
    """Compute the scale of the axis; matplotlib evaluates it slightly below 0 too."""
    return abs(kl) ** 0.5
