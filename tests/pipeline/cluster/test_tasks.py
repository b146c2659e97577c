"""Tests for pipeline.cluster.tasks on a real local Ray."""

from __future__ import annotations

import os
import re
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


def raises_user_error(x: int) -> int:
    raise UserError("x.parquet: do this")


def tries(folder: Path, name: int) -> int:
    return len(list(folder.glob(f"{name}-*")))


def count_try(folder: str, name: int) -> int:
    """Return the number of earlier tries; write one file per try."""
    earlier = tries(Path(folder), name)
    Path(folder, f"{name}-{earlier}").touch()
    return earlier


def fails(folder: str, name: int, times: int) -> int:
    if count_try(folder, name) < times:
        raise OSError(f"try {name} again")
    return name


def dies(folder: str, name: int, times: int) -> int:
    if count_try(folder, name) < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def dies_and_fails(folder: str, name: int) -> int:
    if count_try(folder, name) % 2:
        raise OSError("again")
    os.kill(os.getpid(), signal.SIGKILL)
    return name


def stream(folder: str, name: int, times: int) -> Iterator[int]:
    earlier = count_try(folder, name)
    yield from range(name)
    if earlier < times:
        os.kill(os.getpid(), signal.SIGKILL)


def pausing() -> Iterator[int]:
    yield 0
    time.sleep(4)
    yield 1


def test_each_task_runs_once_and_its_result_comes_with_its_index(ray_cpus: int) -> None:
    tasks = [(i,) for i in range(20)]
    for in_flight in (3, None):
        assert sorted(run_tasks(square, tasks, in_flight, "x")) == [(i, i * i) for i in range(20)]
    assert list(run_tasks(square, [], 3, "x")) == []


class Shared:
    """Counts in this process how often it is sent."""

    sent = 0

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        Shared.sent += 1
        return Shared, ()


def ignores_shared(x: int, shared: Shared) -> int:
    return x


def test_shared_arguments_are_sent_once(ray_cpus: int) -> None:
    done = run_tasks(ignores_shared, [(i,) for i in range(8)], 3, "x", shared=[Shared()])
    assert sorted(done) == [(i, i) for i in range(8)]
    assert Shared.sent == 1


def test_largest_tasks_start_first(ray_cpus: int) -> None:
    sizes = [3, 9, 1, 7]
    done = run_tasks(square, [(i,) for i in range(4)], 1, "x", sizes=sizes)
    assert [index for index, _ in done] == [1, 3, 0, 2]


def test_user_error_of_a_task_ends_the_run(ray_cpus: int) -> None:
    with pytest.raises(UserError, match=r"^x\.parquet: do this$"):
        list(run_tasks(raises_user_error, [(1,), (2,)], 2, "x"))


def test_failing_task_is_retried_last_counted_and_named_at_the_end(
    ray_cpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = [0, 9, 2, 9, 0]
    tasks = [(str(tmp_path), i, n) for i, n in enumerate(times)]
    done: list[int] = []
    labels = [f"rows {i}" for i in range(5)]
    with Progress("x", 5, "tasks", every=0) as progress:
        run = run_tasks(fails, tasks, 2, "x", labels=labels, progress=progress)
        with pytest.raises(TasksFailed) as caught:
            done.extend(index for index, _ in run)
    assert sorted(done) == [0, 2, 4]
    assert done[-1] == 2  # a failed task is retried after the untried ones
    assert [tries(tmp_path, i) for i in range(5)] == [1, 3, 3, 3, 1]
    message = str(caught.value)
    assert "2 of 5" in message
    assert re.findall(r"rows (\d), .* 3 times: OSError: try \1 again", message) == ["1", "3"]
    assert "in fails" in message, "the traceback of the first"
    assert "\x1b" not in message
    output = capsys.readouterr().out
    assert "x: rows 2 failed (OSError: try 2 again)" in output
    assert "1 node: 1 running, 4 waiting, 0 done, 0 retried" in output
    assert progress.task_counts == "1 node: 0 running, 0 waiting, 3 done, 6 retried, 2 failed"


def test_task_lost_with_its_worker_is_not_a_failure(ray_cpus: int, tmp_path: Path) -> None:
    tasks = [(str(tmp_path), i, n) for i, n in enumerate([0, 3])]
    assert sorted(run_tasks(dies, tasks, 2, "x")) == [(0, 0), (1, 1)]
    assert tries(tmp_path, 1) == 4


def test_losses_are_counted_apart_from_failures_and_limited(
    ray_cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.tasks.MAX_LOSSES", 4)  # each starts a new worker
    with pytest.raises(TasksFailed, match=r"0, .* 3 times: OSError: again"):
        list(run_tasks(dies_and_fails, [(str(tmp_path), 0)], 1, "x"))
    assert tries(tmp_path, 0) == 6
    (tmp_path / "b").mkdir()
    with pytest.raises(TasksFailed, match=r"0, .* 4 times: WorkerCrashedError"):
        list(run_tasks(dies, [(str(tmp_path / "b"), 0, 99)], 1, "x"))
    assert tries(tmp_path / "b", 0) == 4


def test_values_of_a_lost_generator_are_collected_again_from_the_first(
    ray_cpus: int, tmp_path: Path
) -> None:
    def collect(index: int, values: Iterator[int]) -> list[int]:
        return list(values)

    tasks = [(str(tmp_path), i, n) for i, n in enumerate([0, 1, 0, 1])]
    results = dict(run_tasks(stream, tasks, 2, "x", collect=collect))
    assert results == {i: list(range(i)) for i in range(4)}
    assert tries(tmp_path, 3) == 2

    def refuse(index: int, values: Iterator[int]) -> None:
        raise TaskError("wrong")

    with pytest.raises(TasksFailed, match="TaskError: wrong"):
        list(run_tasks(stream, [(str(tmp_path), 50, 0)], 2, "x", collect=refuse))
    assert tries(tmp_path, 50) == 3


def test_cluster_is_polled_while_a_stream_pauses(
    ray_cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a lost head would be noticed only when the stream times out."""
    polls = 0
    poll = _Cluster.poll

    def counted(self: _Cluster) -> list[str]:
        nonlocal polls
        polls += 1
        return poll(self)

    monkeypatch.setattr(_Cluster, "poll", counted)

    def collect(index: int, values: Iterator[int]) -> list[int]:
        return [polls for _ in values]

    ((_, (first, second)),) = run_tasks(pausing, [()], 1, "x", collect=collect)
    assert second - first >= 2
