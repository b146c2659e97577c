"""The processes that train together: who this one is, and what they agree on."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline import stage
from pipeline.errors import StageFailed, UserError
from pipeline.machine import Machine, usable_cores
from train.gpus import hindrance

T = TypeVar("T")

ROLL_CALL = 5.0  # seconds in which those who waited in vain find each other


@dataclass(frozen=True)
class World:
    """The group of processes, seen from one of them.

    Attributes:
        rank: Of this process, 0 ... size - 1.
        size: Processes, over all nodes.
        device: Where this process computes.
        control: A gloo group for what is decided on the CPU: it never waits for a GPU.
        store: What the ranks know of each other when no collective works any more.
        patience: Seconds that a rank waits for another.
        restarted: Whether torchrun had started these processes before, and starts them again.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    store: Store
    patience: float
    restarted: bool = False

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place; on CUDA it is queued, not waited for."""
        dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on each."""
        value = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on each rank (pickled between our own processes; never from a file)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        dist.barrier(group=self.control)

    def wait(self, event: torch.cuda.Event) -> None:
        """Waits until the GPU has come to an event, which may lie behind a collective.

        Raises:
            DistError: It has not in ``patience`` seconds. NCCL waits twice as long, and then ends
                the process without saying for whom it has waited.
        """
        end = time.monotonic() + self.patience
        while not event.query():
            if time.monotonic() > end:
                raise dist.DistError(f"the GPU's work was not done in {self.patience:g} s")
            time.sleep(2e-4)

    @contextmanager
    def roll_call(self) -> Iterator[None]:
        """Names who is missing when a collective fails, and ends this process.

        All whose collective failed say so in the store; a rank that does not is dead, or hangs.

        Raises:
            SystemExit: Ranks are missing. The first of those present names them on stderr.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_of_a_collective(error):
                raise
            absent = self._absent()
            if not absent:
                raise
            if self.rank == min(set(range(self.size)) - absent):
                names = [self.store.get(f"rank-{other}").decode() for other in sorted(absent)]
                print(
                    f"error: {', '.join(names)}: died, or gave no answer in {self.patience:g} s; "
                    "the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
            sys.exit(stage.FAULT)

    def _absent(self) -> set[int]:
        """The ranks that do not answer a roll call; none where the store is gone as well."""
        absent = set(range(self.size))
        end = time.monotonic() + ROLL_CALL
        try:
            self.store.set(f"present-{self.rank}", "")
            while absent and time.monotonic() < end:
                time.sleep(0.1)
                absent = {other for other in absent if not self.store.check([f"present-{other}"])}
        except RuntimeError:
            return set()
        return absent


def device_type(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """What a machine computes on.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    why = hindrance()
    if wanted == "cuda":
        raise UserError(
            f"device (machine.yaml, GPT2_DEVICE): cuda, but {why or 'PyTorch sees none; use auto'}"
        )
    if why:
        print(f"warning: computing on the CPU: {why}", file=sys.stderr, flush=True)
    return "cpu"


def default_processes(kind: Literal["cpu", "cuda"], cores: int | None = None) -> int:
    """Processes on this node where nobody says: each GPU one, or two on a CPU.

    Args:
        kind: What is computed on.
        cores: Of a CPU, that may be used; None: all.
    """
    return torch.cuda.device_count() if kind == "cuda" else min(2, cores or usable_cores())


def processes_here(machine: Machine, kind: Literal["cpu", "cuda"]) -> int:
    """Processes on this node: as the machine's settings say, else as many as serve it.

    Raises:
        UserError: More than there are GPUs.
    """
    default = default_processes(kind, machine.cores)
    processes = machine.processes or default
    if kind == "cuda" and processes > default:
        raise UserError(
            f"processes (machine.yaml, GPT2_PROCESSES): {processes}, but there are {default} GPUs; "
            "use as many, or device: cpu"
        )
    return processes


