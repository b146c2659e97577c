"""Charts for a page: SVG drawn by matplotlib, with the colours and the font of the page.

SVG is sharp on paper and needs no script, and its colours follow the page's light or dark scheme.
Charts are drawn small: they keep their size on a phone and grow on a desktop.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, WIDE = 3.9, 2.6, 8.6  # inches

SERIES = ("c1", "c2", "c3", "c4", "c5", "c6")
"""Colours of curves, in order: CSS variables of pages/page.html."""

# matplotlib draws in these colours; `_svg` replaces them with the CSS variables.
_HEX = {name: f"#0a0b{i:02x}" for i, name in enumerate((*SERIES, "soft", "line"))}
_INK, _GRID = _HEX["soft"], _HEX["line"]

MAX_POINTS = 1200  # per curve: more are not visible and make the page large


@dataclass(frozen=True)
class Curve:
    """Curve of a line chart."""

    label: str  # name in the legend
    xs: Sequence[float]  # horizontal positions, ascending
    ys: Sequence[float]  # values, as many as `xs`
    color: str = "c1"  # name in `SERIES`, or "soft"
    faint: bool = False  # whether it is drawn as the background of another curve
    dashed: bool = False  # whether the line is dashed
    band: Sequence[float] = ()  # half the height of a band around the line, per point


def line_chart(
    curves: Sequence[Curve],
    *,
    name: str,
    y_label: str,
    x_label: str = "step",
    y_range: tuple[float | None, float | None] = (None, None),
    log_scale: bool = False,
    wide: bool = False,
) -> str:
    """Draw at least one curve and return an SVG element.

    Args:
        name: Description for screen readers.
        y_range: Lowest and highest value shown; None: slightly beyond the curves.
        log_scale: Whether the vertical axis is logarithmic; ignored if a value is not positive.
        wide: Whether the chart is as wide as the page.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure, axes = _figure(WIDE if wide else WIDTH, HEIGHT * (1.15 if wide else 1))
    for curve in curves:
        if curve.band:
            both = list(zip(curve.ys, curve.band, strict=True))
            axes.fill_between(
                curve.xs,
                [y - half for y, half in both],
                [y + half for y, half in both],
                color=_HEX[curve.color],
                alpha=0.18,
                linewidth=0,
            )
        xs, ys = _downsample(curve.xs, curve.ys)
        axes.plot(
            xs,
            [float(f"{y:.5g}") for y in ys],
            color=_HEX[curve.color],
            label=curve.label,
            linewidth=0.8 if curve.faint else 1.6,
            alpha=0.35 if curve.faint else 1,
            linestyle=(0, (4, 2.5)) if curve.dashed else "-",
            marker="o" if len(xs) <= 15 and not (curve.faint or curve.dashed) else None,
            markersize=3,
            solid_capstyle="round",
            solid_joinstyle="round",
        )
    axes.set(xlabel=x_label, ylabel=y_label)
    rounds = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(10 if wide else 5, integer=True, steps=rounds))
    axes.yaxis.set_major_locator(MaxNLocator(7 if wide else 5, steps=rounds))
    values = [y for curve in curves for y in curve.ys]
    if log_scale and min(values) > 0:
        axes.set_yscale("log")
        few = max(values) < 100 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
    axes.yaxis.set_major_formatter(lambda y, _: tick_label(y))
    axes.margins(x=0.02)
    low, high = y_range
    if low is not None and high is None:  # matplotlib's margin ignores `low`
        high = low + 1.06 * (max(values) - low) or None
    axes.set_ylim(low, high)
    if len(curves) > 1:
        figure.legend(
            loc="outside upper left",
            ncols=len(curves) if wide or sum(len(c.label) for c in curves) < 26 else 2,
            frameon=False,
            labelcolor=_INK,
            fontsize=8.5,
            handlelength=1.4,
            columnspacing=1.6,
        )
    return _svg(figure, name)


def bar_chart(labels: Sequence[str], counts: Sequence[int], *, name: str, color: str = "c1") -> str:
    """Draw horizontal bars and return an SVG element."""
    figure, axes = _figure(WIDTH, 0.1 + 0.25 * len(labels))
    bars = axes.barh(range(len(labels)), counts, color=_HEX[color], height=0.7)
    axes.set_yticks(range(len(labels)), labels)
    axes.bar_label(bars, [f"{n:,}" for n in counts], padding=3, fontsize=8, color=_INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # top to bottom; bars are equally thick in all charts
    axes.margins(x=0.14)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    return _svg(figure, name)


def dot_chart(
    labels: Sequence[str], values: Sequence[Sequence[float]], *, name: str, x_label: str
) -> str:
    """Draw a row per label: its values as dots, their mean, and a band of a standard deviation."""
    figure, axes = _figure(WIDE, 0.7 + 0.32 * len(labels))
    for row, found in enumerate(values):
        color = _HEX[SERIES[row % len(SERIES)]]
        if found:
            mean = statistics.fmean(found)
            noise = statistics.stdev(found) if len(found) > 1 else 0.0
            axes.barh(row, 2 * noise, left=mean - noise, height=0.5, color=color, alpha=0.18)
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color=color, linewidth=1.6)
            axes.plot(found, [row] * len(found), "o", color=color, markersize=3.5, alpha=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set(xlabel=x_label)
    axes.xaxis.set_major_formatter(lambda x, _: tick_label(x))
    axes.use_sticky_edges = False  # of bars, which would have no margin
    axes.margins(x=0.05)
    return _svg(figure, name)


def running_mean(values: Sequence[float], memory: int) -> list[float]:
    """Return the exponential running mean over about ``memory`` values, unbiased at the start."""
    keep, total, weight, means = 1 - 1 / max(1, memory), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def tick_label(value: float) -> str:
    """Format a number for an axis: 12,000, 0.25, 3e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _downsample(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Keep at most `MAX_POINTS` points: the lowest and the highest of each interval."""
    last, kept = len(xs) - 1, list(range(len(xs)))
    if last >= MAX_POINTS:
        size = -(-len(xs) // (MAX_POINTS // 2 - 1))
        intervals = [range(i, min(i + size, len(xs))) for i in range(0, len(xs), size)]
        extremes = {end(part, key=lambda i: ys[i]) for part in intervals for end in (min, max)}
        kept = sorted({0, last} | extremes)
    return [xs[i] for i in kept], [ys[i] for i in kept]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    style: Any = {
        "font.size": 9,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.7,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Fixed ids and no date: the same run gives the same page.
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for variable, color in _HEX.items():
        text = text.replace(color, f"var(--{variable})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    # A page has several charts: keep only the ids that are referenced.
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    label = escape(name, {'"': "&quot;"})
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
