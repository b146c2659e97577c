"""Encode chunks on nodes that share no files with the driver: send text, receive pieces.

```
 driver's node                                  a node of the cluster
 driver: encode_shipped(chunk) ───────────────► worker: read_packed(chunk) ┐ its own task,
 ┌─────────────────────────────────────────────────────────────────────────┘ on the driver's node
 └► reader: parquet ─► Arrow IPC, lz4 ─ blocks ► worker: write_piece, in a folder of its own
 driver: receive, into the store ◄───── blocks ─ worker: the piece's files
```

Both directions are streams with backpressure: a reader stops decoding while `_AHEAD` blocks are
unread, and a worker stops sending while `_AHEAD` blocks are not received. Each block is an object
in Ray's object store, freed when it is read. So the number of running tasks bounds the bytes in
flight, and nothing is spilled to disk. A lost task starts again from the source file.
"""

import functools
import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cluster.tasks import TaskError, run_tasks
from pipeline.format.parquet import read_batches
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import private_folder
from pipeline.store.store import Store
from pipeline.tokenize import engines
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.chunk_record import ENGINE, RECORD, Record, build_piece, read_record
from pipeline.tokenize.encode_chunk import write_checked_piece

BLOCK_BYTES = 4 * 2**20  # shorter where an object store is small
_MIN_BLOCK_BYTES = 64 * 2**10
_AHEAD = 2
# Per task on the driver's node: the unread blocks, one being read, one being written.
_HOME_BLOCKS = _AHEAD + 2
# Per task on its own node: one being read, and the blocks on their way back.
_WORKER_BLOCKS = _AHEAD + 3


@dataclass(frozen=True)
class Origin:
    """The source of a task's text."""

    node: str
    """The ID of the driver's node."""
    raw: Path
    """The folder of the source files on that node."""
    column: str
    block_bytes: int


def encode_chunks(tasks: Sequence[tuple[Any, ...]], **options: Any) -> Iterator[tuple[int, Record]]:
    """Run `encode_chunk` as tasks on nodes that can read neither the source nor the store.

    Args:
        tasks: The arguments of `encode_chunk` for each chunk.
        options: Further arguments of `run_tasks`.

    Yields:
        The index of a finished chunk, and its record.
    """
    import ray

    home = ray.get_runtime_context().get_node_id()
    block_bytes, in_flight = block_limits(ray.nodes(), home)

    def collect(index: int, blocks: Iterator[tuple[str, np.ndarray]]) -> Record:
        _, key, _, _, _, store, *_ = tasks[index]
        return receive(blocks, key, store)

    shipped = [
        (chunk, key, Origin(home, raw, column, block_bytes), params, *engine)
        for chunk, key, raw, column, params, _, *engine in tasks
    ]
    yield from run_tasks(encode_shipped, shipped, in_flight, "tokenize", collect=collect, **options)


