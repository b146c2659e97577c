"""How the processes of a run find each other, and how the group ends."""

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
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline.runtime import command
from pipeline.runtime.errors import StageFailed, UserError
from pipeline.runtime.machine import usable_cores
from train.distributed.devices import device_type
from train.distributed.world import World


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
        os._exit(command.FAULT)
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
