"""The process group of a run, as one of its processes sees it.

`World` has the collectives that training needs: tensors are summed on their device; flags, values
and barriers go through a gloo group on the CPU. When a collective fails, `World.roll_call` finds
out which ranks are missing and names them. The group is made in rendezvous.py.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from pipeline.runtime import command

T = TypeVar("T")

ROLL_CALL_SECONDS = 5.0  # for all ranks whose collective failed to answer
HOW_TO_RESUME = "run the same command again to resume from the last checkpoint"


def process_name(rank: int) -> str:
    """Name of this process in messages."""
    return f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})"


def sign_in(store: Store, rank: int) -> None:
    """Leave this process's name in the store, for the ranks that may have to report it missing."""
    store.set(f"rank-{rank}", process_name(rank))


@dataclass(frozen=True, kw_only=True)
class World:
    """The group of processes, seen from one of them.

    Attributes:
        size: Number of processes on all nodes.
        control: Gloo group for decisions on the CPU; it never waits for a GPU.
        store: Key-value store of the group; it works when no collective does any more.
        timeout: Seconds that a rank waits for another.
        restarted: Whether torchrun has restarted these processes.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    store: Store
    timeout: float
    restarted: bool = False

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place; on CUDA this is queued and not waited for."""
        dist.all_reduce(value)
        return value

    def all_gather(self, rows: Tensor) -> None:
        """Give every rank all rows of (size, n), of which each has written its own.

        On CUDA this is queued and not waited for.
        """
        if self.size > 1:
            dist.all_gather_single(rows.view(-1), rows[self.rank])

    def all_to_all(
        self, received: Tensor, sent: Tensor, receives: list[int], sends: list[int]
    ) -> None:
        """Send each rank its part of a vector, and receive one from each; lengths by rank.

        On CUDA this is queued and not waited for.
        """
        dist.all_to_all_single(received, sent, receives, sends)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; all ranks get the same answer."""
        value = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on each rank (pickled between our own processes only)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank (pickled between our own processes only)."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier(group=self.control)

    def wait_for_gpu(self, event: torch.cuda.Event) -> None:
        """Wait until the GPU has reached an event, which may be queued behind a collective.

        Raises:
            DistError: It did not in ``timeout`` seconds. NCCL would wait twice as long, then end
                the process without naming the rank it waited for.
        """
        end = time.monotonic() + self.timeout
        while not event.query():
            if time.monotonic() > end:
                raise dist.DistError(f"the GPU's work was not done in {self.timeout:g} s")
            time.sleep(2e-4)

    @contextmanager
    def roll_call(self) -> Iterator[None]:
        """When a collective in this context fails, name the missing ranks and exit.

        Every rank whose collective failed answers in the store; one that does not is dead or hung.

        Raises:
            SystemExit: Ranks are missing; the lowest rank that answered names them on stderr.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_collective_error(error):
                raise
            missing = self._missing_ranks()
            if not missing:
                raise
            if self.rank == min(set(range(self.size)) - missing):
                names = [self.store.get(f"rank-{other}").decode() for other in sorted(missing)]
                print(
                    f"error: {', '.join(names)}: died or did not respond in {self.timeout:g} s; "
                    f"{HOW_TO_RESUME}",
                    file=sys.stderr,
                    flush=True,
                )
            sys.exit(command.FAULT)

    def _missing_ranks(self) -> set[int]:
        """Ranks that do not answer a roll call; empty if the store is gone as well."""
        missing = set(range(self.size))
        end = time.monotonic() + ROLL_CALL_SECONDS
        try:
            self.store.set(f"present-{self.rank}", "")
            while missing and time.monotonic() < end:
                time.sleep(0.1)
                missing = {other for other in missing if not self.store.check([f"present-{other}"])}
        except RuntimeError:
            return set()
        return missing


def _is_collective_error(error: RuntimeError) -> bool:
    return "gloo" in str(error) or isinstance(error, dist.DistError)