def block_limits(nodes: Sequence[dict[str, Any]], home: str) -> tuple[int, int]:
    """Return the largest block size in bytes, and the largest number of tasks in flight.

    Blocks take at most half of any node's object store. Each CPU of a node may run a task; the
    driver's node holds blocks of all tasks.

    Args:
        nodes: The nodes as described by `ray.nodes()`.
        home: The ID of the driver's node.
    """
    block_bytes = BLOCK_BYTES
    home_store = 0
    for node in nodes:
        if node["Alive"]:
            store = int(node["Resources"].get("object_store_memory", 0))
            if cpus := int(node["Resources"].get("CPU", 0)):
                block_bytes = min(block_bytes, store // 2 // (cpus * _WORKER_BLOCKS))
            if node["NodeID"] == home:
                home_store = store
    block_bytes = max(block_bytes, _MIN_BLOCK_BYTES)
    return block_bytes, max(1, home_store // 2 // (_HOME_BLOCKS * block_bytes))


def encode_shipped(
    chunk: Chunk,
    key: str,
    origin: Origin,
    params: TokenizeParams,
    engine: engines.Name,
    check_fraction: float,
) -> Iterator[tuple[str, np.ndarray]]:
    """Fetch a chunk's text from the driver's node, encode it, and send the piece's files: a task.

    Yields:
        A file's name and its next bytes, (n,) uint8; the record comes last.
    """
    # Remove leftovers of killed workers from this node's disk.
    local = Store(private_folder() / "shipped")
    local.sweep()
    with local.lock("shipped", key):
        folder = local.folder("tmp", f"shipped-{key}")
        try:
            read = functools.partial(fetch_batches, chunk, origin)
            write_checked_piece(read, chunk, key, params, folder, engine, check_fraction)
            names = sorted(p.name for p in folder.iterdir() if p.name != RECORD)
            for name in (*names, RECORD):
                for block in file_blocks(folder / name, origin.block_bytes):
                    yield name, block
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def fetch_batches(chunk: Chunk, origin: Origin) -> Iterator[tuple[int, pa.Array]]:
    """Receive a chunk's text from the driver's node, within a task."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {
        "num_cpus": 0,  # it mostly waits, and a head node often offers no CPU
        "num_returns": "streaming",
        "_generator_backpressure_num_objects": _AHEAD,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(origin.node, soft=False),
    }
    reader: Any = ray.remote(**options)(read_packed).options(name=f"read {chunk.label}")
    return unpack(map(ray.get, reader.remote(chunk, origin)), chunk.start)


def file_blocks(path: Path, block_bytes: int) -> Iterator[np.ndarray]:
    """Read a file in blocks: (n,) uint8, n at most ``block_bytes``."""
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, np.uint8, block_bytes)):
            yield block


def read_packed(chunk: Chunk, origin: Origin) -> Iterator[np.ndarray]:
    """Read and pack a chunk's text: a task on the driver's node."""
    path = origin.raw / chunk.file.path
    yield from pack(read_batches(path, origin.column, chunk.start, chunk.stop), origin.block_bytes)


def pack(batches: Iterable[tuple[int, pa.Array]], block_bytes: int) -> Iterator[np.ndarray]:
    """Write batches as one lz4-compressed Arrow IPC stream, cut into blocks.

    Yields:
        (n,) uint8, n at most ``block_bytes``.
    """
    sink = io.BytesIO()
    writer = None
    for _, texts in batches:
        batch = pa.record_batch([texts], ["text"])
        if writer is None:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            writer = pa.ipc.new_stream(sink, batch.schema, options=options)
        writer.write_batch(batch)
        if sink.tell() >= block_bytes:
            data = sink.getvalue()
            full = len(data) // block_bytes * block_bytes
            yield from _cut(data[:full], block_bytes)
            sink.seek(0)
            sink.truncate()
            sink.write(data[full:])
    if writer is not None:
        writer.close()
        yield from _cut(sink.getvalue(), block_bytes)


def _cut(data: bytes, block_bytes: int) -> Iterator[np.ndarray]:
    for start in range(0, len(data), block_bytes):
        yield np.frombuffer(data[start : start + block_bytes], np.uint8)


def unpack(blocks: Iterator[np.ndarray], start: int) -> Iterator[tuple[int, pa.Array]]:
    """Read batches back from the blocks of `pack`.

    Args:
        blocks: The blocks; each is released once it is read.
        start: The number of the first row.

    Yields:
        The number of a batch's first row, and its texts.
    """
    first = next(blocks, None)
    if first is None:
        return
    with pa.ipc.open_stream(pa.PythonFile(_BlockReader(first, blocks), "r")) as stream:
        for batch in stream:
            yield start, batch.column(0)
            start += batch.num_rows


class _BlockReader(io.RawIOBase):
    """A file-like reader over an iterator of blocks."""

    def __init__(self, first: np.ndarray, rest: Iterator[np.ndarray]) -> None:
        self._block, self._rest = first.data, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(target):
            if not self._block:
                self._block = memoryview(b"")  # release it before waiting for the next one
                block = next(self._rest, None)
                if block is None:
                    break
                self._block = block.data
            count = min(len(target) - filled, len(self._block))
            target[filled : filled + count] = self._block[:count]
            self._block = self._block[count:]
            filled += count
        return filled


def receive(blocks: Iterator[tuple[str, np.ndarray]], key: str, store: Store) -> Record:
    """Write a received piece into the store, and return its record.

    Raises:
        TaskError: The files do not match the record.
    """

    def build(folder: Path) -> dict[str, str]:
        hashes = _write_files(blocks, folder)
        _check_files(hashes, folder, key)
        return hashes

    return build_piece(store, key, build)


def _write_files(blocks: Iterator[tuple[str, np.ndarray]], folder: Path) -> dict[str, str]:
    """Write files from their blocks, one after another; return their sha256."""
    digests: dict[str, Any] = {}
    for name, block in blocks:
        with open(folder / name, "ab") as file:
            file.write(block.data)
        digests.setdefault(name, sha256()).update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _check_files(hashes: dict[str, str], folder: Path, key: str) -> None:
    if RECORD not in hashes:
        raise TaskError(f"chunk {key[:12]} was received without its record")
    record, expected = read_record(folder), {name: hashes.get(name) for name in (RECORD, ENGINE)}
    for split, facts in record["splits"].items():
        expected |= {f"{split}.bin": facts["sha256"], f"{split}.docs.npy": facts["docs_sha256"]}
    if record["chunk_key"] != key or expected != hashes:
        raise TaskError(f"the files received for chunk {key[:12]} do not match its record")
