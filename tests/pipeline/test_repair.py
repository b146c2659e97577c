"""Tests for pipeline.repair; tests/reliability kills a real `dvc` at each of its writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from pipeline import repair
from pipeline.runtime.errors import UserError

GOOD = "schema: '2.0'\nstages:\n  a:\n    cmd: none\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a lock of DVC, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / "dvc.lock").write_text(GOOD)
    return tmp_path


def rwlock(pid: int) -> str:
    return json.dumps({"out": {"write": {"pid": pid, "cmd": "dvc repro"}}})


def test_torn_files_of_dvc_are_repaired_and_others_are_kept(project: Path) -> None:
    done = project / ".dvc/cache/runs/ab/abcd/ef01"
    torn = [done.with_name("ef01.x7.tmp"), done.parents[1] / "ab02/.x7.tmp"]
    for path in (done, *torn):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(GOOD)
    (project / ".dvc/tmp/rwlock").write_text(rwlock(1)[:-9])
    assert len([*repair.repair()]) == 4  # two files, a folder, and the rwlock
    assert [p for p in project.rglob("*") if p.is_file()] == [project / "dvc.lock", done]
    assert not torn[1].parent.exists()
    assert [*repair.repair()] == []


@pytest.mark.parametrize("torn", ["", GOOD[:-6], GOOD[:20], "\0"])
def test_torn_lock_file_is_the_committed_one_again_or_removed(project: Path, torn: str) -> None:
    lock = project / "dvc.lock"
    lock.write_text(torn)
    (line,) = repair.repair()
    assert line.startswith("dvc.lock: ")
    assert not lock.exists()
    lock.write_text(GOOD)
    user = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    for command in (("init", "-q"), ("add", "dvc.lock"), (*user, "commit", "-qm", "x")):
        subprocess.run(["git", *command], check=True)
    lock.write_text(torn)
    (line,) = repair.repair()
    assert lock.read_text() == GOOD
    assert [*repair.repair()] == []


def test_a_running_dvc_is_left_alone(project: Path) -> None:
    (project / ".dvc/tmp/rwlock").write_text(rwlock(os.getpid()))
    (project / "dvc.lock").write_text("")
    with pytest.raises(UserError, match=f"rwlock.*{os.getpid()}"):
        [*repair.repair()]
    assert (project / "dvc.lock").read_text() == ""
