"""What the runs of the ladder show: statistics, tables and the plot (tests/benchmarks/ladder.py).

All rungs of a size are trained with the same seeds, and a seed decides initial weights and data
order. So the final losses of a size are a table of randomised blocks, loss = rung + seed + noise,
with the seeds as blocks. The noise is pooled over all rungs: with R rungs and S seeds its variance
has (R - 1)(S - 1) degrees of freedom, and a rung differs from its baseline by more than noise if

    t = difference of means / (noise * sqrt(2 / S))

is unlikely under Student's t. The p of all comparisons of a size are corrected together (Holm
1979), so that one false effect among all of them has the probability that p names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tests.support.pages import replace_between

SIGNIFICANT = 0.01
SMOOTH = 20  # steps whose training losses are averaged for curves

Result = Mapping[str, Any]
"""What `ladder.train_trial` writes."""

Losses = Mapping[str, Sequence[float]]
"""Final losses: rung -> one per seed, in the order of the seeds."""


@dataclass(frozen=True)
class Noise:
    """Spread of losses that differ in nothing but the interaction of rung and seed, nats.

    Attributes:
        sigma: Standard deviation of one loss after rung and seed are taken out.
        degrees: Degrees of freedom of its square.
        seeds: Losses per rung.
    """

    sigma: float
    degrees: int
    seeds: int

    @classmethod
    def of(cls, losses: Losses) -> Noise:
        """Pool the noise over all rungs (two or more, with two or more seeds)."""
        table = np.array(list(losses.values()))  # (rungs, seeds)
        rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        degrees = (table.shape[0] - 1) * (table.shape[1] - 1)
        return cls(math.sqrt((rest**2).sum() / degrees), degrees, table.shape[1])

    @property
    def standard_error(self) -> float:
        """Standard error of the difference between two rungs."""
        return self.sigma * math.sqrt(2 / self.seeds)

    def p(self, difference: float) -> float:
        """Two-sided p of a difference between two rungs."""
        if not self.standard_error:
            return float(difference == 0)
        return float(2 * stats.t.sf(abs(difference) / self.standard_error, self.degrees))


@dataclass(frozen=True)
class Effect:
    """A rung compared with its baseline.

    Attributes:
        rung: Its name.
        baseline: Name of the rung that it is compared with.
        difference: Mean loss minus that of the baseline, nats; below 0 is better.
        interval: Half the width of the 95 % interval of the difference, not corrected.
        p: After Holm's correction.
    """

    rung: str
    baseline: str
    difference: float
    interval: float
    p: float

    @property
    def verdict(self) -> str:
        """ "helped", "hurt", or "no effect measured"."""
        if self.p >= SIGNIFICANT:
            return "no effect measured"
        return "helped" if self.difference < 0 else "hurt"


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979)."""
    order, corrected, highest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, (len(p_values) - rank) * p_values[index])
        corrected[index] = min(1.0, highest)
    return corrected


def effects(losses: Losses, baselines: Mapping[str, str]) -> list[Effect]:
    """Compare rungs with their baselines.

    Args:
        losses: Of all rungs of a size, which share the noise.
        baselines: Rung -> baseline, for the rungs to compare.
    """
    noise = Noise.of(losses)
    means = {rung: float(np.mean(values)) for rung, values in losses.items()}
    differences = [means[rung] - means[base] for rung, base in baselines.items()]
    corrected = holm([noise.p(difference) for difference in differences])
    half = float(stats.t.ppf(0.975, noise.degrees)) * noise.standard_error
    return [
        Effect(rung, base, difference, half, p)
        for (rung, base), difference, p in zip(
            baselines.items(), differences, corrected, strict=True
        )
    ]


class Size:
    """The results of all rungs at one size.

    Attributes:
        losses: Final losses by rung, in the order of the seeds.
        curves: Training losses by rung, (seeds, steps), each the mean of the last `SMOOTH` steps.
        batch_tokens: Tokens per step.
        cost: Processor time of a step by rung, seconds (median of all steps).
    """

    def __init__(self, results: Sequence[Result]) -> None:
        by_rung: dict[str, list[Result]] = {}
        for result in sorted(results, key=lambda r: r["params"]["seed"]):
            by_rung.setdefault(result["rung"], []).append(result)
        most = max(len(runs) for runs in by_rung.values())
        by_rung = {rung: runs for rung, runs in by_rung.items() if len(runs) == most}
        self.losses = {rung: [r["loss"] for r in runs] for rung, runs in by_rung.items()}
        self.curves = {
            rung: np.array([smooth([loss for _, loss in r["train"]]) for r in runs])
            for rung, runs in by_rung.items()
        }
        self.batch_tokens: int = results[0]["params"]["batch_tokens"]
        self.cost = {
            rung: float(np.median([r["step_cpu"] for r in runs])) for rung, runs in by_rung.items()
        }

    def reached(self, rung: str, target: float) -> int | None:
        """The step at which a rung's training loss, mean of all seeds, is at most ``target``."""
        below = np.flatnonzero(self.curves[rung].mean(0) <= target)
        return int(below[0]) + 1 if len(below) else None


