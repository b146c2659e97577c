"""Of pipeline.cluster: tasks on a real local Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from pipeline.cluster import run_tasks
from pipeline.errors import UserError
from tests.pipeline.mini import REPO


def square(x: int) -> int:
    return x * x


def users_mistake(x: int) -> int:
    raise UserError("x.parquet: do this")


def fault(x: int) -> int:
    return 1 // x


def fails_twice(folder: str) -> int:
    """As a network disk does: works at the third time."""
    tried = len(list(Path(folder).iterdir()))
    Path(folder, str(tried)).touch()
    if tried < 2:
        raise OSError("try again")
    return tried


def dies_once(folder: str) -> int:
    if not list(Path(folder).iterdir()):
        Path(folder, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


def test_each_task_is_run_once_and_told_by_its_index(ray_cpus: int) -> None:
    assert sorted(run_tasks(square, [(i,) for i in range(20)], 3, "x")) == [
        (i, i * i) for i in range(20)
    ]
    assert list(run_tasks(square, [], 3, "x")) == []


def test_a_users_mistake_comes_back_as_itself(ray_cpus: int) -> None:
    with pytest.raises(UserError, match=r"^x\.parquet: do this$"):
        list(run_tasks(users_mistake, [(1,), (2,)], 2, "x"))


def test_a_fault_comes_back_at_once(ray_cpus: int) -> None:
    started = time.monotonic()
    with pytest.raises(ray.exceptions.RayTaskError, match="ZeroDivisionError"):
        list(run_tasks(fault, [(0,)], 2, "x"))
    assert time.monotonic() - started < 20


def test_a_task_is_tried_again_after_an_os_error_and_a_lost_worker(
    ray_cpus: int, tmp_path: Path
) -> None:
    for name, function, result in (("a", fails_twice, 2), ("b", dies_once, 7)):
        (tmp_path / name).mkdir()
        assert list(run_tasks(function, [(str(tmp_path / name),)], 2, "x")) == [(0, result)]


WAIT = """\
import time
from pipeline import stage
from pipeline.cluster import cluster, run_tasks
from pipeline.machine import Machine
def sleep():
    time.sleep(120)
def main():
    with cluster(Machine(workers=1)) as cpus:
        assert cpus == 1
        print("ready", flush=True)
        list(run_tasks(sleep, [()], 1, "sleep"))
stage.run(main)
"""


def test_sigterm_while_ray_works_is_status_3_and_leaves_no_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    # The pipe closes when the last process of Ray that holds it is gone.
    assert process.communicate(timeout=30)[1] == "stopped; the same command goes on from here\n"
    assert process.returncode == 3
