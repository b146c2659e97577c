"""`python -m train.report`: one self-contained page of a run, `artifacts/report.html`.

Charts are drawn by matplotlib as SVG inside the page: no script, no network, and sharp on paper.
"""

import csv
import io
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from pipeline import Manifest, atomic, stage
from pipeline.errors import UserError
from pipeline.params import PARAMS

OUT = Path("artifacts/report.html")
CURVES = Path("metrics/live/plots/metrics")

# Okabe and Ito's colours, which the colour-blind can tell apart.
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#777777"


@dataclass(frozen=True)
class Curve:
    """A line of a chart: values over steps."""

    label: str
    steps: list[int]
    values: list[float]
    color: str = _BLUE


def read_curve(name: str, label: str, color: str = _BLUE) -> Curve:
    """A curve as DVCLive wrote it, e.g. ``train/loss``."""
    rows = _table(CURVES / f"{name}.tsv", "\t")
    column = name.split("/")[-1]
    steps, values = [int(row["step"]) for row in rows], [float(row[column]) for row in rows]
    return Curve(label, steps, values, color)


def line_chart(
    curves: list[Curve], y_label: str, level: tuple[float, str] | None = None, wide: bool = False
) -> str:
    """Curves over the step, as an SVG element; ``level`` is a horizontal line and its name."""
    figure, axes = _figure(wide)
    for curve in curves:
        few = len(curve.steps) <= 30
        axes.plot(
            curve.steps,
            curve.values,
            color=curve.color,
            label=curve.label,
            linewidth=1.6,
            marker="o" if few else None,
            markersize=3.5,
        )
    if level is not None:
        axes.axhline(level[0], color=_GREY, linestyle="--", linewidth=1.2, label=level[1])
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    if len(curves) > 1 or level is not None:
        axes.legend(frameon=False)
    return _svg(figure)


def bar_chart(labels: list[str], counts: list[int], x_label: str) -> str:
    """Horizontal bars, as an SVG element."""
    figure, axes = _figure(wide=False)
    axes.barh(labels, counts, color=_BLUE)
    axes.bar_label(axes.containers[0], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    return _svg(figure)


def _figure(wide: bool) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    figure = Figure(figsize=(8.6, 3.6) if wide else (4.8, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Fixed ids and no date: the same run gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `dvc repro` makes it") from None


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_read(path))
    return value


def _table(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(_read(path)), delimiter=delimiter))


def render() -> str:
    """The page of the run whose metrics, curves, samples and checkpoint lie here.

    Raises:
        UserError: one of them is missing.
    """
    data, train, evaluation = (_json(Path(f"metrics/{n}.json")) for n in ("data", "train", "eval"))
    manifest = Manifest.load("data/tokens")
    lengths = _table(Path("metrics/document_lengths.csv"))
    unigram = (evaluation["unigram_entropy"], "unigram entropy of the training tokens")
    losses = [read_curve("train/loss", "training"), read_curve("val/loss", "validation", _ORANGE)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["figure"] = _figure_text
    template = (resources.files("train") / "report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        state=_json(Path("artifacts/checkpoint/state.json")),
        data=data,
        train=train,
        evaluation=evaluation,
        manifest=manifest,
        loss_chart=line_chart(losses, "loss, nats a token", unigram, wide=True),
        charts=[
            ("Learning rate", line_chart([read_curve("lr", "lr")], "learning rate")),
            ("Gradient norm", line_chart([read_curve("grad_norm", "norm")], "before clipping")),
            ("Speed", line_chart([read_curve("tokens_per_second", "speed")], "tokens a second")),
            (
                "Documents by length in tokens",
                bar_chart(
                    [row["tokens"] for row in lengths],
                    [int(row["documents"]) for row in lengths],
                    "documents",
                ),
            ),
        ],
        samples=_samples(Path("artifacts/samples.md")),
        params=_read(PARAMS),
    )


def _figure_text(value: Any) -> str:
    """A number as a person reads it: four decimals for fractions, thousands grouped."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _samples(path: Path) -> list[str]:
    """The quoted texts of the samples' page."""
    texts: list[list[str]] = []
    for line in _read(path).splitlines():
        if line.startswith("## "):
            texts.append([])
        elif line.startswith(">") and texts:
            texts[-1].append(line[1:].strip())
    return ["\n".join(lines).replace("**", "") for lines in texts]


def main() -> None:
    """Write the page, print one summary."""
    page = render()
    atomic.write_bytes(OUT, page.encode())
    print(f"report: {OUT}, {len(page) / 1e3:.0f} kB, opens in any browser without a network")


if __name__ == "__main__":
    stage.run(main)
