"""The processes that train together: who this one is, and what they agree on."""

from __future__ import annotations

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
from pipeline.errors import UserError
from pipeline.machine import usable_cores

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
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    store: Store
    patience: float

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
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device (machine.yaml, GPT2_DEVICE): cuda, but PyTorch sees none; use auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def default_processes(kind: Literal["cpu", "cuda"], cores: int | None = None) -> int:
    """Processes on this node where nobody says: each GPU one, or two on a CPU.

    Args:
        kind: What is computed on.
        cores: Of a CPU, that may be used; None: all.
    """
    return torch.cuda.device_count() if kind == "cuda" else min(2, cores or usable_cores())


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
    store = _meet(rank, size, timeout)
    # NCCL would end the process without a word: the control group, which can say more, is first.
    longer = 2 * timeout if kind == "cuda" else timeout
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=longer, device_id=bound
    )
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        world = World(rank, size, where, control, store, patience)
        with world.roll_call():
            yield world
    except SystemExit:
        if kind == "cuda":
            # What is queued waits for the rank that is gone, and destroying the group waits for
            # what is queued, by purpose (pytorch pull request 141510): no tidy end, but an end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stage.FAULT)
        raise
    finally:
        dist.destroy_process_group()


def _meet(rank: int, size: int, timeout: timedelta) -> Store:
    """The store in which the ranks find each other, with the name of each."""
    if "RANK" not in os.environ:
        return dist.HashStore()  # type: ignore[attr-defined]
    store: Store = next(rendezvous("env://"))[0]
    store.set_timeout(timeout)
    store = PrefixStore(_agree(store, rank, size), store)
    store.set(f"rank-{rank}", f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})")
    return store


def _agree(store: Store, rank: int, size: int) -> str:
    """A name for this start of the group, which no earlier start had.

    torchrun's store outlives the workers. Those that it starts again would find there the addresses
    of the dead (pytorch issue 135712), and the count of restarts is not the same on each node.
    So each rank brings a number of its own, rank 0 answers with all that it sees, and a rank knows
    by its own number that the answer is not an old one.
    """
    mine = uuid.uuid4().hex
    others = range(1, size)
    if rank > 0:
        store.set(f"here-{rank}", mine)
        while (answer := json.loads(store.get("start")))["here"].get(str(rank)) != mine:
            time.sleep(0.05)
        store.set(f"seen-{rank}", answer["name"])
        return str(answer["name"])
    while True:
        here = {other: store.get(f"here-{other}").decode() for other in others}
        store.set("start", json.dumps({"name": mine, "here": here}))
        keys = [f"seen-{other}" for other in others]
        if all(store.check([key]) and store.get(key).decode() == mine for key in keys):
            return mine
        time.sleep(0.05)


def _is_of_a_collective(error: RuntimeError) -> bool:
    return "gloo" in str(error) or isinstance(error, dist.DistError)
