"""Gold and proxy reward of best of n over the KL that it costs, for several reward models: the left half of figure 5."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import save_figure
from .best_of_n_estimate import best_of_n, win_share
from .explain import cell, display_width, pad
from .kl import best_of_n_kl_bound
from .overoptimisation import OveroptimisationFit, fit_overoptimisation


def default_grid(n: int, points: int = 12) -> list[int]:
    """About so many values of n from 1 to the largest, evenly spaced in their logarithm; for 60,000 some 0.8 nats apart."""
    return sorted({round(n ** (point / (points - 1))) for point in range(points)})


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """
    What best of n by one reward model gives each of P prompts, at the G values of n of the grid.

    Args:
        gold (`Tensor` of shape (P, G)): gold reward, as it is.
        win_rate (`Tensor` of shape (P, G)): share of the policy's own responses that gold puts below the chosen one.
        proxy (`Tensor` of shape (P, G)): the reward model's own reward, standardised: less the mean, in units of the standard
            deviation, of the rewards of all responses to all prompts. So 0 is the policy without optimisation.
    """

    gold: Tensor
    win_rate: Tensor
    proxy: Tensor


@dataclass(frozen=True)
class BestOfNCurves:
    """
    Args:
        grid (`list[int]`): the values of n, ascending from 1.
        curves (`dict[str, Curve]`): reward model -> its curve.
        confidence (`float`): coverage of the bootstrap intervals over prompts.
        resamples, seed (`int`): of the bootstrap.
    """

    grid: list[int]
    curves: dict[str, Curve]
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    @property
    def kl(self) -> Tensor:
        """Nats at each n of the grid, by equation 11, in float64."""
        return best_of_n_kl_bound(self.grid)

    def estimates(self, values: Tensor) -> list[Estimate]:
        """The mean over prompts at each n, for `values` of shape (P, G). The prompts are drawn once for all n."""
        prompts = len(values)
        draws = torch.randint(prompts, (self.resamples, prompts), generator=torch.Generator().manual_seed(self.seed))
        counts = torch.zeros(self.resamples, prompts, dtype=values.dtype)
        counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=values.dtype))
        means = counts @ values / prompts  # (resamples, G)
        tail = (1 - self.confidence) / 2
        low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype), dim=0)
        columns = values.mean(dim=0), low, high
        return [Estimate(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]

    def fit(self, name: str) -> OveroptimisationFit | None:
        """Gao et al.'s curve through a reward model's gain in gold; None where the grid has too few n for it."""
        gold = self.curves[name].gold.mean(dim=0)
        return fit_overoptimisation(self.kl, gold - gold[0], "best_of_n") if len(self.grid) > 2 else None

    def to_dict(self) -> dict[str, Any]:
        """
        `grid`, `kl`, `confidence`, `prompts`; `curves`, `proxy` and `win_rate`: reward model -> n -> `{"mean", "low", "high"}`
        of the gold reward, the standardised proxy and the win rate; `fits`: reward model -> `a`, `b`, their errors, `peak_kl`.
        """
        tables: dict[str, dict[str, Any]] = {"curves": {}, "proxy": {}, "win_rate": {}}
        for name, curve in self.curves.items():
            for table, values in zip(tables.values(), (curve.gold, curve.proxy, curve.win_rate), strict=True):
                table[name] = {n: vars(e) for n, e in zip(self.grid, self.estimates(values), strict=True)}
        fits = {name: self.fit(name) for name in self.curves}
        return {
            "grid": self.grid,
            "kl": self.kl.tolist(),
            "confidence": self.confidence,
            "prompts": len(next(iter(self.curves.values())).gold),
            **tables,
            "fits": {name: fit_to_dict(fit) for name, fit in fits.items() if fit is not None},
        }

    def to_markdown(self) -> str:
        """Tables of the gold reward with its interval, of the win rate and of the proxy, then the fits."""
        parts = []
        for title, field, form in (
            (f"Gold reward, with the {100 * self.confidence:g}% bootstrap interval over prompts", "gold", "+.2f"),
            ("Win rate by gold over the policy's own responses", "win_rate", ".1%"),
            ("Proxy, in standard deviations of the reward model over the policy's responses", "proxy", "+.2f"),
        ):
            rows = [["n", "KL", *self.curves]]
            columns = [self.estimates(getattr(curve, field)) for curve in self.curves.values()]
            for index, (n, kl) in enumerate(zip(self.grid, self.kl.tolist(), strict=True)):
                cells = [column[index] for column in columns]
                interval = "{0.mean:+.2f} [{0.low:+.2f}, {0.high:+.2f}]" if field == "gold" else f"{{0.mean:{form}}}"
                rows.append([f"{n:,}", f"{kl:.2f}", *(interval.format(cell) for cell in cells)])
            parts.append(f"{title}\n\n{markdown_table(rows)}")
        fits = [["reward model", "a", "b", "fitted gold peaks at", "highest of the grid at"]]
        for name, curve in self.curves.items():
            if (fit := self.fit(name)) is not None:
                best = int(curve.gold.mean(dim=0).argmax())
                peak = f"{fit.peak_kl:.1f} nats" if fit.peak_kl <= self.kl[-1] else "beyond the grid"
                cells = [f"{fit.a:+.2f} ± {fit.a_error:.2f}", f"{fit.b:+.2f} ± {fit.b_error:.2f}"]
                fits.append([name, *cells, peak, f"{self.kl[best]:.1f} nats (n = {self.grid[best]:,})"])
        if len(fits) > 1:
            parts.append(f"Gain in gold fitted by a d - b d², d = √KL (Gao et al. 2023)\n\n{markdown_table(fits)}")
        return "\n\n".join(parts) + "\n"

    def plot(self, path: str | Path) -> Path:
        """
        Draws gold and proxy over KL on the paper's square-root axis, with the intervals as bands.

        Args:
            path (`str` or `Path`): the image to write, its format by the suffix. Missing folders are made.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # not pyplot: no global state, no display
        except ImportError as error:
            raise ImportError("the curves need matplotlib, which is missing: `pip install matplotlib`.") from error
        figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
        self.draw(figure)
        return save_figure(figure, path)

    def draw(self, figure: Any) -> None:
        """[`plot`] on a figure, or a part of one, of matplotlib's."""
        panels = figure.subplots(1, 2)
        for panel, field, label in zip(
            panels, ("gold", "proxy"), ("gold reward", "proxy, in standard deviations"), strict=True
        ):
            for name, curve in self.curves.items():
                estimates = self.estimates(getattr(curve, field))
                (line,) = panel.plot(self.kl, [e.mean for e in estimates], linewidth=1.6, marker=".", label=name)
                low, high = [e.low for e in estimates], [e.high for e in estimates]
                panel.fill_between(self.kl, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
            style_panel(panel, float(self.kl.max()), label)
        figure.supxlabel(f"KL of best of n in nats, n = 1 to {self.grid[-1]:,} (equation 11)", fontsize=11)
        legend_above(figure, panels[0])


_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def style_panel(panel: Any, largest_kl: float, label: str) -> None:
    """Gives a panel of curves over KL the paper's square-root axis from 0, and its y-axis the label."""
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
    """One legend for all panels, with the lines of one of them."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), fontsize=10, frameon=False)


def best_of_n_curves(
    prompts: Iterable[tuple[Mapping[str, Tensor], Tensor]], grid: Sequence[int], **bootstrap: Any
) -> BestOfNCurves:
    """
    The curves of several reward models, from the scores of N responses a prompt.

    Args:
        prompts (`Iterable`): for each prompt, reward model -> scores of shape (N,), and the gold rewards of shape (N,).
            They are taken one at a time, so a generator never holds more than one prompt's.
        grid (`Sequence[int]`): values of n up to N. 1 is added where it is missing: it is the policy itself.
        bootstrap: `confidence`, `resamples` and `seed` of [`BestOfNCurves`].

    Raises:
        ValueError: There is no prompt, the shapes do not fit, an n is above N, or a score is NaN or infinite.
    """
    grid = sorted({1, *grid})
    estimates: dict[str, list[Tensor]] = {}  # one (3, G) a prompt
    moments: dict[str, list[tuple[float, float]]] = {}
    for number, (scores, gold) in enumerate(prompts):
        if estimates and scores.keys() != estimates.keys():
            raise ValueError(f"prompt {number}: got scores of {list(scores)}, need those of {list(estimates)}.")
        for name, proxy in scores.items():
            try:
                if gold.shape != proxy.shape:
                    raise ValueError(
                        f"got gold of shape {tuple(gold.shape)} and scores of shape {tuple(proxy.shape)}, need one gold "
                        "reward for each response that was scored, in the same order."
                    )
                values = torch.stack([gold.double(), win_share(gold, gold), proxy.double()])
                estimates.setdefault(name, []).append(best_of_n(proxy, values, grid))
            except ValueError as error:
                raise ValueError(f"prompt {number}, reward model {name!r}: {error}") from error
            variance, mean = torch.var_mean(proxy.double(), correction=0)
            moments.setdefault(name, []).append((float(mean), float(variance)))
    if not estimates:
        raise ValueError("got no prompts or no reward models, need at least one of each.")
    curves = {}
    for name, of_prompts in estimates.items():
        mean, deviation = pooled_moments(moments[name])
        gold, win_rate, proxy = torch.stack(of_prompts, dim=1)  # (P, G) each
        curves[name] = Curve(gold, win_rate, (proxy - mean) / (deviation or 1.0))
    return BestOfNCurves(grid, curves, **bootstrap)


def pooled_moments(moments: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean and standard deviation of groups of one size, from the mean and the variance of each."""
    mean, variance = torch.tensor(moments, dtype=torch.float64).T
    return float(mean.mean()), float((variance.mean() + mean.var(correction=0)).sqrt())


def fit_to_dict(fit: OveroptimisationFit) -> dict[str, float | None]:
    """A fit's numbers; None for those that are not finite, which JSON cannot write."""
    numbers = {name: getattr(fit, name) for name in ("a", "b", "a_error", "b_error", "peak_kl")}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _root(kl: Any) -> Any:
    """The axis' scale; matplotlib asks for it a little below 0 too."""
    return abs(kl) ** 0.5


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table of padded cells, whose first row is the header."""
    rows = [[cell(text) for text in row] for row in rows]
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    header, *body = (
        "| " + " | ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )
    return "\n".join([header, "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |", *body])
