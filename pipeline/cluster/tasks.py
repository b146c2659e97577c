"""Run tasks on Ray: a bounded number at a time, the largest first, with retries.

A task can end early in two ways. It is **lost** with its worker or node (a spot instance that is
reclaimed, a cut link, a killed worker): it is run again at once, elsewhere. Or it **fails** by an
exception: it is tried up to `MAX_TRIES` times, after all other waiting tasks, and reported once all
others are done. A `UserError` ends the run at once.

Ray's own retries are off: Ray counts a lost node as a failure, and cannot run a task again whose
input was freed after it was read.
"""

import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.cluster.probe import with_node_check
from pipeline.runtime.errors import StageFailed, UserError
from pipeline.runtime.progress import Progress

MAX_TRIES = 3
# A task that kills its worker each time looks like one that is lost each time.
MAX_LOSSES = 10

_POLL_SECONDS = 5.0
# Time for a head to restart with its state. After 60 s without one Ray kills the driver, with an
# obscure message.
_HEAD_TIMEOUT = 20.0
# A result that takes longer to arrive is lost.
_RESULT_TIMEOUT = 120.0

_COLOURS = re.compile(r"\x1b\[\d*m")

Collect = Callable[[int, Iterator[Any]], Any]


class TaskError(Exception):
    """``collect`` got wrong results from a task, which is tried again."""


class TasksFailed(StageFailed):
    """Some tasks failed; all others are done."""


