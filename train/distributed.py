"""The processes that train together: who this one is, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError
from pipeline.machine import usable_cores

T = TypeVar("T")

TIMEOUT = timedelta(minutes=15)  # a rank that hangs longer takes the job down


@dataclass(frozen=True)
class World:
    """The group of processes, seen from one of them.

    Attributes:
        rank: Of this process, 0 ... size - 1.
        size: Processes, over all nodes.
        device: Where this process computes.
        control: A gloo group for what is decided on the CPU: it never waits for a GPU.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup

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


def default_processes(kind: Literal["cpu", "cuda"]) -> int:
    """Processes on this node where nobody says: each GPU one, or two on a CPU."""
    return torch.cuda.device_count() if kind == "cuda" else min(2, usable_cores())


@contextmanager
def process_group(device: Literal["auto", "cpu", "cuda"]) -> Iterator[World]:
    """Joins the group that torchrun describes in the environment; alone without torchrun.

    NCCL between GPUs, gloo between CPUs. On the CPU the node's cores are shared out as threads,
    as results are the same bits only for the same number of threads.
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
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, device_id=bound)
    try:
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield World(rank, size, where, control)
    finally:
        dist.destroy_process_group()
