"""Self-contained pages: templates of `pages/`, and numbers and text as they stand there.

A page asks no network for anything: its policy (pages/page.html) has the browser refuse to.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import jinja2


def page(template: str, **values: Any) -> str:
    """The page of a template, such as ``report.html``."""

    def load(name: str) -> str:
        return (resources.files("train.report") / "pages" / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "percent": percent,
        "visible": visible,
        "on_one_line": on_one_line,
    }
    return environment.get_template(template).render(**values)


def figure(value: Any) -> str:
    """A number as a person reads it: five digits or four decimals, thousands grouped."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{round(value, 4) if abs(value) >= 0.01 else value:.5g}"


def percent(share: float) -> str:
    """A share as a percentage."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if value < 0.001:
        return "< 0.001 %"
    if value < 1:
        return f"{value:.2g} %"
    if value < 9.95 or value >= 99:  # 99.7 % is not all
        return f"{min(value, 99.9):.1f} %"
    return f"{value:.0f} %"


def size(value: float, unit: str = "B") -> str:
    """An amount with the SI prefix that fits: 29 MB, 3.1 EFLOP."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}"


def duration(seconds: float) -> str:
    """A time as a person says it: 42 s, 4 min 14 s, 3 h 52 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def visible(text: str) -> str:
    """A token's text with its white space made visible."""
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def on_one_line(text: str) -> str:
    """A text whose ends of lines are shown as a sign."""
    return re.sub(r"\s*\n\s*", " ↵ ", text)
