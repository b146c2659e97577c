"""`train.invariant`: one hash over all numbers of processes, and what it costs.

    python -m tests.benchmarks.invariant                 both parts
    python -m tests.benchmarks.invariant --only hashes   1, 2, 3, 4, 5, 8 processes, and an elastic
                                                         run 4 -> 1 -> 8 -> 3; some minutes
    python -m tests.benchmarks.invariant --only cost     on an idle machine with two cores

Hashes: a model of two layers is trained for 50 steps with a ramp from 8 to 16 leaves, accumulation
and active clipping, with AdamW and Muon, in float32 and bfloat16. A hash is over the weights, the
optimizer state, all losses, norms and validations. The exit status is 1 where one differs, or where
runs without `invariant` do not.

Cost: in one group of two processes, steps of plain DDP and of `invariant` take turns, with the
model of params.yaml and one thread each. The table has the median of the paired ratios: of plain
DDP in leaves to plain DDP in usual micro-batches (the price of the leaf's size), and of `invariant`
to plain DDP in leaves (the price of the order).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.runtime.params_file import read_yaml
from tests.support.forked import run_ranks, train_until
from tests.support.repo import REPO
from tests.support.training import Project, batches, make_project
from train.checkpoint import directory
from train.checkpoint.chain import LOGGED

WORLDS = (1, 2, 3, 4, 5, 8)
ELASTIC = ((4, 11), (1, 23), (8, 36), (3, None))  # processes, and the step at which they stop
TRAIN: dict[str, Any] = {
    "steps": 50, "batch_tokens": 32 * 16, "batch_doublings": 1, "batch_ramp_steps": 20,
    "invariant": 2, "grad_clip": 0.2, "log_every": 1, "val_every": 10, "checkpoint_every": 10,
    "sample_tokens": 0,
}  # fmt: skip
PAIRS = 30


def digest(project: Project) -> str:
    """Hash weights, optimizer state, losses, norms and validations of the published run."""
    files = project.published()
    lines = (project.folder / "artifacts/log.jsonl").read_text().splitlines()
    log = [{n: r[n] for n in ("step", *LOGGED) if n in r} for r in map(json.loads, lines)]
    assert sum("grad_norm" in record for record in log) == TRAIN["steps"]
    assert statistics.median(r["grad_norm"] for r in log if "grad_norm" in r) > TRAIN["grad_clip"]
    parts = [files[directory.MODEL], files[directory.OPTIMIZER], json.dumps(log).encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def hashes() -> bool:
    """Print the table of hashes; return whether all are as they should be."""
    good = True
    print(f"{'optimizer':10} {'dtype':9} {'processes':16} sha256")
    for optimizer, dtype in itertools.product(("adamw", "muon"), ("float32", "bfloat16")):
        kind = {"optimizer": optimizer, "dtype": dtype}
        with tempfile.TemporaryDirectory() as folder:
            project = make_project(Path(folder))

            def report(processes: str, found: str, kind: dict[str, str] = kind) -> str:
                print(
                    f"{kind['optimizer']:10} {kind['dtype']:9} {processes:16} {found}", flush=True
                )
                return found

            project.write(train={**TRAIN, **kind})
            same = set()
            for world in WORLDS:
                run_ranks(train_until, project.folder, world, None, GPT2_WORK_DIR=f"w{world}")
                same.add(report(str(world), digest(project)))
            for world, step in ELASTIC:
                run_ranks(train_until, project.folder, world, step, GPT2_WORK_DIR="elastic")
            same.add(report(" -> ".join(str(world) for world, _ in ELASTIC), digest(project)))

            project.write(train={**TRAIN, **kind, "invariant": None})
            usual = set()
            for world in (1, 2, 4):
                variables = {"GPT2_WORK_DIR": f"u{world}", "GPT2_MICRO_BATCH": 2}
                run_ranks(train_until, project.folder, world, None, **variables)
                usual.add(report(f"{world}, null", digest(project)))
            good &= len(same) == 1 and len(usual) > 1
    return good


def _time_steps(leaf: int, out: str) -> None:
    """Time the steps of three trainers, which take turns; rank 0 writes the seconds."""
    from train.distributed.interrupt import Interrupt
    from train.distributed.rendezvous import process_group
    from train.invariant import InvariantTrainer
    from train.run import Run
    from train.trainer import Trainer

    run = Run.open()
    torch.set_num_threads(1)
    with process_group("cpu") as world, Interrupt(world) as interrupt:
        torch.set_num_threads(1)
        trainers, times = {}, []
        for name, size, invariant in (
            ("usual", None, None), ("leaves", leaf, None), ("invariant", None, leaf)
        ):  # fmt: skip
            own = Run(
                model=run.model,
                params=run.params.model_copy(update={"invariant": invariant}),
                machine=run.machine.model_copy(update={"micro_batch": size}),
                train_data=run.train_data,
                val_data=run.val_data,
                code_key="",
            )
            trainer = (InvariantTrainer if invariant else Trainer)(own, world)
            trainer.warm_up()
            trainers[name] = trainer, own
        loaders = {name: batches(own, t, 0) for name, (t, own) in trainers.items()}
        for loader in loaders.values():
            loader.__enter__()
        for step in range(PAIRS + 3):
            row = {}
            for name, (trainer, _) in trainers.items():
                world.barrier()
                before = time.perf_counter()
                trainer.step(step, loaders[name], interrupt)
                row[name] = time.perf_counter() - before
            times.append(row)
        if world.first:
            Path(out).write_text(json.dumps(times[3:]))
        world.barrier()


def cost(leaves: list[int], compiled: bool) -> None:
    """Print what leaves of these sizes cost on this machine."""
    params = read_yaml(REPO / "params.yaml")
    train = {**params["train"], "dtype": "float32", "val_tokens": 1000}
    print(f"\n{'leaf':>4} {'step ms':>8} {'size of the leaf':>17} {'order of the sum':>17}")
    for leaf in leaves:
        with tempfile.TemporaryDirectory() as folder:
            project = make_project(Path(folder))
            project.write_data(n_train=200_000)
            (project.folder / "params.yaml").unlink()
            project.write(model=params["model"], train=train)
            out = project.folder / "times.json"
            run_ranks(_time_steps, project.folder, 2, leaf, str(out), GPT2_COMPILE=compiled)
            rows = json.loads(out.read_text())
        size = statistics.median(row["leaves"] / row["usual"] for row in rows)
        order = statistics.median(row["invariant"] / row["leaves"] for row in rows)
        step = 1000 * statistics.median(row["invariant"] for row in rows)
        print(f"{leaf:4d} {step:8.1f} {size - 1:+17.1%} {order - 1:+17.1%}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.invariant")
    parser.add_argument("--only", choices=("hashes", "cost"))
    parser.add_argument("--leaves", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--compile", action="store_true", help="cost: of compiled models")
    args = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "passive"
    good = args.only == "cost" or hashes()
    if args.only != "hashes":
        cost(args.leaves, args.compile)
    sys.exit(not good)


if __name__ == "__main__":
    main()
