"""`code_key`: the hash of the code that makes a piece, part of the piece's key.

It covers code only: comments, docstrings and blank lines can change without re-tokenizing 10
billion tokens or retraining a model. Any other change of the text changes the key.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import read_yaml

PACKAGES = ("pipeline", "model", "train")


def stage_modules(stage: str, root: Path = Path()) -> list[Path]:
    """Return the sorted modules among a stage's ``deps``; a folder stands for all modules in it.

    Raises:
        UserError: `dvc.yaml`, the stage, or a dep is missing.
    """
    stages = read_yaml(root / "dvc.yaml").get("stages", {})
    if stage not in stages:
        raise UserError(f"dvc.yaml: stage {stage} is missing")
    modules: set[Path] = set()
    for dep in map(Path, stages[stage]["deps"]):
        if dep.suffix == ".py" or (not dep.suffix and dep.parts[0] in PACKAGES):
            found = [root / dep] if dep.suffix else [*(root / dep).rglob("[!.]*.py")]
            if not found or not found[0].is_file():
                raise UserError(f"dvc.yaml: stage {stage}: {dep} does not exist or has no modules")
            modules.update(path.relative_to(root) for path in found)
    return sorted(modules)


def code_key(stage: str, root: Path = Path()) -> str:
    """Return the sha256 of the names and the code of a stage's modules."""
    return modules_key(stage_modules(stage, root), root)


def modules_key(modules: Iterable[Path], root: Path = Path()) -> str:
    """Return the sha256 of the names and the code of modules."""
    digest = hashlib.sha256()
    for module in modules:
        code = code_only((root / module).read_text(encoding="utf-8")).encode()
        digest.update(f"{module.as_posix()}\0{len(code)}\0".encode() + code)
    return digest.hexdigest()


def code_only(source: str) -> str:
    """Return a module's text without comments, docstrings, blank lines and trailing white space.

    The result is text, because tokens and syntax trees differ between versions of Python (an
    f-string is one token before 3.12). A docstring is any statement that is only a string, such as
    that of an attribute. Lines inside other strings are unchanged.
    """
    lines = source.split("\n")
    cuts, inside = _scan(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and _is_string(node.value):
            assert node.end_lineno is not None
            cuts += _spans(node, lines)
            inside -= set(range(node.lineno, node.end_lineno))
    for number, start, end in sorted(cuts, reverse=True):
        lines[number - 1] = lines[number - 1][:start] + lines[number - 1][end:]
    code: list[str] = []
    for number, line in enumerate(lines, 1):
        # After a backslash, an empty line ends the statement.
        if number in inside or line.strip() or (code and code[-1].endswith("\\")):
            code.append(line if number in inside else line.rstrip())
    return "\n".join(code)


_Span = tuple[int, int, int]  # line from 1, first character, character after the last


def _scan(source: str) -> tuple[list[_Span], set[int]]:
    """Return the spans of the comments, and the lines whose end is inside a string.

    The white space at the end of such a line is part of the string.
    """
    comments: list[_Span] = []
    inside: set[int] = set()
    open_f_strings: list[int] = []  # from 3.12 on these come in parts
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, start), (last, end) = token.start, token.end
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT":
            comments.append((first, start, end))
        elif kind in ("FSTRING_START", "TSTRING_START"):
            open_f_strings.append(first)
        elif kind in ("FSTRING_END", "TSTRING_END"):
            inside.update(range(open_f_strings.pop(), last))
        elif kind == "STRING":
            inside.update(range(first, last))
    return comments, inside


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _spans(node: ast.Expr, lines: list[str]) -> list[_Span]:
    """Return the span of a statement in each of its lines; the syntax tree counts bytes."""

    def characters(number: int, offset: int | None) -> int:
        return len(lines[number - 1].encode()[:offset].decode())

    first, last = node.lineno, node.end_lineno or node.lineno
    return [
        (
            number,
            characters(number, node.col_offset if number == first else 0),
            characters(number, node.end_col_offset if number == last else None),
        )
        for number in range(first, last + 1)
    ]
