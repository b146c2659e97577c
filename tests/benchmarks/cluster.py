"""Cost of a cluster's driver, and limits of a cluster: `python -m tests.benchmarks.cluster`.

- `chunks`: many tiny chunks on a local Ray, with `data: shared` or `--data ship`: the driver's CPU
  time per chunk, its resident memory, and the size of Ray's object store.
- `ship`: speed of one process at reading and packing text, unpacking, encoding, receiving pieces.
- `table`: an extrapolation by `Plan` from the measured inputs, which are arguments.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from pipeline.download.sample import write_sample
from pipeline.format.manifest import RawManifest
from pipeline.format.parquet import read_batches
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.runtime.progress import Progress
from pipeline.store.store import Store
from pipeline.tokenize import ship_chunks
from pipeline.tokenize.chunk_plan import plan_chunks
from pipeline.tokenize.encode_chunk import chunk_key, encode_chunk, write_piece
from pipeline.tokenize.stage import tokenize
from tests.support.small_data import write_raw

MB = 1e6

# English web text. FineWeb's sample-10BT: 15 files of 2.15 GB, 10.3 billion tokens.
BYTES_PER_TOKEN = 4.5
# Bytes per byte of text: parquet (zstd), tokens (uint16), and Arrow for `ship` (lz4, measured).
PARQUET = 15 * 2.15e9 / 10.3e9 / BYTES_PER_TOKEN
TOKENS = 2 / BYTES_PER_TOKEN
PACKED = 0.65
# Where parquet and tokens are stored.
STORED_ON = {"shared": "storage", "ship": "disk"}


def chunks(count: int, data: Any) -> None:
    """Measure the driver's cost of ``count`` chunks of one short document each."""
    texts = [f"Document {i} of many. " + "All men are created equal. " * 160 for i in range(count)]
    samples: list[tuple[int, float, float, float]] = []
    advance, seen, measuring = Progress.advance, 0, 0.0

    def measured(self: Progress, units: int, note: str = "") -> None:
        nonlocal seen, measuring
        advance(self, units, note)
        seen += units > 0
        if units and seen % (count // 10) == 0:
            begin = time.process_time()
            resident = psutil.Process().memory_info().rss / MB
            samples.append((seen, begin - measuring, resident, stored()))
            if seen == count // 10 * 9:
                check_meter()
            measuring += time.process_time() - begin

    Progress.advance = measured  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        raw = write_raw(Path(folder) / "raw", [texts])
        params = TokenizeParams(shard_tokens=1000, val_per_10k=20)
        begin, wall = time.process_time(), time.monotonic()
        machine = Machine(work_dir=Path(folder) / "work", data=data)
        manifest = tokenize(raw, Path(folder) / "tokens", params, machine, "benchmark")
        parts = sum(len(shard.parts) for shard in manifest.shards)
        used = time.process_time() - begin - measuring
        print(f"\n{parts} chunks in {time.monotonic() - wall:.1f} s with data: {data}")
        (first, cpu_first, *_), (last, cpu_last, *_) = samples[0], samples[-1]
        print(
            f"driver: {1e3 * (cpu_last - cpu_first) / (last - first):.2f} ms of CPU per chunk "
            f"while they run; {1e3 * used / parts:.2f} ms for the complete stage, with Ray's start"
        )
        for done, _, memory, store in samples:
            print(f"  {done:5} done: driver {memory:.0f} MB resident, object store {store:.2f} MB")


def stored() -> float:
    """Return the MB in the cluster's object stores, as reported by the nodes."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    name = "object_store_memory"
    return float(total[name] - free.get(name, 0.0)) / MB


def check_meter() -> None:
    """Print what `stored` reports with and without an object of 10 MB."""
    import ray

    held = ray.put(np.zeros(10_000_000, np.uint8))
    time.sleep(3)  # nodes report from time to time
    reported = stored()
    del held
    time.sleep(3)
    print(f"object store: {reported:.1f} MB with an object of 10 MB, {stored():.1f} MB without")


def rates(megabytes: int) -> None:
    """Measure one process on ``megabytes`` of the sample's text, repeated."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in write_sample(folder, None):
            pass
        paths = sorted(folder.glob("*.parquet"))

        def batches() -> Iterator[tuple[int, Any]]:
            size = 0
            while size < megabytes * MB:
                for path in paths:
                    for row, texts in read_batches(path, "text", 0, 10**9):
                        size += texts.nbytes
                        yield row, texts

        text = sum(texts.nbytes for _, texts in batches()) / MB
        decoded = timed(lambda: sum(1 for _ in batches()))
        packed = list(ship_chunks.pack(batches(), ship_chunks.BLOCK_BYTES))
        size = sum(map(len, packed)) / MB
        packing = timed(
            lambda: sum(1 for _ in ship_chunks.pack(batches(), ship_chunks.BLOCK_BYTES))
        )
        unpacking = timed(lambda: sum(1 for _ in ship_chunks.unpack(iter(packed), 0)))
        print(f"{text:.0f} MB of text, {size:.0f} MB packed ({text / size:.2f} to 1)")
        print(f"read parquet:           {text / decoded:7.0f} MB/s of text")
        print(f"read parquet and pack:  {text / packing:7.0f} MB/s of text")
        print(f"unpack:                 {text / unpacking:7.0f} MB/s of text")
        encoding(paths, folder)


def encoding(paths: list[Path], folder: Path) -> None:
    """Measure a task, and the driver's work when it receives the piece."""
    texts = [t for p in paths for _, b in read_batches(p, "text", 0, 10**9) for t in b.to_pylist()]
    raw = write_raw(folder / "raw", [8 * texts], group=25)  # one chunk of about 20M tokens
    source = RawManifest.load(raw)
    params = TokenizeParams(shard_tokens=20_000_000, val_per_10k=20)
    store, taken = Store(folder / "one"), Store(folder / "two")
    seconds = receiving = 0.0
    text = 0
    for chunk in plan_chunks(raw, source, params.shard_tokens):
        key = chunk_key(chunk, "text", params, "benchmark")
        begin = time.perf_counter()
        record = encode_chunk(chunk, key, raw, "text", params, store)
        seconds += time.perf_counter() - begin
        text += sum(facts["text_bytes"] for facts in record["splits"].values())
        scratch = folder / key
        scratch.mkdir()
        found = read_batches(raw / chunk.file.path, "text", chunk.start, chunk.stop)
        write_piece(found, chunk, key, params, scratch)
        blocks = [
            (path.name, block)
            for path in sorted(scratch.iterdir())
            for block in ship_chunks.file_blocks(path, ship_chunks.BLOCK_BYTES)
        ]
        begin = time.perf_counter()
        ship_chunks.receive(iter(blocks), key, taken)
        receiving += time.perf_counter() - begin
    print(f"encode (a task):        {text / MB / seconds:7.1f} MB/s of text")
    print(f"receive (the driver):   {text / MB / receiving:7.0f} MB/s of text")


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Plan:
    """Measured or assumed rates of a cluster, and the rates of the stages in MB/s of text.

    A stage is as fast as its slowest component: each method returns the rate of every component
    alone. Per byte of text a component moves the bytes of parquet, tokens or packed text.
    """

    core: float
    """MB/s of text tokenized per core."""
    check: float
    """MB/s of text verified per core, parquet and shards."""
    cores: int
    """Cores per node."""
    network: float
    """MB/s of a node's network in each direction."""
    storage: float
    """MB/s of the shared storage for all nodes together."""
    disk: float
    """MB/s of the driver's disk, with `ship`."""
    hub: float
    """MB/s of the hub, or a mirror of it, for all nodes together."""
    read: float
    """MB/s of text read and packed per core of the driver, with `ship`."""
    take_in: float
    """MB/s of text whose tokens the driver's only thread receives, with `ship`."""
    driver_ms: float
    """CPU milliseconds of the driver per chunk, with `shared`."""
    shard_tokens: float
    """Tokens per chunk."""
    dvc: float
    """MB/s that DVC hashes on one machine after a stage."""

    def download(self, nodes: int, data: str) -> dict[str, float]:
        """Rates of downloading parquet from the hub and storing it."""
        machines, rate = (nodes, self.storage) if data == "shared" else (1, self.disk)
        return {
            "hub": self.hub / PARQUET,
            "network": machines * self.network / PARQUET,
            STORED_ON[data]: rate / PARQUET,
        }

    def tokenize(self, nodes: int, data: str) -> dict[str, float]:
        """Rates of tokenizing; with `ship` the driver's machine is one of the nodes."""
        cores = nodes * self.cores * self.core
        if data == "shared":
            return {
                "cores": cores,
                "network": nodes * self.network / PARQUET,
                "storage": self.storage / (PARQUET + TOKENS),
                "driver": self.shard_tokens * BYTES_PER_TOKEN / MB / (self.driver_ms / 1e3),
            }
        return {
            "cores": cores,
            "network": self.network / PACKED,
            "disk": self.disk / (PARQUET + TOKENS),
            "driver": min(self.cores * self.read, self.take_in),
        }

    def verify(self, nodes: int, data: str) -> dict[str, float]:
        """Rates of verifying parquet and tokens where they are stored."""
        machines, rate = (nodes, self.storage) if data == "shared" else (1, self.disk)
        limits = {
            "cores": machines * self.cores * self.check,
            STORED_ON[data]: rate / (PARQUET + TOKENS),
        }
        if data == "shared":
            limits["network"] = nodes * self.network / (PARQUET + TOKENS)
        return limits

    def commit(self) -> float:
        """Rate at which DVC hashes data/tokens; of data/raw it keeps the manifest."""
        return self.dvc / TOKENS


def table(plan: Plan) -> None:
    """Print the extrapolation as a Markdown table."""
    print("| tokens | nodes | data | download | tokenize | verify | DVC hashes |")
    print("|---|---|---|---|---|---|---|")
    for name, tokens in (("10BT", 10.3e9), ("350BT", 350e9), ("15T", 15e12)):
        text = tokens * BYTES_PER_TOKEN / MB
        for nodes in (1, 16, 256):
            for data in ("shared", "ship"):
                cells = [name, str(nodes), data]
                for stage in (plan.download, plan.tokenize, plan.verify):
                    limits = stage(nodes, data)
                    least = min(limits, key=lambda key: limits[key])
                    cells.append(f"{span(text / limits[least])}, {least}")
                print(f"| {' | '.join(cells)} | {span(text / plan.commit())} |")


def span(seconds: float) -> str:
    """Format seconds in a readable unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cluster", description=__doc__)
    parser.add_argument("what", nargs="*", choices=["chunks", "ship", "table", []])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--data", choices=["shared", "ship"], default="shared")
    parser.add_argument("--mb", type=int, default=150)
    inputs = {
        "core": 150.0, "check": 290.0, "cores": 32, "network": 3000.0, "storage": 10_000.0,
        "disk": 1000.0, "hub": 1500.0, "read": 200.0, "take_in": 500.0, "driver_ms": 1.9,
        "shard_tokens": 20e6, "dvc": 770.0,
    }  # fmt: skip
    for key, default in inputs.items():
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, dest=key, type=type(default), default=default)
    args = parser.parse_args()
    what = args.what or ["chunks", "ship", "table"]
    if "chunks" in what:
        chunks(args.count, args.data)
    if "ship" in what:
        rates(args.mb)
    if "table" in what:
        table(Plan(**{key: getattr(args, key) for key in inputs}))


if __name__ == "__main__":
    main()
