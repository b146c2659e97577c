"""Of pipeline.code: the key that parts the pieces of old code from those of new."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runtime.errors import UserError
from pipeline.store.code_key import code_key, stage_modules


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  tokenize:\n    deps: [data/raw, pipeline/b.py, pipeline/a.py]\n"
    )
    (tmp_path / "pipeline").mkdir()
    for name in "abc":
        (tmp_path / "pipeline" / f"{name}.py").write_text(f"{name} = 1\n")
    return tmp_path


def test_the_key_changes_with_the_modules_listed_and_with_no_other(root: Path) -> None:
    assert stage_modules("tokenize", root) == [Path("pipeline/a.py"), Path("pipeline/b.py")]
    key = code_key("tokenize", root)
    (root / "pipeline/c.py").write_text("c = 2\n")
    assert code_key("tokenize", root) == key
    (root / "pipeline/a.py").write_text("a = 2\n")
    assert code_key("tokenize", root) != key
    (root / "pipeline/a.py").write_text("a = 1\n")
    assert code_key("tokenize", root) == key
    # Bytes do not slide from one module into the next.
    (root / "pipeline/a.py").write_text("a = 1\nb = 1\n")
    (root / "pipeline/b.py").write_text("")
    assert code_key("tokenize", root) != key


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(UserError, match="stage tokenise is missing"):
        code_key("tokenise", root)
    (root / "pipeline/a.py").unlink()
    with pytest.raises(UserError, match=r"stage tokenize: pipeline/a\.py does not exist"):
        code_key("tokenize", root)
    (root / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"dvc\.yaml: no such file"):
        code_key("tokenize", root)
