"""The processes that train together: who this one is, and what they agree on."""

from __future__ import annotations

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
            sys.exit(command.FAULT)

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


def _is_of_a_collective(error: RuntimeError) -> bool:
    return "gloo" in str(error) or isinstance(error, dist.DistError)
