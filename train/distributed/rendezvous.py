"""How the processes of a run form a group, and how the group is torn down.

The ranks meet in the group's key-value store, under a prefix that only this start uses.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from pipeline.runtime import command
from pipeline.runtime.errors import StageFailed, UserError
from pipeline.runtime.machine import usable_cores
from train.distributed.devices import device_type, keep_freed_memory
from train.distributed.group import Group, open_store, read_group, stay_on_this_machine
from train.distributed.world import HOW_TO_RESUME, World, process_name, sign_in


@contextmanager
def process_group(
    device: Literal["auto", "cpu", "cuda"], timeout: float = 900.0
) -> Iterator[World]:
    """Join the group that the environment describes; a group of one without torchrun.

    The backend is NCCL on GPUs and gloo on CPUs. On a CPU the processes of a node share its cores:
    results are the same bits only for the same number of threads.

    Raises:
        UserError: This node has fewer GPUs than processes; the environment does not describe a
            group, or nothing answers where it says.
        StageFailed: Other ranks did not join in ``timeout`` seconds.
        SystemExit: A rank died or did not respond in time (see ``World.roll_call``).
    """
    kind = device_type(device)
    group = read_group()
    if group.one_node:
        stay_on_this_machine()
        if group.hosted and group.rank == 0 and command.PARENT not in os.environ:
            print(
                "warning: torchrun listens on all interfaces, and runs what others send it; on one "
                "node, python -m train.launch does not",
                file=sys.stderr,
                flush=True,
            )
    cores = max(1, usable_cores() // group.local_size)
    # torch.compile would start up to 32 processes per rank.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, cores)))
    if kind == "cuda":
        if group.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"processes (machine.yaml, GPT2_PROCESSES): {group.local_size}, but this node has "
                f"{torch.cuda.device_count()} GPUs; use as many, or device: cpu"
            )
        own_device = torch.device("cuda", group.local_rank)
        torch.cuda.set_device(own_device)  # before the group: NCCL binds to the current device
    else:
        own_device = torch.device("cpu")
        torch.set_num_threads(cores)
        keep_freed_memory()
    wait = timedelta(seconds=timeout)
    store, restarted = _join_store(group, wait)
    # NCCL ends a process without naming the rank it waited for: the control group times out first.
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=group.rank,
        world_size=group.size,
        timeout=2 * wait if kind == "cuda" else wait,
        device_id=own_device if kind == "cuda" else None,
    )
    try:
        world = World(
            rank=group.rank,
            size=group.size,
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


def _join_store(group: Group, timeout: timedelta) -> tuple[Store, bool]:
    """Open the group's store and sign in.

    Returns:
        The store, and whether torchrun has restarted this process as far as this rank can tell: a
        node whose own workers were healthy does not count a restart that another node asked for,
        but rank 0 finds the keys of the earlier start in the store.
    """
    if group.size == 1 and not group.hosted:
        return dist.HashStore(), False  # type: ignore[attr-defined]
    store: Store = open_store(group, timeout)
    store.set_timeout(timeout)
    counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
    restarted = counted or (group.rank == 0 and store.check(["start"]))
    store = PrefixStore(_agree_on_prefix(store, group.rank, group.size, timeout), store)
    sign_in(store, group.rank)
    return store, restarted


def _agree_on_prefix(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Agree with all ranks on a prefix for this start of the group, which no earlier start had.

    torchrun's store outlives the workers: restarted ones would find the addresses of the dead there
    (pytorch issue 135712), and the restart count differs between nodes. So each rank writes a
    nonce, rank 0 answers with all nonces it sees and its own as the prefix, and a rank that finds
    its nonce in the answer knows that the answer is not an old one.

    The store is asked again and again: a read that waits for a key would take no signal.

    Raises:
        StageFailed: Other ranks did not join in time.
    """
    nonce = uuid.uuid4().hex
    end = time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str | None:
        return store.get(key).decode() if store.check([key]) else None

    def wait(missing: Callable[[], list[int]]) -> None:
        while ranks := missing():
            if time.monotonic() > end:
                names = ", ".join(map(str, ranks))
                raise StageFailed(
                    f"{process_name(rank)} has waited {timeout.total_seconds():g} s for rank "
                    f"{names}; {HOW_TO_RESUME}"
                )
            time.sleep(0.05)

    if rank > 0:
        store.set(f"here-{rank}", nonce)
        wait(lambda: [] if nonce == _answer(read("start"))["here"].get(str(rank)) else [0])
        name = str(_answer(read("start"))["name"])
        store.set(f"seen-{rank}", name)
        return name

    def unseen() -> list[int]:
        here = {other: read(f"here-{other}") for other in range(1, size)}
        store.set("start", json.dumps({"name": nonce, "here": here}))
        return [other for other in here if read(f"seen-{other}") != nonce]

    wait(unseen)
    return nonce


def _answer(text: str | None) -> dict[str, Any]:
    """Rank 0's answer, or one to nobody."""
    answer: dict[str, Any] = json.loads(text or '{"here": {}}')
    return answer