class ClusterLost(StageFailed):
    """The cluster is gone, or this machine is cut off from it."""


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    in_flight: int | None,
    name: str,
    num_cpus: float = 1,
    tick: Callable[[], None] | None = None,
    *,
    shared: Sequence[Any] = (),
    labels: Sequence[str] = (),
    sizes: Sequence[int] = (),
    memory: int = 0,
    collect: Collect | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*task, *shared)`` per task on the cluster that `join.cluster` initialised.

    Args:
        in_flight: Tasks submitted at a time; None: twice as many as the cluster can run as it grows
            and shrinks, so that an autoscaler sees a queue and adds nodes.
        name: Name of the work; the tasks' names on Ray's dashboard begin with it.
        num_cpus: CPUs per task, less than one if it mostly waits.
        tick: Called about every second while tasks run.
        shared: Large arguments of all tasks, which are stored on the cluster once.
        labels: Name of each task; empty: its index.
        sizes: Size of each task: the largest start first, so that the run does not end with one
            worker on one long task.
        memory: Bytes per task to reserve; 0: none.
        collect: Called with a task's index and the iterator of what ``function``, a generator,
            yields; returns the task's result. A generator waits until its values are taken.
        progress: Shows how many tasks run, wait and are done.

    Yields:
        The index of a finished task, and its result.

    Raises:
        UserError: Raised by a task.
        TasksFailed: After all others are done; names each task that failed `MAX_TRIES` times.
        ClusterLost: No task can run any more.
    """
    if tasks:
        run = _Run(
            function, tasks, name, num_cpus, memory, shared, labels, sizes, collect, progress
        )
        yield from run.results(in_flight, tick)


class _Run:
    """One call of `run_tasks`."""

    def __init__(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        name: str,
        num_cpus: float,
        memory: int,
        shared: Sequence[Any],
        labels: Sequence[str],
        sizes: Sequence[int],
        collect: Collect | None,
        progress: Progress | None,
    ) -> None:
        import ray

        self.tasks, self.name, self.num_cpus = tasks, name, num_cpus
        self.labels, self.collect, self.progress = labels, collect, progress
        # By default Ray fills one node before the next, and would leave most networks idle.
        options: dict[str, Any] = {"max_retries": 0, "scheduling_strategy": "SPREAD"}
        if memory:
            options["memory"] = memory
        if collect is not None:
            options |= {"num_returns": "streaming", "_generator_backpressure_num_objects": 2}
        self.remote: Any = ray.remote(num_cpus=num_cpus, **options)(with_node_check(function))
        self.shared = [ray.put(value) for value in shared]
        order = range(len(tasks))
        self.queue = deque(sorted(order, key=lambda i: -sizes[i]) if sizes else order)
        self.pending: dict[Any, int] = {}
        self.tries: dict[int, int] = {}
        self.losses: dict[int, int] = {}
        self.failed: dict[int, BaseException] = {}
        self.done = self.retried = 0
        self.cluster = _Cluster()

    def results(
        self, in_flight: int | None, tick: Callable[[], None] | None
    ) -> Iterator[tuple[int, Any]]:
        import ray

        try:
            while self.queue or self.pending:
                slots = max(1, int(self.cluster.cpus / self.num_cpus))
                while self.queue and len(self.pending) < (in_flight or 2 * slots):
                    self._start(self.queue.popleft())
                waiting = list(self.pending)
                ready, _ = ray.wait(waiting, num_returns=1, timeout=1, fetch_local=False)
                if len(waiting) > 1 and ready:  # take all others that are ready by now
                    count = len(waiting)
                    ready, _ = ray.wait(waiting, num_returns=count, timeout=0, fetch_local=False)
                self._poll()
                if tick is not None:
                    tick()
                for reference in ready:
                    yield from self._finish(reference)
        finally:
            for reference in self.pending:
                ray.cancel(reference, force=True)
        self._raise_failed()

    def _start(self, index: int) -> None:
        task = self.remote.options(name=f"{self.name} {self._label(index)}")
        self.pending[task.remote(*self.tasks[index], *self.shared)] = index

    def _label(self, index: int) -> str:
        return self.labels[index] if self.labels else str(index)

    def _finish(self, reference: Any) -> Iterator[tuple[int, Any]]:
        """Yield a task's index and result, or queue it to run again."""
        import ray

        index = self.pending[reference]
        try:
            if self.collect is None:
                self._wait(reference, fetch_local=True)
                result = ray.get(reference, timeout=_RESULT_TIMEOUT)
            else:
                result = self.collect(index, self._values(reference))
        except (ray.exceptions.RayError, TaskError) as error:
            del self.pending[reference]
            if self.collect is not None:
                ray.cancel(reference, force=True)
            self._retry(index, error)
            self._update_counts()
        else:
            del self.pending[reference]
            self.done += 1
            self._update_counts()
            yield index, result

    def _values(self, generator: Any) -> Iterator[Any]:
        """Yield the values of a streaming task."""
        import ray

        self._poll()
        while True:
            self._wait(generator, fetch_local=False)
            try:
                reference = next(generator)
            except StopIteration:
                return
            self._wait(reference, fetch_local=True)
            yield ray.get(reference, timeout=_RESULT_TIMEOUT)

    def _wait(self, reference: Any, fetch_local: bool) -> None:
        """Wait until a result arrives, and poll the cluster meanwhile: it may never arrive."""
        import ray

        begin = time.monotonic()
        while not ray.wait([reference], timeout=1, fetch_local=fetch_local)[0]:
            if time.monotonic() - begin > _RESULT_TIMEOUT:
                raise ray.exceptions.GetTimeoutError(f"no result for {_RESULT_TIMEOUT:.0f} s")
            self._poll()

    def _retry(self, index: int, error: BaseException) -> None:
        cause, label = _cause(error), self._label(index)
        if isinstance(cause, UserError):
            raise cause from None
        count, limit = (self.losses, MAX_LOSSES) if _is_loss(cause) else (self.tries, MAX_TRIES)
        count[index] = count.get(index, 0) + 1
        if count[index] == limit:
            self.failed[index] = error
            self._log(f"{label} failed ({_reason(cause)}); the other tasks continue")
            return
        self.retried += 1
        if _is_loss(cause):
            self.queue.appendleft(index)
            self._log(f"{label} was lost ({type(cause).__name__}); running it again")
        else:
            self.queue.append(index)
            self._log(f"{label} failed ({_reason(cause)}); it will be retried later")

    def _raise_failed(self) -> None:
        if not self.failed:
            return
        failed = sorted(self.failed.items())
        first = _COLOURS.sub("", str(failed[0][1])).strip()
        lines = [
            f"  {self._label(i)}, "
            + (f"lost {MAX_LOSSES}" if self.losses.get(i) == MAX_LOSSES else f"tried {MAX_TRIES}")
            + f" times: {_reason(_cause(error))}"
            for i, error in failed
        ]
        raise TasksFailed(
            f"{self.name}: {len(lines)} of {len(self.tasks)} tasks failed; the others are finished "
            "and kept, run the same command again to retry only these:\n"
            + "\n".join(lines)
            + f"\nThe first error:\n{first}"
        )

    def _poll(self) -> None:
        """Every few seconds, check the cluster and show the task counts."""
        for address in self.cluster.poll():
            self._log(f"node {address} is lost; its tasks run again elsewhere")
        if self.progress is not None:
            self._update_counts()
            self.progress.refresh()

    def _update_counts(self) -> None:
        if self.progress is None:
            return
        nodes, failed = self.cluster.nodes, len(self.failed)
        running = min(len(self.pending), int(self.cluster.cpus / self.num_cpus))
        waiting = len(self.tasks) - self.done - running - failed
        self.progress.task_counts = (
            f"{nodes} node{'s' if nodes != 1 else ''}: {running} running, {waiting} waiting, "
            f"{self.done} done, {self.retried} retried" + (f", {failed} failed" if failed else "")
        )

    def _log(self, line: str) -> None:
        if self.progress is not None:
            self.progress.log(line)
        else:
            print(f"{self.name}: {line}", flush=True)


