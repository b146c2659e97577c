"""Tasks on Ray: bounded in flight, the largest first, run again where they were lost.

Two things end a task early, and are told apart. It is **lost** with its worker or its node (a spot
instance that goes, a cut link, a worker killed): it is run again at once, elsewhere. Or it
**fails** for a reason of its own: it is tried `TRIES` times, after what else there is to do, and
named in the end, when all others are done. A mistake of the user's ends the run at once.

Ray itself runs nothing again here: it would count a lost node as a failure, and could not run a
task again whose text was freed when it was read.
"""

import re
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.cluster.probe import guarded
from pipeline.runtime.errors import StageFailed, UserError
from pipeline.runtime.progress import Progress

TRIES = 3
# A task that takes its worker down with it each time looks like one that is lost each time.
LOSSES = 10

_LOOK_SECONDS = 5.0
# A head that is started again, with its state kept, has so long for it. Ray kills the driver itself
# after 60 s without a head, by a line that nobody understands.
_HEAD_SECONDS = 20.0
# A result on its way that does not come for so long is lost.
_RESULT_SECONDS = 120.0

_COLOURS = re.compile(r"\x1b\[\d*m")

Collect = Callable[[int, Iterator[Any]], Any]


class TaskError(Exception):
    """What ``collect`` raises where a task's results are not right: it is tried again."""


