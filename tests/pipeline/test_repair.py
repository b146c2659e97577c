"""Tests for pipeline.repair; tests/reliability kills a real `dvc` at each of its writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from dvc.lock import make_lock

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
    token = ".HrVB8rG-_LMBalT7q1jMEg.tmp"
    torn = [done.with_name(f"ef01{token}"), done.parents[1] / "ab02" / token]
    torn += [project / ".dvc/cache/files/md5/02" / f"0c4e.dir{token}", project / "data" / token]
    ours = project / "data/.manifest.json.host.123.tmp"
    for path in (done, ours, *torn, project / token):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(GOOD)
    (project / ".dvc/tmp/rwlock").write_text(rwlock(1)[:-9])
    repo_lock = project / ".dvc/tmp/lock"  # which DVC keeps
    assert len([*repair.repair()]) == 7  # five files, a folder, and the rwlock
    kept = {p for p in project.rglob("*") if p.is_file()}
    assert kept == {project / "dvc.lock", done, ours, repo_lock}
    assert not torn[1].parent.exists()
    assert [*repair.repair()] == []


@pytest.mark.parametrize("torn", ["", GOOD[:-6], GOOD[:20], "\0"])
def test_torn_lock_file_is_the_committed_one_again_or_moved_aside(project: Path, torn: str) -> None:
    lock = project / "dvc.lock"
    lock.write_text(torn)
    (line,) = repair.repair()
    assert line.startswith("dvc.lock: ")
    assert not lock.exists()
    assert (project / repair.ASIDE).read_text() == torn
    lock.write_text(GOOD)
    git("init", "-q")
    commit()
    lock.write_text(torn)
    (line,) = repair.repair()
    assert lock.read_text() == GOOD
    assert [*repair.repair()] == []


def git(*command: str, check: bool = True) -> None:
    user = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    subprocess.run(["git", *user, *command], check=check, capture_output=True)


def commit() -> None:
    git("add", "dvc.lock")
    git("commit", "-qm", "x")


def test_lock_file_with_conflicts_is_moved_aside(project: Path) -> None:
    lock = project / "dvc.lock"
    git("init", "-q", "-b", "one")
    commit()
    git("checkout", "-qb", "two")
    lock.write_text(GOOD.replace("none", "two"))
    commit()
    git("checkout", "-q", "one")
    lock.write_text(GOOD.replace("none", "one"))
    commit()
    git("merge", "two", check=False)
    conflict = lock.read_text()
    assert "<<<<<<<" in conflict
    (line,) = repair.repair()
    assert str(repair.ASIDE) in line
    assert (project / repair.ASIDE).read_text() == conflict


def test_without_git_a_torn_lock_file_is_moved_aside(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(project))
    (project / "dvc.lock").write_text("")
    (line,) = repair.repair()
    assert str(repair.ASIDE) in line
    assert not (project / "dvc.lock").exists()


def test_large_lock_file_is_kept(project: Path) -> None:
    """DVC has no limit, and 1,000 files of a source are 400 KB."""
    large = GOOD.replace("none", "x" * (1 << 20))
    (project / "dvc.lock").write_text(large)
    assert [*repair.repair()] == []
    assert (project / "dvc.lock").read_text() == large


def test_lock_file_that_cannot_be_read_is_not_damaged(project: Path) -> None:
    (project / "dvc.lock").unlink()
    (project / "dvc.lock").mkdir()
    with pytest.raises(UserError, match=r"^dvc\.lock: "):
        [*repair.repair()]
    assert (project / "dvc.lock").is_dir()


def test_dvc_that_holds_its_lock_is_left_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0)
    (project / "dvc.lock").write_text("")
    lock = make_lock(str(project / repair.REPO_LOCK))
    with lock, pytest.raises(UserError, match=str(repair.REPO_LOCK)):
        [*repair.repair()]
    assert (project / "dvc.lock").exists()
    assert len([*repair.repair()]) == 1


def test_a_running_dvc_is_left_alone(project: Path) -> None:
    (project / ".dvc/tmp/rwlock").write_text(rwlock(os.getpid()))
    (project / "dvc.lock").write_text("")
    with pytest.raises(UserError, match=f"rwlock.*{os.getpid()}"):
        [*repair.repair()]
    assert (project / "dvc.lock").read_text() == ""
