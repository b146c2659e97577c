"""Share a machine's GPUs or cores among runs (`dvc queue start --jobs 8`).

A run that uses the whole machine claims nothing. One that uses part of it claims that part: one
lock per GPU or core, in the machine's temporary folder, which the kernel releases when the process
ends, however it ends. While too few are free, the run waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, private_folder


def claim_devices(
    machine: Machine, kind: Literal["cpu", "cuda"], processes: int
) -> contextlib.ExitStack:
    """Bind this process, and those that it starts, to a free part of the machine.

    Args:
        machine: Its `processes` is the number of GPUs to claim, its `cores` the number of cores.
        kind: Device type that the run computes on.
        processes: Number of training processes.

    Returns:
        Holds the claim until it is closed, or this process ends.

    Raises:
        UserError: There are fewer cores, or this system cannot bind a process to cores.
    """
    if kind == "cuda":
        if processes == torch.cuda.device_count():
            return contextlib.ExitStack()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
        held, mine = claim("gpu", list(gpus), processes)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    elif machine.cores is not None:
        if not hasattr(os, "sched_setaffinity"):
            raise UserError("cores (machine.yaml, GPT2_CORES): only Linux binds processes to cores")
        usable = [str(core) for core in sorted(os.sched_getaffinity(0))]
        if machine.cores > len(usable):
            raise UserError(
                f"cores (machine.yaml, GPT2_CORES): {machine.cores}, but {len(usable)} are usable"
            )
        held, mine = claim("core", usable, machine.cores)
        os.sched_setaffinity(0, map(int, mine))
    else:
        return contextlib.ExitStack()
    print(f"uses {kind} {', '.join(mine)} of this machine", flush=True)
    return held


def claim(
    kind: str, names: Sequence[str], n: int, folder: Path | None = None, interval: float = 1.0
) -> tuple[contextlib.ExitStack, list[str]]:
    """Lock ``n`` of several devices, waiting until so many are free.

    Args:
        kind: "gpu" or "core".
        names: Names of the devices, the same for all runs that share them.
        n: At most ``len(names)``.
        folder: Folder of the locks; None: this user's temporary folder.
        interval: Seconds between two tries.

    Returns:
        Holder of the locks, and the names of the locked devices, in order.
    """
    folder = folder or private_folder()
    announced = False
    while True:
        stack, mine = contextlib.ExitStack(), []
        for name in names:
            file = open(folder / f"{kind}-{re.sub(r'[^A-Za-z0-9-]', '_', name)}", "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            stack.enter_context(file)
            mine.append(name)
            if len(mine) == n:
                return stack, mine
        stack.close()  # all or none: two runs that hold half each would wait forever
        if not announced:
            print(f"waiting for {n} free of {len(names)} {kind}s", file=sys.stderr, flush=True)
            announced = True
        time.sleep(interval * random.uniform(0.5, 1.5))
