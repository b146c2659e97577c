"""Speed and memory of the loader: `python -m tests.benchmarks.loader`.

*Speed*: tokens per second of `Batches`, from the page cache, without a training step.
*Memory*: resident set (Linux) while part of an epoch over 20 GB of sparse shards is read in
shuffled order: anonymous memory, and mapped pages of files.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pipeline import TokenStream
from tests.support.training import shard_entry, shard_header, write_manifest
from train import DataOrder
from train.data.loader import Batches
from train.data.split import Split
from train.optim.schedule import BatchSchedule

BATCH_TOKENS = 524_288
MICRO_BATCH_TOKENS = 16_384


def write_folder(folder: Path, shards: int, tokens: int, sparse: bool) -> TokenStream:
    """Write a token folder of random tokens, or of sparse files, which read as zeros."""
    rng, entries = np.random.default_rng(0), []
    for number in range(shards):
        name = f"train-{number:05d}.bin"
        with open(folder / name, "wb") as file:
            file.write(header := shard_header(tokens))
            if sparse:
                file.truncate(len(header) + 2 * tokens)
            else:
                file.write(rng.integers(0, 50257, tokens).astype("<u2").tobytes())
        entries.append(shard_entry(name, tokens))
    write_manifest(folder, entries)
    return TokenStream(folder, "train")


def batches(stream: TokenStream, block_size: int, tokens: int) -> Batches:
    """Make the loader of one process over ``tokens`` tokens, with the batch size of a real run."""
    schedule = BatchSchedule(full=BATCH_TOKENS // block_size)
    return Batches(
        stream,
        DataOrder(n_tokens=len(stream), block_size=block_size, seed=1),
        Split(world=1, micro_batch=MICRO_BATCH_TOKENS // block_size),
        rank=0,
        spans=schedule.spans(0, tokens // BATCH_TOKENS),
        device=torch.device("cpu"),
    )


def speed(stream: TokenStream, block_size: int, tokens: int) -> float:
    """Measure tokens per second."""
    before, read = time.perf_counter(), 0
    with batches(stream, block_size, tokens) as loader:
        for _, inputs, _ in loader:
            read += inputs.numel()
    return read / (time.perf_counter() - before)


def resident() -> tuple[float, float]:
    """Return MB of anonymous memory and of mapped files of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return kib["RssAnon"] / 1024, kib["RssFile"] / 1024


def memory(stream: TokenStream, tokens: int) -> None:
    """Print the resident set while ``tokens`` tokens are read."""
    samples = [(0.0, *resident())]
    # Other processes need the page cache, too: drop what was read from time to time.
    files = [os.open(stream.folder / shard.name, os.O_RDONLY) for shard in stream.shards]
    with batches(stream, 1024, tokens) as loader:
        for number, (_, inputs, _) in enumerate(loader, 1):
            if number % 100 == 0:
                samples.append((number * inputs.numel() / 1e9, *resident()))
            if number % 2000 == 0:  # about 4 GB, with the kernel's read-ahead around each window
                for file in files:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    print(f"{'tokens read':>12} {'anonymous':>12} {'mapped':>9}")
    for read, anonymous, mapped in samples[:: max(1, len(samples) // 8)]:
        print(f"{read:>10.2f} G {anonymous:>9.0f} MB {mapped:>6.0f} MB")
    halves = np.array_split(np.array([a + m for _, a, m in samples[1:]]), 2)
    print(
        f"peak in the first half {halves[0].max():.0f} MB, in the second {halves[1].max():.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loader", description=__doc__)
    parser.add_argument(
        "--gb", type=float, default=20, help="size of the sparse shards (default 20)"
    )
    parser.add_argument(
        "--part", type=float, default=0.02, help="fraction of an epoch to read (default 0.02)"
    )
    parser.add_argument("--folder", type=Path, help="for the shards, on a disk with sparse files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        stream = write_folder(Path(name), 20, 10_000_000, sparse=False)
        for block_size in (1024, 256, 128):
            runs = [speed(stream, block_size, 100_000_000) for _ in range(3)]
            print(
                f"block_size {block_size}: {statistics.median(runs) / 1e6:.0f} M tokens/s "
                f"({min(runs) / 1e6:.0f} to {max(runs) / 1e6:.0f})",
                flush=True,
            )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        stream = write_folder(Path(name), 100, int(args.gb * 1e9 / 2 / 100), sparse=True)
        print(f"{len(stream) / 1e9:.1f} G tokens in {len(stream.shards)} sparse shards:")
        memory(stream, int(args.part * len(stream)))


if __name__ == "__main__":
    main()
