"""Write docs/one-page.md from train/one_page.py: `python -m tests.support.one_page`.

The comment that begins a part of the program becomes prose, with links, above the part's code.
"""

from __future__ import annotations

import re

from tests.support.pages import replace_between
from tests.support.repo import REPO

SOURCE = REPO / "train/one_page.py"
PAGE = REPO / "docs/one-page.md"
BEGIN, END = "<!-- program: python -m tests.support.one_page -->", "<!-- end of program -->"

PART = re.compile(r"^# -- (.+?) -+\n((?:# .*\n)+)", re.MULTILINE)
FILE = re.compile(r"[a-z_]+(?:/[a-z_0-9]+)+(?:\.py|\.yaml|/)")
ARXIV = re.compile(r"arXiv ([0-9]{4}\.[0-9]{5}|[0-9]{4}\.[0-9]{4})")


def prose(comment: str) -> str:
    """Render a part's comment: its text, then where to read on."""
    text, *margin = re.split(r"\n(?=(?:Hardened|Papers): )", comment)
    lines = [" ".join(text.split())]
    for line in margin:
        kind, _, rest = " ".join(line.split()).partition(": ")
        rest = FILE.sub(lambda m: f"[{m[0]}](../{m[0]})", rest)
        rest = ARXIV.sub(lambda m: f"[{m[0]}](https://arxiv.org/abs/{m[1]})", rest)
        lines.append(f"> {kind}: {rest}")
    return "\n\n".join(lines).replace("\n\n> Papers", "<br>\n> Papers")


def render() -> str:
    """Render the program as Markdown."""
    start, *rest = PART.split(SOURCE.read_text(encoding="utf-8"))
    sections = [f"```python\n{start.strip()}\n```"]
    for heading, comment, code in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        text = prose(re.sub(r"^# ", "", comment, flags=re.MULTILINE).strip())
        sections.append(f"### {heading}\n\n{text}\n\n```python\n{code.strip()}\n```")
    return "\n\n".join(sections)


def updated() -> str:
    """Return the text that the page should have."""
    return replace_between(PAGE.read_text(encoding="utf-8"), BEGIN, END, render())


if __name__ == "__main__":
    PAGE.write_text(updated(), encoding="utf-8")
