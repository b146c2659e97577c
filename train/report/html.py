"""Self-contained HTML pages: the templates in `pages/`, and formats for numbers and text.

A page loads nothing from a network: its content security policy (pages/page.html) forbids it.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """Render a template of `pages/`, such as ``report.html``."""

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
        "number": number,
        "percent": percent,
        "visible_spaces": visible_spaces,
        "single_line": single_line,
    }
    return environment.get_template(template).render(**values)


def number(value: Any) -> str:
    """Format a number with five digits or four decimals, and any other value as text."""
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
    """Format a fraction as a percentage."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if value < 0.001:
        return "< 0.001 %"
    if value < 1:
        return f"{value:.2g} %"
    if value < 9.95 or value >= 99:  # 99.7 % is not 100 %
        return f"{min(value, 99.9):.1f} %"
    return f"{value:.0f} %"


def quantity(value: float, unit: str) -> str:
    """Format a quantity with an SI prefix: 29 MB, 3.1 EFLOP."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}"


def duration(seconds: float) -> str:
    """Format a time: 42 s, 4 min 14 s, 38 min, 3 h 52 min."""
    minutes, rest = divmod(round(seconds), 60)
    if 10 <= minutes < 60:
        return f"{minutes} min"
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def visible_spaces(text: str) -> str:
    """Replace white space with visible signs."""
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def single_line(text: str) -> str:
    """Replace line breaks with a visible sign."""
    return re.sub(r"\s*\n\s*", " ↵ ", text)
