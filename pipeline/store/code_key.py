"""`code_key`: which code made a piece, so that changed code never meets pieces of the old code.

The key covers code only: a comment, a docstring or a blank line can change without re-tokenizing
10 billion tokens or retraining a model. Any other change of the text changes the key.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import read_yaml

PACKAGES = ("pipeline", "model", "train")


def stage_modules(stage: str, root: Path = Path()) -> list[Path]:
    """The Python modules among the ``deps`` of a stage of `dvc.yaml`, sorted.

    A dep without a suffix inside one of our packages is a room: all modules below it.

    Raises:
        UserError: no `dvc.yaml` here, no such stage in it, or a dep that is not there.
    """
    stages = read_yaml(root / "dvc.yaml").get("stages", {})
    if stage not in stages:
        raise UserError(f"dvc.yaml: stage {stage} is missing")
    modules: set[Path] = set()
    for dep in map(Path, stages[stage]["deps"]):
        if dep.suffix == ".py":
            found = [dep] if (root / dep).is_file() else []
        elif not dep.suffix and dep.parts[0] in PACKAGES:
            found = [path.relative_to(root) for path in (root / dep).rglob("*.py")]
        else:
            continue
        if not found:
            raise UserError(f"dvc.yaml: stage {stage}: {dep} does not exist or holds no modules")
        modules.update(found)
    return sorted(modules)


def code_key(stage: str, root: Path = Path()) -> str:
    """The sha256 over the names and the code of a stage's modules."""
    digest = hashlib.sha256()
    for module in stage_modules(stage, root):
        code = code_only((root / module).read_text(encoding="utf-8")).encode()
        digest.update(f"{module.as_posix()}\0{len(code)}\0".encode() + code)
    return digest.hexdigest()


def code_only(source: str) -> str:
    """A module's text without comments, docstrings, blank lines and trailing white space.

    What is left is text, not tokens or a syntax tree: those differ between versions of Python (an
    f-string is one token before 3.12), and the key must not. A docstring is any statement that is
    only a string, so those of attributes count. Lines inside other strings stay as they are.

    Raises:
        SyntaxError: ``source`` is not Python.
    """
    lines = source.split("\n")
    cuts, inside = _comments(source), _inside_strings(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and _is_string(node.value):
            assert node.end_lineno is not None
            cuts += _spans(node, lines)
            inside -= set(range(node.lineno, node.end_lineno))
    for number, start, end in sorted(cuts, reverse=True):
        lines[number - 1] = lines[number - 1][:start] + lines[number - 1][end:]
    numbered = enumerate(lines, 1)
    code = (line if number in inside else line.rstrip() for number, line in numbered)
    return "\n".join(line for number, line in enumerate(code, 1) if line or number in inside)


_Span = tuple[int, int, int]  # line from 1, first character, character after the last


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(source).readline)


def _comments(source: str) -> list[_Span]:
    return [
        (token.start[0], token.start[1], token.end[1])
        for token in _tokens(source)
        if token.type == tokenize.COMMENT
    ]


def _inside_strings(source: str) -> set[int]:
    """The lines whose end lies inside a string: their white space is part of it."""
    found: set[int] = set()
    open_f_strings: list[int] = []  # from 3.12 on these come in parts
    for token in _tokens(source):
        kind = tokenize.tok_name[token.type]
        if kind in ("FSTRING_START", "TSTRING_START"):
            open_f_strings.append(token.start[0])
        elif kind in ("FSTRING_END", "TSTRING_END"):
            found.update(range(open_f_strings.pop(), token.end[0]))
        elif kind == "STRING":
            found.update(range(token.start[0], token.end[0]))
    return found


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _spans(node: ast.Expr, lines: list[str]) -> list[_Span]:
    """Where a statement is, line by line; the syntax tree counts bytes, we count characters."""
    first, last = node.lineno, node.end_lineno or node.lineno

    def characters(number: int, offset: int) -> int:
        return len(lines[number - 1].encode()[:offset].decode())

    return [
        (
            number,
            characters(number, node.col_offset) if number == first else 0,
            characters(number, node.end_col_offset or 0)
            if number == last
            else len(lines[number - 1]),
        )
        for number in range(first, last + 1)
    ]