@contextmanager
def process_group(
    device: Literal["auto", "cpu", "cuda"], patience: float = 900.0
) -> Iterator[World]:
    """Joins the group that torchrun describes in the environment; alone without torchrun.

    NCCL between GPUs, gloo between CPUs. On the CPU the node's cores are shared out as threads,
    as results are the same bits only for the same number of threads.

    Args:
        device: Where to compute.
        patience: Seconds that a rank waits for another.

    Raises:
        SystemExit: A rank died, or gave no answer in that time (see ``World.roll_call``).
    """
    kind = device_type(device)
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"processes (machine.yaml): {local_size}, but this node has "
                f"{torch.cuda.device_count()} GPUs; use as many, or device: cpu"
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)  # before the group: NCCL binds to the current device
    else:
        where = torch.device("cpu")
        torch.set_num_threads(max(1, usable_cores() // local_size))
    backend = "nccl" if kind == "cuda" else "gloo"
    bound = where if kind == "cuda" else None
    timeout = timedelta(seconds=patience)
    store, restarted = _meet(rank, size, timeout)
    # NCCL would end the process without a word: the control group, which can say more, is first.
    longer = 2 * timeout if kind == "cuda" else timeout
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=longer, device_id=bound
    )
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        world = World(rank, size, where, control, store, patience)
        world = dataclasses.replace(world, restarted=world.any(restarted))
        with world.roll_call():
            yield world
    except KeyboardInterrupt:  # a stop, on which all have agreed
        dist.destroy_process_group()
        raise
    except BaseException as error:
        _leave_behind(error)
        raise
    dist.destroy_process_group()


def _leave_behind(error: BaseException) -> None:
    """Ends the group where this rank has failed, or another.

    NCCL destroys a group when all that is queued has been computed (pytorch pull request 141510).
    What waits for a dead rank never is, and this process would hang before it has said what went
    wrong: so what is queued is broken off. A rank that has said it already (see
    ``World.roll_call``) just ends.
    """
    if dist.get_backend() != "nccl":
        dist.destroy_process_group()
    elif isinstance(error, SystemExit):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stage.FAULT)
    else:
        assert dist.group.WORLD is not None
        dist.group.WORLD.abort()


def _meet(rank: int, size: int, timeout: timedelta) -> tuple[Store, bool]:
    """The store in which the ranks find each other, with the name of each.

    And whether they were started before, as far as this one can see: a node whose own workers were
    well does not count the restart that another asks for, but its store may have seen it.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), False  # type: ignore[attr-defined]
    store: Store = next(rendezvous("env://"))[0]
    store.set_timeout(timeout)
    counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    restarted = counted or (rank == 0 and store.check(["start"]))
    store = PrefixStore(_agree(store, rank, size, timeout), store)
    store.set(f"rank-{rank}", f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})")
    return store, restarted


def _agree(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name for this start of the group, which no earlier start had.

    torchrun's store outlives the workers. Those that it starts again would find there the addresses
    of the dead (pytorch issue 135712), and the count of restarts is not the same on each node.
    So each rank brings a number of its own, rank 0 answers with all that it sees, and a rank knows
    by its own number that the answer is not an old one.

    Raises:
        StageFailed: The others have not come; where an earlier start has left its keys, no read of
            the store would ever find that out.
    """
    mine = uuid.uuid4().hex
    others = range(1, size)
    end = time.monotonic() + timeout.total_seconds()

    def wait_for(missing: str) -> None:
        if time.monotonic() > end:
            raise StageFailed(
                f"rank {rank} (pid {os.getpid()} on {socket.gethostname()}) has waited "
                f"{timeout.total_seconds():g} s for {missing}; the same command goes on from the "
                "last checkpoint"
            )
        time.sleep(0.05)

    if rank > 0:
        store.set(f"here-{rank}", mine)
        while (answer := json.loads(store.get("start")))["here"].get(str(rank)) != mine:
            wait_for("rank 0")
        store.set(f"seen-{rank}", answer["name"])
        return str(answer["name"])
    while True:
        here = {other: store.get(f"here-{other}").decode() for other in others}
        store.set("start", json.dumps({"name": mine, "here": here}))
        missing = [
            other
            for other in others
            if not store.check([key := f"seen-{other}"]) or store.get(key).decode() != mine
        ]
        if not missing:
            return mine
        wait_for("rank " + ", ".join(map(str, missing)))


def _is_of_a_collective(error: RuntimeError) -> bool:
    return "gloo" in str(error) or isinstance(error, dist.DistError)