class TasksFailed(StageFailed):
    """Tasks that failed for reasons of their own, all others being done."""


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
    labels: Sequence[str] = (),
    sizes: Sequence[int] = (),
    memory: int = 0,
    collect: Collect | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*task)`` for each task on the cluster that is joined.

    Args:
        in_flight: how many at a time; None for twice what the cluster can run, as it grows and
            shrinks: a queue that makes an autoscaler add nodes.
        name: of the work, with which the tasks' names begin on Ray's dashboard.
        num_cpus: of the cluster's CPUs that a task takes; a part of one where it mostly waits.
        tick: called every second or so while tasks run, to look after their progress.
        labels: of each task its own name; without, its number.
        sizes: of each task; the largest are started first, so that the end of the run is not one
            worker on one task.
        memory: bytes that a task takes; 0 asks for none.
        collect: takes a task's index and what it yields, and returns its result; for ``function``
            that is a generator, which then is held back where nobody takes what it yields.
        progress: shows how the tasks stand.

    Yields:
        The index of a finished task, and what it returned.

    Raises:
        UserError: a task's own.
        TasksFailed: at the end, naming each task that failed `TRIES` times.
        ClusterLost: nothing can be done any more.
    """
    if tasks:
        run = _Run(function, tasks, name, num_cpus, memory, labels, sizes, collect, progress)
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
        labels: Sequence[str],
        sizes: Sequence[int],
        collect: Collect | None,
        progress: Progress | None,
    ) -> None:
        import ray

        self.tasks, self.name, self.num_cpus = tasks, name, num_cpus
        self.labels, self.collect, self.progress = labels, collect, progress
        # Ray fills a node before it turns to the next, which would not use the others' networks.
        options: dict[str, Any] = {"max_retries": 0, "scheduling_strategy": "SPREAD"}
        if memory:
            options["memory"] = memory
        if collect is not None:
            options |= {"num_returns": "streaming", "_generator_backpressure_num_objects": 2}
        self.remote: Any = ray.remote(num_cpus=num_cpus, **options)(guarded(function))
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
                if len(waiting) > 1 and ready:  # and whatever else is there by now
                    most = len(waiting)
                    ready, _ = ray.wait(waiting, num_returns=most, timeout=0, fetch_local=False)
                self._look()
                if tick is not None:
                    tick()
                for reference in ready:
                    yield from self._end(reference)
        finally:
            for reference in self.pending:
                ray.cancel(reference, force=True)
        self._raise_failed()

    def _start(self, index: int) -> None:
        task = self.remote.options(name=f"{self.name} {self._label(index)}")
        self.pending[task.remote(*self.tasks[index])] = index

    def _label(self, index: int) -> str:
        return self.labels[index] if self.labels else str(index)

    def _end(self, reference: Any) -> Iterator[tuple[int, Any]]:
        """Yield what a task returned, or see to it that it is run again."""
        import ray

        index = self.pending[reference]
        try:
            if self.collect is None:
                self._wait(reference, fetch_local=True)
                result = ray.get(reference, timeout=_RESULT_SECONDS)
            else:
                result = self.collect(index, self._values(reference))
        except (ray.exceptions.RayError, TaskError) as error:
            del self.pending[reference]
            if self.collect is not None:
                ray.cancel(reference, force=True)
            self._again(index, error)
            self._count()
        else:
            del self.pending[reference]
            self.done += 1
            self._count()
            yield index, result

    def _values(self, generator: Any) -> Iterator[Any]:
        """What a streaming task yields."""
        import ray

        self._look()
        while True:
            self._wait(generator, fetch_local=False)
            try:
                reference = next(generator)
            except StopIteration:
                return
            self._wait(reference, fetch_local=True)
            yield ray.get(reference, timeout=_RESULT_SECONDS)

    def _wait(self, reference: Any, fetch_local: bool) -> None:
        """Wait for a result on its way, and look at the cluster meanwhile: it may never come."""
        import ray

        begin = time.monotonic()
        while not ray.wait([reference], timeout=1, fetch_local=fetch_local)[0]:
            if time.monotonic() - begin > _RESULT_SECONDS:
                raise ray.exceptions.GetTimeoutError(f"nothing came for {_RESULT_SECONDS:.0f} s")
            self._look()

    def _again(self, index: int, error: BaseException) -> None:
        cause, label = _cause(error), self._label(index)
        if isinstance(cause, UserError):
            raise cause from None
        count, most = (self.losses, LOSSES) if _is_loss(cause) else (self.tries, TRIES)
        count[index] = count.get(index, 0) + 1
        if count[index] == most:
            self.failed[index] = error
            self._say(f"{label} failed ({_reason(cause)}); the others go on")
            return
        self.retried += 1
        if _is_loss(cause):
            self.queue.appendleft(index)
            self._say(f"{label} was lost ({type(cause).__name__}); it is done again")
        else:
            self.queue.append(index)
            self._say(f"{label} failed ({_reason(cause)}); tried again later")

    def _raise_failed(self) -> None:
        if not self.failed:
            return
        failed = sorted(self.failed.items())
        first = _COLOURS.sub("", str(failed[0][1])).strip()
        lines = [
            f"  {self._label(i)}, "
            + (f"lost {LOSSES}" if self.losses.get(i) == LOSSES else f"tried {TRIES}")
            + f" times: {_reason(_cause(error))}"
            for i, error in failed
        ]
        raise TasksFailed(
            f"{self.name}: {len(lines)} of {len(self.tasks)} tasks failed; the others are done and "
            "kept, and the same command does only these:\n"
            + "\n".join(lines)
            + f"\nThe first of them said:\n{first}"
        )

    def _look(self) -> None:
        """Every few seconds: is the cluster there? And show how the tasks stand."""
        for address in self.cluster.look():
            self._say(f"node {address} is lost; what ran there is done again elsewhere")
        if self.progress is not None:
            self._count()
            self.progress.look()

    def _count(self) -> None:
        if self.progress is None:
            return
        nodes, failed = self.cluster.nodes, len(self.failed)
        running = min(len(self.pending), int(self.cluster.cpus / self.num_cpus))
        waiting = len(self.tasks) - self.done - running - failed
        self.progress.tasks = (
            f"{nodes} node{'s' if nodes != 1 else ''}: {running} running, {waiting} waiting, "
            f"{self.done} done, {self.retried} retried" + (f", {failed} failed" if failed else "")
        )

    def _say(self, line: str) -> None:
        if self.progress is not None:
            self.progress.say(line)
        else:
            print(f"{self.name}: {line}", file=sys.stdout, flush=True)


class _Cluster:
    """The cluster as it is, looked at every few seconds."""

    def __init__(self) -> None:
        import ray

        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        self._head, self._home = (host.strip("[]"), int(port)), context.get_node_id()
        self._seen = self._looked = time.monotonic()
        self._alive = self._ask()

    @property
    def nodes(self) -> int:
        """Nodes that can run tasks."""
        return sum(cpus > 0 for _, cpus in self._alive.values())

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(cpus for _, cpus in self._alive.values())

    def look(self) -> list[str]:
        """The addresses of nodes that were lost since the last look.

        Raises:
            ClusterLost: there is no head any more, or this machine is no node of it.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return []
        self._looked = now
        try:
            socket.create_connection(self._head, timeout=2).close()
        except OSError as error:
            if now - self._seen < _HEAD_SECONDS:
                return []
            raise ClusterLost(
                f"the Ray cluster is gone: its head {self._head[0]}:{self._head[1]} has not "
                f"answered for {now - self._seen:.0f} s ({error}); what is finished is kept, and "
                "the same command goes on from here, on any cluster or none"
            ) from None
        self._seen = now
        before, self._alive = self._alive, self._ask()
        if self._home not in self._alive:
            raise ClusterLost(
                "the Ray cluster has given this machine up: its node is dead (`ray start` joins it "
                "again); what is finished is kept, and the same command goes on from here"
            )
        return [address for key, (address, _) in before.items() if key not in self._alive]

    def _ask(self) -> dict[str, tuple[str, float]]:
        """Node id -> address and CPUs, of the nodes that are alive."""
        import ray

        return {
            node["NodeID"]: (node["NodeManagerAddress"], node["Resources"].get("CPU", 0.0))
            for node in ray.nodes()
            if node["Alive"]
        }


def _cause(error: BaseException) -> BaseException:
    """What lies at the bottom: the task's own exception, also that of a task that it started."""
    import ray

    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def _is_loss(cause: BaseException) -> bool:
    """Whether a task went with its worker, its node or its objects, not by its own doing."""
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
