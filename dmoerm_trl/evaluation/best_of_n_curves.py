"""Gold and proxy reward of best of n over its KL, for several reward models: the left half of the paper's figure 5."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import save_figure
from ..markdown import escape, markdown_table
from .best_of_n_estimate import best_of_n, win_share
from .kl import best_of_n_kl_bound
from .overoptimisation import OveroptimisationFit, fit_overoptimisation
from .plots import legend_above, style_panel


def default_grid(n: int, points: int = 12) -> list[int]:
    """Return about `points` values from 1 to `n`, evenly spaced on a log scale (for 60,000: about 0.8 nats of KL apart)."""
    return sorted({round(n ** (point / (points - 1))) for point in range(points)})


@dataclass(frozen=True)
class Estimate:
    """Mean over prompts with its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """
    Results of best of n by one reward model for each of P prompts, at the G values of n in the grid.

    Args:
        gold (`Tensor` of shape (P, G)): Gold reward, not standardised.
        win_rate (`Tensor` of shape (P, G)): Share of the policy's own responses with a gold reward below the chosen one's.
        proxy (`Tensor` of shape (P, G)): Reward of the reward model itself, standardised by the mean and standard deviation
            over all responses to all prompts. A value of 0 is that of the policy without optimisation.
    """

    gold: Tensor
    win_rate: Tensor
    proxy: Tensor


@dataclass(frozen=True)
class BestOfNCurves:
    """
    Curves of best of n by several reward models.

    Args:
        grid (`list[int]`): Values of n, ascending from 1.
        curves (`dict[str, Curve]`): Reward model -> curve.
        confidence (`float`, *optional*, defaults to 0.95): Coverage of the bootstrap intervals over prompts.
        resamples (`int`, *optional*, defaults to 1000): Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.
    """

    grid: list[int]
    curves: dict[str, Curve]
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    @property
    def kl(self) -> Tensor:
        """KL in nats at each n of the grid, by equation 11, in float64."""
        return best_of_n_kl_bound(self.grid)

    def estimates(self, values: Tensor) -> list[Estimate]:
        """Estimate the mean over prompts at each n, for `values` of shape (P, G). All n share the bootstrap draws."""
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
        """Fit the curve of Gao et al. to a reward model's gain in gold reward; None if the grid has too few values of n."""
        gold = self.curves[name].gold.mean(dim=0)
        return fit_overoptimisation(self.kl, gold - gold[0], "best_of_n") if len(self.grid) > 2 else None

    def to_dict(self) -> dict[str, Any]:
        """
        Convert the curves to a dictionary with `grid`, `kl`, `confidence` and `prompts`; `curves`, `proxy` and `win_rate`:
        reward model -> n -> `{"mean", "low", "high"}` of the gold reward, the standardised proxy and the win rate; and `fits`:
        reward model -> `a`, `b`, their errors and `peak_kl`.
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
        """Render tables of the gold reward with its interval, of the win rate and of the proxy, followed by the fits."""
        parts = []
        for title, field, form in (
            (f"Gold reward, with the {100 * self.confidence:g}% bootstrap interval over prompts", "gold", "+.2f"),
            ("Win rate by gold over the policy's own responses", "win_rate", ".1%"),
            ("Proxy, in standard deviations of the reward model over the policy's responses", "proxy", "+.2f"),
        ):
            rows = [["n", "KL", *map(escape, self.curves)]]
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
                fits.append([escape(name), *cells, peak, f"{self.kl[best]:.1f} nats (n = {self.grid[best]:,})"])
        if len(fits) > 1:
            parts.append(f"Gain in gold fitted by a d - b d², d = √KL (Gao et al. 2023)\n\n{markdown_table(fits)}")
        return "\n\n".join(parts) + "\n"

    def plot(self, path: str | Path) -> Path:
        """
        Plot gold and proxy reward over KL on the paper's square-root axis, with the intervals as bands.

        Args:
            path (`str` or `Path`): Image to write; the suffix determines the format. Missing folders are created.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # not pyplot: no global state, no display
        except ImportError as error:
            raise ImportError("the curves need matplotlib, which is missing: `pip install matplotlib`.") from error
        figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
        self.draw(figure)
        return save_figure(figure, path)

    def draw(self, figure: Any) -> None:
        """Draw the panels of [`plot`] on a matplotlib figure or subfigure."""
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


def best_of_n_curves(
    prompts: Iterable[tuple[Mapping[str, Tensor], Tensor]], grid: Sequence[int], **bootstrap: Any
) -> BestOfNCurves:
    """
    Estimate the curves of several reward models from the scores of N responses per prompt.

    Args:
        prompts (`Iterable`): For each prompt, a mapping reward model -> scores of shape (N,), and the gold rewards of shape
            (N,). It is consumed one prompt at a time, so a generator needs to hold the scores of only one prompt.
        grid (`Sequence[int]`): Values of n up to N. The value 1, which is the policy itself, is added if it is missing.
        bootstrap: `confidence`, `resamples` and `seed` of [`BestOfNCurves`].

    Raises:
        ValueError: If there is no prompt, the shapes do not match, an n is above N, or a score is NaN or infinite.
    """
    grid = sorted({1, *grid})
    estimates: dict[str, list[Tensor]] = {}  # one tensor of shape (3, G) per prompt
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
    for name, prompt_estimates in estimates.items():
        mean, deviation = pooled_moments(moments[name])
        gold, win_rate, proxy = torch.stack(prompt_estimates, dim=1)  # (P, G) each
        curves[name] = Curve(gold, win_rate, (proxy - mean) / (deviation or 1.0))
    return BestOfNCurves(grid, curves, **bootstrap)


def pooled_moments(moments: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Compute the overall mean and standard deviation of equally large groups from each group's mean and variance."""
    mean, variance = torch.tensor(moments, dtype=torch.float64).T
    return float(mean.mean()), float((variance.mean() + mean.var(correction=0)).sqrt())


def fit_to_dict(fit: OveroptimisationFit) -> dict[str, float | None]:
    """Convert a fit to a dictionary for JSON, in which None replaces numbers that are not finite."""
    numbers = {name: getattr(fit, name) for name in ("a", "b", "a_error", "b_error", "peak_kl")}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
