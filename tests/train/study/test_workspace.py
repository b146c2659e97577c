"""Tests for the clone of a study, with a pipeline whose stages take no time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.runtime.errors import StageFailed, UserError
from tests.support.clone import Clone, stages_run
from tests.support.repo import REPO
from train.preset import read_preset
from train.study.workspace import Workspace, check_committed, check_names, experiment_ref, git

# Fails with the status 1 or 2 for these seeds.
EVALUATE = """
status=$(sed -nE 's/^  seed. ([12])( .*)?$/\\1/p' params.yaml)
test -n "$status" && exit $status
mkdir -p artifacts/checkpoint && grep " learning_rate" params.yaml > artifacts/checkpoint/x
cat "${DVC_ROOT:-.}/weights" >> artifacts/checkpoint/x
"""
PIPELINE = """
stages:
  evaluate:
    cmd: sh ./evaluate.sh
    params: [train]
    outs: [artifacts/checkpoint]
  export:
    cmd: mkdir -p artifacts/hf && cp artifacts/checkpoint/x artifacts/hf
    deps: [artifacts/checkpoint]
    outs: [artifacts/hf]
  report:
    cmd: cp artifacts/checkpoint/x artifacts/report.html
    deps: [artifacts/checkpoint]
    outs: [artifacts/report.html]
"""


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
    check_committed(main, ["held-out.jsonl", "untracked.jsonl", "/elsewhere/x", "missing", "../x"])
    (main / name).write_text("2\n")
    with pytest.raises(UserError, match=name):
        check_committed(main, ["held-out.jsonl", "untracked.jsonl"])


def test_an_experiment_is_complete_and_has_nothing_of_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = Clone(tmp_path / "project")
    clone.folder.mkdir()
    for key, value in clone.env.items():
        monkeypatch.setenv(key, value)
    shutil.copy(REPO / "params.yaml", clone.folder)
    (clone.folder / "dvc.yaml").write_text(PIPELINE)
    (clone.folder / "evaluate.sh").write_text(EVALUATE)
    (clone.folder / ".gitignore").write_text("/artifacts\n/tree\n/log\n/weights\n")
    (clone.folder / "weights").write_text("old")
    clone.git("init", "-q")
    clone.git("config", "user.name", "Test")
    clone.git("config", "user.email", "test@example.org")
    clone.run("dvc", "init", "-q")
    clone.run("dvc", "repro")
    clone.git("add", "-A")
    clone.git("commit", "-qm", "A run of the user's")
    shutil.rmtree(clone.folder / "artifacts/hf")  # neither is the model of this run in the cache
    shutil.rmtree(clone.folder / ".dvc/cache")
    space = Workspace(clone.folder, clone.folder / "tree", clone.folder / "log")
    params = read_preset("mini")
    params["train"]["learning_rate"] = 0.00123
    space.reproduce(params, "evaluate", "one-a-1")
    space.save("one-a-1", "Study one, variant a, seed 1")
    clone.run("dvc", "exp", "apply", "one-a-1")
    assert "0.00123" in (clone.folder / "artifacts/checkpoint/x").read_text()
    assert not [*(clone.folder / "artifacts/hf").iterdir()]
    assert (clone.folder / "artifacts/report.html").read_bytes() == b""
    assert stages_run(clone.run("dvc", "repro", "--dry")) == {"export", "report"}
    # Of the same parameters, but of a file that has changed: nothing comes from the run cache.
    (clone.folder / "weights").write_text("new")
    other = Workspace(clone.folder, clone.folder / "tree", clone.folder / "log")
    other.reproduce(params, "evaluate", "one-a-1")
    assert (other.folder / "artifacts/checkpoint/x").read_text().endswith("new")
    for status, error in ((1, StageFailed), (2, UserError)):
        params["train"]["seed"] = status
        with pytest.raises(error, match="one-b-1"):
            space.reproduce(params, "evaluate", "one-b-1")
