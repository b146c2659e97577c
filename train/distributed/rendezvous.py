"""How the processes of a run form a group, and how the group is torn down.

torchrun (or a test) describes the group in the environment: RANK, WORLD_SIZE, MASTER_ADDR, ... The
ranks meet in its key-value store, under a prefix that only this start of the group uses.
"""

from __future__ import annotations

import dataclasses
import json
import os
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
from train.distributed.world import HOW_TO_RESUME, World, process_name, sign_in


@contextmanager
def process_group(
    device: Literal["auto", "cpu", "cuda"], timeout: float = 900.0
) -> Iterator[World]:
    """Join the group that torchrun describes in the environment; a group of one without torchrun.

    The backend is NCCL on GPUs and gloo on CPUs. On a CPU the processes of a node share its cores:
    results are the same bits only for the same number of threads.

    Raises:
        UserError: This node has fewer GPUs than processes.
        StageFailed: Other ranks did not join in ``timeout`` seconds.
        SystemExit: A rank died or did not respond in time (see ``World.roll_call``).
    """
    kind = device_type(device)
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"processes (machine.yaml, GPT2_PROCESSES): {local_size}, but this node has "
                f"{torch.cuda.device_count()} GPUs; use as many, or device: cpu"
            )
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)  # before the group: NCCL binds to the current device
    else:
        own_device = torch.device("cpu")
        torch.set_num_threads(max(1, usable_cores() // local_size))
    wait = timedelta(seconds=timeout)
    store, restarted = _join_store(rank, size, wait)
    # NCCL ends a process without naming the rank it waited for: the control group times out first.
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=2 * wait if kind == "cuda" else wait,
        device_id=own_device if kind == "cuda" else None,
    )
    try:
        world = World(
            rank=rank,
            size=size,
            device=own_device,
            control=dist.new_group(backend="gloo", timeout=wait),
            store=store,
            timeout=timeout,
        )
        world = dataclasses.replace(world, restarted=world.any(restarted))
        with world.roll_call():
            yield world
    except BaseException as error:
        _tear_down(error)
        raise
    dist.destroy_process_group()


def _tear_down(error: BaseException) -> None:
    """Leave the group after an error on this rank or another.

    NCCL destroys a group only when all queued work is done (pytorch pull request 141510). Work that
    waits for a dead rank never is, so this process would hang before it has reported its error:
    abort the group instead. Where the error has been reported (``World.roll_call``), exit at once.
    """
    agreed = isinstance(error, KeyboardInterrupt)  # all ranks stop at the same step
    if agreed or dist.get_backend() != "nccl":
        dist.destroy_process_group()
    elif isinstance(error, SystemExit):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(command.FAULT)
    else:
        assert dist.group.WORLD is not None
        dist.group.WORLD.abort()


def _join_store(rank: int, size: int, timeout: timedelta) -> tuple[Store, bool]:
    """Open the group's store and sign in.

    Returns:
        The store, and whether torchrun has restarted this process as far as this rank can tell: a
        node whose own workers were healthy does not count a restart that another node asked for,
        but rank 0 finds the keys of the earlier start in the store.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), False  # type: ignore[attr-defined]
    store: Store = next(rendezvous("env://"))[0]
    store.set_timeout(timeout)
    counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    restarted = counted or (rank == 0 and store.check(["start"]))
    store = PrefixStore(_agree_on_prefix(store, rank, size, timeout), store)
    sign_in(store, rank)
    return store, restarted


def _agree_on_prefix(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Agree with all ranks on a prefix for this start of the group, which no earlier start had.

    torchrun's store outlives the workers: restarted ones would find the addresses of the dead there
    (pytorch issue 135712), and the restart count differs between nodes. So each rank writes a
    nonce, rank 0 answers with all nonces it sees and its own as the prefix, and a rank that finds
    its nonce in the answer knows that the answer is not an old one.

    Raises:
        StageFailed: Other ranks did not join in time. Reads do not time out where an earlier start
            has left its keys.
    """
    nonce = uuid.uuid4().hex
    others = range(1, size)
    end = time.monotonic() + timeout.total_seconds()

    def wait_for(missing: str) -> None:
        if time.monotonic() > end:
            raise StageFailed(
                f"{process_name(rank)} has waited {timeout.total_seconds():g} s for {missing}; "
                f"{HOW_TO_RESUME}"
            )
        time.sleep(0.05)

    if rank > 0:
        store.set(f"here-{rank}", nonce)
        while (answer := json.loads(store.get("start")))["here"].get(str(rank)) != nonce:
            wait_for("rank 0")
        store.set(f"seen-{rank}", answer["name"])
        return str(answer["name"])
    while True:
        here = {other: store.get(f"here-{other}").decode() for other in others}
        store.set("start", json.dumps({"name": nonce, "here": here}))
        missing = [
            other
            for other in others
            if not store.check([key := f"seen-{other}"]) or store.get(key).decode() != nonce
        ]
        if not missing:
            return nonce
        wait_for("rank " + ", ".join(map(str, missing)))
