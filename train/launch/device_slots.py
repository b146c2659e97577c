"""Which GPUs or cores a training takes, where several share a machine (`dvc queue start --jobs 8`).

A training that takes the whole machine claims nothing. One that takes a part of it claims that
part: a lock for each GPU or core, in the machine's temporary folder, which the kernel releases when
the process ends, however it ends. While too few are free it waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine


def claim_part(
    machine: Machine, kind: Literal["cpu", "cuda"], processes: int
) -> contextlib.ExitStack:
    """Binds this process, and those that it starts, to their part of the machine.

    Args:
        machine: Its `processes` say how many GPUs are taken, its `cores` how many cores.
        kind: What is computed on.
        processes: That will train.

    Returns:
        What holds the part: until it is closed, or this process ends.

    Raises:
        UserError: There are not so many cores, or this system cannot bind a process to some.
    """
    if kind == "cuda":
        if processes == torch.cuda.device_count():
            return contextlib.ExitStack()
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        all_of_them = (
            named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
        )
        held, mine = claim("gpu", all_of_them, processes)
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
    print(f"takes {kind} {', '.join(mine)} of this machine", flush=True)
    return held


def claim(
    what: str, places: Sequence[str], n: int, folder: Path | None = None, patience: float = 1.0
) -> tuple[contextlib.ExitStack, list[str]]:
    """Holds ``n`` of some places, waiting until so many are free.

    Args:
        what: "gpu" or "core".
        places: Their names, the same for all who share them.
        n: At most as many as there are.
        folder: Of the locks; the machine's, where None.
        patience: Seconds between two tries.

    Returns:
        What holds them, and which they are, in the order of ``places``.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"gpt2-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    told = False
    while True:
        stack, mine = contextlib.ExitStack(), []
        for place in places:
            file = open(folder / f"{what}-{re.sub(r'[^A-Za-z0-9-]', '_', place)}", "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            stack.enter_context(file)
            mine.append(place)
            if len(mine) == n:
                return stack, mine
        stack.close()  # all or none: two that held half each would wait for ever
        if not told:
            print(f"waiting for {n} free of {len(places)} ({what}s)", file=sys.stderr, flush=True)
            told = True
        time.sleep(patience * random.uniform(0.5, 1.5))