class _Cluster:
    """The live nodes of the cluster, polled every few seconds."""

    def __init__(self) -> None:
        import ray

        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        self._head, self._own_node = (host.strip("[]"), int(port)), context.get_node_id()
        self._head_answered = self._polled = time.monotonic()
        self._live = self._live_nodes()

    @property
    def nodes(self) -> int:
        """Nodes that can run tasks."""
        return sum(cpus > 0 for _, cpus in self._live.values())

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(cpus for _, cpus in self._live.values())

    def poll(self) -> list[str]:
        """Return the addresses of the nodes lost since the last poll.

        Raises:
            ClusterLost: The head is gone, or this machine is not one of its nodes any more.
        """
        now = time.monotonic()
        if now - self._polled < _POLL_SECONDS:
            return []
        self._polled = now
        try:
            socket.create_connection(self._head, timeout=2).close()
        except OSError as error:
            if now - self._head_answered < _HEAD_TIMEOUT:
                return []
            raise ClusterLost(
                f"the Ray cluster is gone: its head {self._head[0]}:{self._head[1]} has not "
                f"answered for {now - self._head_answered:.0f} s ({error}); finished work is kept, "
                "run the same command to resume, on any cluster or none"
            ) from None
        self._head_answered = now
        before, self._live = self._live, self._live_nodes()
        if self._own_node not in self._live:
            raise ClusterLost(
                "the Ray cluster has declared this machine's node dead; join it again with "
                "`ray start`; finished work is kept, run the same command to resume"
            )
        return [address for key, (address, _) in before.items() if key not in self._live]

    def _live_nodes(self) -> dict[str, tuple[str, float]]:
        """Return node id -> (address, CPUs) of the live nodes."""
        import ray

        return {
            node["NodeID"]: (node["NodeManagerAddress"], node["Resources"].get("CPU", 0.0))
            for node in ray.nodes()
            if node["Alive"]
        }


def _cause(error: BaseException) -> BaseException:
    """Return the exception that the task raised, unwrapped from Ray's errors."""
    import ray

    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def _is_loss(cause: BaseException) -> bool:
    """Return whether a task was lost with its worker, node or objects, not by an exception."""
    from ray import exceptions

    return isinstance(
        cause,
        exceptions.WorkerCrashedError
        | exceptions.NodeDiedError
        | exceptions.ObjectLostError
        | exceptions.GetTimeoutError
        | exceptions.LocalRayletDiedError
        | exceptions.TaskUnschedulableError,
    )


def _reason(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:200]}" if lines else type(cause).__name__
