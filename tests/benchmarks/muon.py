"""Muon's step over several gloo ranks: time per rank, and the hash of the weights.

    python -m tests.benchmarks.muon [--ranks 1 2 4] [--layers 12] [--width 768] [--steps 2]

Each rank has one thread and the same gradients. The hashes of all ranks must be equal; the exit
status is 1 where they are not. On a machine with fewer cores than ranks, read "CPU s": the time
that a rank computed, not the time that it waited for a core.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from train.distributed.world import World
from train.optim.muon import MuonAdamW


@dataclass(frozen=True)
class Result:
    """One rank's fastest step in seconds, wall and CPU time, and the hash of its weights."""

    wall: float
    cpu: float
    digest: str


def shapes(layers: int, width: int) -> dict[str, tuple[int, int]]:
    """The matrices of the blocks of a GPT-2."""
    maps = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4}
    found = {
        f"h.{i}.{n}.weight": (k * width, width) for i in range(layers) for n, k in maps.items()
    }
    return found | {f"h.{i}.mlp.c_proj.weight": (width, 4 * width) for i in range(layers)}


def _rank(rank: int, ranks: int, folder: str, layers: int, width: int, steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    control = dist.group.WORLD
    assert control is not None
    world = World(
        rank=rank,
        size=ranks,
        device=torch.device("cpu"),
        control=control,
        store=store,
        timeout=600.0,
    )
    generator = torch.Generator().manual_seed(0)
    named = {
        name: torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        for name, shape in shapes(layers, width).items()
    }
    vector = torch.nn.Parameter(torch.zeros(1))
    vector.grad = torch.zeros(1)
    optimizer = MuonAdamW(
        named.items(),
        torch.optim.AdamW([vector]),
        learning_rate=1e-3,
        weight_decay=0.1,
        world=world,
    )
    wall, cpu = [], []
    for _ in range(steps):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        dist.barrier()
        before = time.perf_counter(), time.process_time()
        optimizer.step()
        wall.append(time.perf_counter() - before[0])
        cpu.append(time.process_time() - before[1])
    digest = hashlib.sha256()
    for parameter in named.values():
        digest.update(parameter.detach().numpy().tobytes())
    result = f"{min(wall)} {min(cpu)} {digest.hexdigest()}"
    Path(folder, str(rank)).write_text(result)
    dist.destroy_process_group()


def compare(ranks: int, layers: int, width: int, steps: int = 2) -> list[Result]:
    """Run the steps in processes of their own and return the result of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, folder, layers, width, steps), nprocs=ranks)
        texts = [Path(folder, str(rank)).read_text().split() for rank in range(ranks)]
    return [Result(float(wall), float(cpu), digest) for wall, cpu, digest in texts]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.muon")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=2, help="the fastest counts")
    args = parser.parse_args()
    found = set()
    print(f"{'ranks':>5} {'rank':>4} {'wall s':>8} {'CPU s':>8}  sha256 of the weights")
    for ranks in args.ranks:
        for rank, result in enumerate(compare(ranks, args.layers, args.width, args.steps)):
            print(f"{ranks:5d} {rank:4d} {result.wall:8.2f} {result.cpu:8.2f}  {result.digest}")
            found.add(result.digest)
    sys.exit(len(found) > 1)


if __name__ == "__main__":
    main()
