"""Of train.describe: which commit a run says it is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from train import run_summary


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed project, as far as git is concerned; the current folder."""
    for name in ("train/loop.py", "metrics/train.json", "dvc.lock", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("as committed\n")
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "A project")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commit() -> str | None:
    run_summary.commit.cache_clear()
    return run_summary.commit()


def test_only_changed_code_makes_a_commit_dirty(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    clean = head.stdout[:12]
    assert commit() == clean
    # What DVC changes on the way to the training: it removes a stage's outs, and sets parameters.
    (repository / "metrics/train.json").unlink()
    for name in ("dvc.lock", "params.yaml"):
        (repository / name).write_text("changed\n")
    assert commit() == clean
    (repository / "train/loop.py").write_text("changed\n")
    assert commit() == f"{clean}-dirty"
    monkeypatch.chdir(repository / "train")
    assert commit() == f"{clean}-dirty"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    monkeypatch.setenv("PATH", "")
    assert commit() is None
