"""Tests for pipeline.store.code_key: code changes the key, comments and docstrings do not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.errors import UserError
from pipeline.store.code_key import PACKAGES, code_key, code_only
from tests.support.repo import REPO

SOURCE = '''\
#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""Module docstring: naïve, 漢字."""

import os  # a comment


class Ünder(Exception):
    """One line."""

    field: int = 1
    """Docstring of an attribute."""

    def f(self, x): "one-liner"; return x


def g(a,  # first
      b=2):
    # only a comment

    \'\'\'Docstring of
    two lines.

    \'\'\'
    text = """kept  # no comment

  blank lines above are part of it\x20\x20
"""; more = f"{a!r:>{b}} # {text}"
    long = f\'\'\'# kept

    {a + len("""x""")}\x20
    # kept {b}\'\'\'  # not kept
    return (text +

            more
            # inside brackets
            + "a" 'b'
            # between parts
            "c") + \\
        "d"
async def h():
    """x"""; await g(1)
'''
CODE = '''\
import os
class Ünder(Exception):
    field: int = 1
    def f(self, x): ; return x
def g(a,
      b=2):
    text = """kept  # no comment

  blank lines above are part of it\x20\x20
"""; more = f"{a!r:>{b}} # {text}"
    long = f\'\'\'# kept

    {a + len("""x""")}\x20
    # kept {b}\'\'\'
    return (text +
            more
            + "a" 'b'
            "c") + \\
        "d"
async def h():
    ; await g(1)'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  tokenize:\n    deps: [data/raw, pipeline/b.py, pipeline/room]\n"
    )
    for name in ("b", "c", "room/a", "room/deep/d"):
        path = tmp_path / f"pipeline/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    (tmp_path / "pipeline/room/data.txt").write_text("no code")
    return tmp_path


def test_code_without_comments_docstrings_and_blank_lines() -> None:
    assert code_only(SOURCE) == CODE


def test_an_empty_line_after_a_backslash_ends_the_statement() -> None:
    assert code_only("x = 1 \\\n\n-y") != code_only("x = 1 \\\n-y")
    assert code_only("x = 1 \\\n# end\n-y") == code_only("x = 1 \\\n\n-y")


@pytest.mark.parametrize("module", ["b", "room/a", "room/deep/d"])
def test_key_depends_on_the_code_of_listed_modules_and_rooms_only(root: Path, module: str) -> None:
    key = code_key("tokenize", root)
    path = root / f"pipeline/{module}.py"
    path.write_text('# comment\n\n"""Docstring."""\nx = 1  # and another\n\n')
    (root / "pipeline/c.py").write_text("y = 2\n")
    (root / "pipeline/room/data.txt").write_text("other")
    assert code_key("tokenize", root) == key
    path.write_text("x = 2\n")
    assert code_key("tokenize", root) != key


def test_key_depends_on_the_names_and_boundaries_of_modules(root: Path) -> None:
    keys = {code_key("tokenize", root)}
    (root / "pipeline/room/a.py").rename(root / "pipeline/room/e.py")
    keys.add(code_key("tokenize", root))
    (root / "pipeline/room/e.py").write_text("x = 1\nx = 1\n")
    (root / "pipeline/room/deep/d.py").write_text("")
    keys.add(code_key("tokenize", root))
    (root / "pipeline/room/f.py").write_text("")
    keys.add(code_key("tokenize", root))
    assert len(keys) == 4


def test_key_is_the_same_on_every_version_of_python(root: Path) -> None:
    (root / "pipeline/b.py").write_text(SOURCE, encoding="utf-8")
    golden = "8c6d2bf6a65071ea4f9281ca7d1cb6c155a831b3c5aa8d824aa50f0f356cece6"
    assert code_key("tokenize", root) == golden


MODULES = [path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))]


@given(st.data())
def test_comments_and_blank_lines_anywhere_change_nothing(data: st.DataObject) -> None:
    """In our own modules, at line ends outside strings and continued lines."""
    source = data.draw(st.sampled_from(MODULES)).read_text(encoding="utf-8")
    lines = source.split("\n")
    for number in data.draw(st.lists(st.integers(0, len(lines)), max_size=8)):
        added = data.draw(st.sampled_from(["", "   ", "# a word", '        # deeper: "quoted" \'']))
        lines.insert(number, added)
    changed = "\n".join(lines)
    try:
        same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError:  # after a backslash
        return
    if same:  # else the line is inside a string
        assert code_only(changed) == code_only(source)


@given(st.data())
def test_other_changes_of_our_modules_change_the_code(data: st.DataObject) -> None:
    """Replace one character; the syntax tree shows whether it was code."""
    source = data.draw(st.sampled_from(MODULES)).read_text(encoding="utf-8")
    at = data.draw(st.integers(0, len(source) - 1))
    changed = source[:at] + data.draw(st.sampled_from("x0+ '#")) + source[at + 1 :]
    try:
        differs = _tree(changed) != _tree(source)
    except (SyntaxError, ValueError):
        return
    if differs:
        assert code_only(changed) != code_only(source)


def _tree(source: str) -> str:
    return ast.dump(_WithoutDocstrings().visit(ast.parse(source)))


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_string = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_string else node


@pytest.mark.parametrize(
    ("graph", "named"),
    [
        (None, "dvc.yaml"),
        ("stages: {verify: {}}", "tokenize"),
        ("stages: {tokenize: {deps: [pipeline/x.py]}}", "pipeline/x.py"),
        ("stages: {tokenize: {deps: [pipeline/no]}}", "pipeline/no"),
    ],
)
def test_missing_graph_stage_or_dep_is_named(tmp_path: Path, graph: str | None, named: str) -> None:
    if graph is not None:
        (tmp_path / "dvc.yaml").write_text(graph)
    with pytest.raises(UserError, match=named):
        code_key("tokenize", tmp_path)