def smooth(losses: Sequence[float]) -> NDArray[np.float64]:
    """The mean of the last `SMOOTH` values, of fewer at the beginning."""
    return np.array([np.mean(losses[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(losses))])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def effects_table(size: Size, baselines: Mapping[str, str]) -> str:
    """Table of rungs: loss, difference to the baseline with p, verdict, cost of a step."""
    known = {r: b for r, b in baselines.items() if r in size.losses and b in size.losses}
    rows = []
    for effect in effects(size.losses, known):
        by = f" by {abs(effect.difference):.3f}" if effect.p < SIGNIFICANT else ""
        rows.append(
            (
                f"`{effect.rung}`",
                f"`{effect.baseline}`",
                f"{np.mean(size.losses[effect.rung]):.3f}",
                f"{effect.difference:+.3f} ± {effect.interval:.3f}",
                "< 0.0001" if effect.p < 1e-4 else f"{effect.p:.2g}",
                effect.verdict + by,
                f"{size.cost[effect.rung] / size.cost[effect.baseline]:.2f}",
            )
        )
    head = ("rung", "compared with", "loss", "difference ± 95 %", "p", "verdict", "cost of a step")
    return table(head, rows)


def noise_table(sizes: Mapping[str, Size]) -> str:
    """Table of the noise of each size."""
    rows = []
    for name, size in sizes.items():
        noise = Noise.of(size.losses)
        between = math.sqrt(np.mean([np.var(values, ddof=1) for values in size.losses.values()]))
        smallest = float(stats.t.ppf(1 - SIGNIFICANT / 2, noise.degrees)) * noise.standard_error
        rows.append(
            (
                name,
                f"{len(size.losses)} x {noise.seeds}",
                f"{between:.4f}",
                f"{noise.sigma:.4f}",
                f"{noise.degrees}",
                f"{smallest:.3f}",
            )
        )
    head = (
        *("size", "rungs x seeds", "σ of one loss", "σ without the seed's part"),
        *("degrees of freedom", "smallest difference with p < 0.01, uncorrected"),
    )
    return table(head, rows)


def reached_table(sizes: Mapping[str, Size], first: str, rungs: Sequence[str]) -> str:
    """Table of the steps, and of the time, in which rungs reach the final loss of the first."""
    rows = []
    for name, size in sizes.items():
        steps = size.curves[first].shape[1]
        target = float(size.curves[first].mean(0)[-1])
        for rung in rungs:
            if rung in size.curves:
                step = size.reached(rung, target)
                part = None if step is None else step / steps
                cost = size.cost[rung] / size.cost[first]
                cells = (
                    ("never", "never") if part is None else (f"{part:.0%}", f"{part * cost:.0%}")
                )
                rows.append((name, f"`{rung}`", f"{target:.3f}", *cells))
    return table(("size", "rung", f"target: end of `{first}`", "steps", "time"), rows)


def search_table(results: Sequence[Result]) -> str:
    """Table of the runs that chose the learning rates."""
    rows = [(f"`{r['rung']}`", f"{r['loss']:.3f}") for r in results]
    return table(("rung", "loss"), rows)


def draw(sizes: Mapping[str, Size], rungs: Sequence[str], path: Path) -> None:
    """Plot training loss against tokens, one panel per size, one band over the seeds per rung."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(sizes), 4.8), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, (name, size) in zip(panels, sizes.items(), strict=True):
        for rung in (rung for rung in rungs if rung in size.curves):
            curves = size.curves[rung]
            tokens = np.arange(1, curves.shape[1] + 1) * size.batch_tokens / 1000
            label = f"{rung}: {np.mean(size.losses[rung]):.2f}"
            (line,) = axes.plot(tokens, curves.mean(0), lw=1.5, label=label)
            colour = line.get_color()
            axes.fill_between(tokens, curves.min(0), curves.max(0), color=colour, alpha=0.25, lw=0)
        axes.set_title(name)
        axes.set_xlabel("training tokens, thousands")
        axes.grid(alpha=0.3)
        axes.legend(title="final validation loss", fontsize=9)
    panels[0].set_ylabel(f"training loss, nats (mean of {SMOOTH} steps; band: all seeds)")
    figure.savefig(path, dpi=90)


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replace what is between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` in a page.

    Raises:
        ValueError: The page has no such markers.
    """
    for name, part in parts.items():
        text = replace_between(text, f"<!-- {name} -->", f"<!-- end of {name} -->", part)
    return text
