"""Of pipeline.tasks: tasks on a real local Ray, that are lost, that fail, that go well."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster.tasks import TaskError, TasksFailed, _Cluster, run_tasks
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import Progress


def square(x: int) -> int:
    return x * x


def users_mistake(x: int) -> int:
    raise UserError("x.parquet: do this")


def mark(folder: str, name: int) -> int:
    """How often this was tried before; one file a try."""
    for tried in range(100):
        path = Path(folder, f"{name}-{tried}")
        if not path.exists():
            path.touch()
            return tried
    raise AssertionError


def fails(folder: str, name: int, times: int) -> int:
    """As a network disk does, or a bug."""
    if mark(folder, name) < times:
        raise OSError(f"try {name} again")
    return name


def dies(folder: str, name: int, times: int) -> int:
    if mark(folder, name) < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def dies_and_fails(folder: str, name: int) -> int:
    if mark(folder, name) % 2:
        raise OSError("again")
    os.kill(os.getpid(), signal.SIGKILL)
    return name


def stream(folder: str, name: int, times: int) -> Iterator[int]:
    tried = mark(folder, name)
    yield from range(name)
    if tried < times:
        os.kill(os.getpid(), signal.SIGKILL)


def pausing() -> Iterator[int]:
    yield 0
    time.sleep(4)
    yield 1


def tries(folder: Path, name: int) -> int:
    return len(list(folder.glob(f"{name}-*")))


def test_each_task_is_run_once_and_told_by_its_index(ray_cpus: int) -> None:
    squares = [(i, i * i) for i in range(20)]
    assert sorted(run_tasks(square, [(i,) for i in range(20)], 3, "x")) == squares
    assert sorted(run_tasks(square, [(i,) for i in range(20)], None, "x")) == squares
    assert list(run_tasks(square, [], 3, "x")) == []


def test_the_largest_are_started_first(ray_cpus: int) -> None:
    sizes = [3, 9, 1, 7]
    done = run_tasks(square, [(i,) for i in range(4)], 1, "x", sizes=sizes)
    assert [index for index, _ in done] == [1, 3, 0, 2]


def test_a_users_mistake_comes_back_as_itself(ray_cpus: int) -> None:
    with pytest.raises(UserError, match=r"^x\.parquet: do this$"):
        list(run_tasks(users_mistake, [(1,), (2,)], 2, "x"))


def test_what_fails_is_tried_again_and_named_when_all_others_are_done(
    ray_cpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = [0, 9, 2, 9, 0]
    tasks = [(str(tmp_path), i, n) for i, n in enumerate(times)]
    done: list[int] = []
    labels = [f"rows {i}" for i in range(5)]
    with Progress("x", 5, "tasks") as progress:
        run = run_tasks(fails, tasks, 2, "x", labels=labels, progress=progress)
        with pytest.raises(TasksFailed) as caught:
            done.extend(index for index, _ in run)
    assert sorted(done) == [0, 2, 4]
    assert done[-1] == 2  # what failed comes after what has not been tried
    assert [tries(tmp_path, i) for i in range(5)] == [1, 3, 3, 3, 1]
    first, *named = str(caught.value).splitlines()
    assert first.startswith("x: 2 of 5 tasks failed; the others are done and kept")
    assert named[:2] == [
        "  rows 1, tried 3 times: OSError: try 1 again",
        "  rows 3, tried 3 times: OSError: try 3 again",
    ]
    assert "line" in str(caught.value), "the traceback of the first"
    assert "\x1b" not in str(caught.value)
    said = capsys.readouterr().out
    assert "x: rows 2 failed (OSError: try 2 again); tried again later" in said


def test_what_is_lost_with_its_worker_is_no_failure(ray_cpus: int, tmp_path: Path) -> None:
    tasks = [(str(tmp_path), i, n) for i, n in enumerate([0, 3])]
    assert sorted(run_tasks(dies, tasks, 2, "x")) == [(0, 0), (1, 1)]
    assert tries(tmp_path, 1) == 4


def test_losses_do_not_use_up_the_tries_and_have_an_end(
    ray_cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.tasks.LOSSES", 4)  # each costs Ray a new worker
    with pytest.raises(TasksFailed, match="0, tried 3 times: OSError: again"):
        list(run_tasks(dies_and_fails, [(str(tmp_path), 0)], 1, "x"))
    assert tries(tmp_path, 0) == 6
    (tmp_path / "b").mkdir()
    with pytest.raises(TasksFailed, match="0, lost 4 times: WorkerCrashedError"):
        list(run_tasks(dies, [(str(tmp_path / "b"), 0, 99)], 1, "x"))
    assert tries(tmp_path / "b", 0) == 4


def test_what_a_generator_yields_is_collected_from_its_beginning_when_it_was_lost(
    ray_cpus: int, tmp_path: Path
) -> None:
    def collect(index: int, values: Iterator[int]) -> list[int]:
        return list(values)

    tasks = [(str(tmp_path), i, n) for i, n in enumerate([0, 1, 0, 1])]
    results = dict(run_tasks(stream, tasks, 2, "x", collect=collect))
    assert results == {i: list(range(i)) for i in range(4)}
    assert tries(tmp_path, 3) == 2

    def refuse(index: int, values: Iterator[int]) -> None:
        raise TaskError("not right")

    with pytest.raises(TasksFailed, match="TaskError: not right"):
        list(run_tasks(stream, [(str(tmp_path), 50, 0)], 2, "x", collect=refuse))
    assert tries(tmp_path, 50) == 3


def test_the_cluster_is_looked_at_while_a_stream_pauses(
    ray_cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a head that is lost meanwhile would not be missed before the stream is given up."""
    looks = 0
    look = _Cluster.look

    def counted(self: _Cluster) -> list[str]:
        nonlocal looks
        looks += 1
        return look(self)

    monkeypatch.setattr(_Cluster, "look", counted)

    def collect(index: int, values: Iterator[int]) -> list[int]:
        return [looks for _ in values]

    ((_, (first, second)),) = run_tasks(pausing, [()], 1, "x", collect=collect)
    assert second - first >= 2


def test_progress_says_how_the_tasks_stand(
    ray_cpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("x", 5, "tasks", every=0) as progress:
        tasks = [(str(tmp_path), i, n) for i, n in enumerate([0, 1, 0, 9, 0])]
        run = run_tasks(fails, tasks, 2, "x", progress=progress)
        with pytest.raises(TasksFailed):
            any(progress.advance(1) for _ in run)  # type: ignore[func-returns-value]
    said = capsys.readouterr().out
    assert "1 node: 1 running, 4 waiting, 0 done, 0 retried" in said
    assert progress.tasks == "1 node: 0 running, 0 waiting, 4 done, 3 retried, 1 failed"
