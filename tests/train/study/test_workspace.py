"""Tests for the clone of a study: what is refused before it is made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.runtime.errors import UserError
from train.study.workspace import check_committed, check_names, experiment_ref, git


@pytest.fixture
def main(tmp_path: Path) -> Path:
    """A repository with a commit."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for key, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        git(tmp_path, "config", key, value)
    for name in ("train/run.py", "held-out.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "A commit")
    return tmp_path


def test_an_experiment_of_another_study_is_not_replaced(main: Path) -> None:
    head = git(main, "rev-parse", "HEAD")
    check_names(main, {"a-b-c-1": "Study a, variant b-c, seed 1"})
    git(main, "update-ref", experiment_ref(head, "a-b-c-1"), head)
    with pytest.raises(UserError, match="a-b-c-1"):
        check_names(main, {"a-b-c-1": "Study a, variant b-c, seed 1"})
    check_names(main, {"a-b-c-1": "A commit", "other": "x"})


@pytest.mark.parametrize("name", ["train/run.py", "train/new.py", "held-out.jsonl"])
def test_what_differs_from_the_commit_is_refused(main: Path, name: str) -> None:
    check_committed(main, ["held-out.jsonl", "untracked.jsonl"])
    (main / "untracked.jsonl").write_text("1\n")
    check_committed(main, ["held-out.jsonl", "untracked.jsonl", "/elsewhere/x", "missing"])
    (main / name).write_text("2\n")
    with pytest.raises(UserError, match=name):
        check_committed(main, ["held-out.jsonl", "untracked.jsonl"])
