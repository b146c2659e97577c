"""Ranks of a run that are forked from one server which has imported torch: cheap to start.

Starting `python -m train` costs each rank some seconds of imports, which a table over many numbers
of processes would mostly measure.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import Stopped


def run_ranks(
    target: Callable[..., None], folder: Path, ranks: int, *args: Any, **environment: object
) -> None:
    """Call ``target(*args)`` in each rank of a group, in a folder; raise if one fails."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["train.loop", "train.__main__"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "DVCLIVE_LOG_LEVEL": "ERROR",
        "GPT2_DEVICE": "cpu",
        "OMP_NUM_THREADS": 1,
        "TORCHELASTIC_RUN_ID": "forked",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        **environment,
    }
    processes = []
    for rank in range(ranks):
        own = {**variables, "RANK": rank, "LOCAL_RANK": rank}
        process = context.Process(
            target=_rank, args=(target, args, folder, {k: str(v) for k, v in own.items()})
        )
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise RuntimeError(f"{len(failed)} of {ranks} ranks failed: {failed}")


def _rank(
    target: Callable[..., None], args: tuple[Any, ...], folder: Path, variables: Mapping[str, str]
) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    target(*args)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads are still there


def train_until(step: int | None) -> None:
    """Train the run of the current folder; rank 0 gets a signal when it begins ``step``."""
    from train.__main__ import main
    from train.invariant import InvariantTrainer

    original = InvariantTrainer.step

    def step_and_signal(self: InvariantTrainer, number: int, *args: Any) -> Any:
        if number == step and self.world.first:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, number, *args)

    if step is not None:
        patched: Any = InvariantTrainer
        patched.step = step_and_signal
    try:
        main()
    except Stopped:
        assert step is not None
