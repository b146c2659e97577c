"""Tests for train.run_summary: the commit that a run reports."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from train import run_summary


def commit() -> str | None:
    run_summary.commit.cache_clear()
    return run_summary.commit()


def test_only_changed_code_makes_a_commit_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train/loop.py", "metrics/train.json", "dvc.lock", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("as committed\n")
    monkeypatch.chdir(tmp_path)
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "A project")):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    clean = head.stdout[:12]
    assert commit() == clean
    # DVC removes the outputs of a stage before running it, and sets parameters.
    (tmp_path / "metrics/train.json").unlink()
    for name in ("dvc.lock", "params.yaml"):
        (tmp_path / name).write_text("changed\n")
    assert commit() == clean
    (tmp_path / "train/loop.py").write_text("changed\n")
    assert commit() == f"{clean}-dirty"
    monkeypatch.chdir(tmp_path / "train")
    assert commit() == f"{clean}-dirty"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    monkeypatch.setenv("PATH", "")
    assert commit() is None
