"""Chunks encoded on nodes that share no file with the driver: text goes out, pieces come in.

```
 driver's node                                  a node of the cluster
 driver: encode_shipped(chunk) ───────────────► worker: read_packed(chunk) ┐ its own task,
 ┌─────────────────────────────────────────────────────────────────────────┘ on the driver's node
 └► reader: parquet ─► Arrow IPC, lz4 ─ blocks ► worker: write_piece, in a folder of its own
 driver: receive, into the store ◄───── blocks ─ worker: the piece's files
```

Both ways are streams that wait: a reader decodes no further while `_AHEAD` blocks lie unread, and a
worker sends no further while `_AHEAD` blocks are not taken in. A block is an object of its own in
Ray's object store, and is freed when it is read. So the bytes on their way are bounded by the tasks
that run, and nothing is spilled. What is lost is done again from the file.
"""

import functools
import io
import shutil
import tempfile
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
from pipeline.store.store import Store
from pipeline.tokenize import engines
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.encode_chunk import ENGINE, RECORD, Record, make_piece, read_record

# The blocks are this long, or shorter where the object stores are small.
BLOCK_BYTES = 4 * 2**20
_LEAST_BYTES = 64 * 2**10
_AHEAD = 2
# Of a task at a time, on its way out: blocks unread, one being read, one being made.
_BLOCKS_HERE = _AHEAD + 2
# And where it runs: the one being read, and as many on their way back.
_BLOCKS_THERE = _AHEAD + 3


@dataclass(frozen=True)
class Origin:
    """Where a task's text comes from."""

    node: str
    """The id of the driver's node."""
    raw: Path
    """The folder of the source files there."""
    column: str
    block_bytes: int


def encode_chunks(tasks: Sequence[tuple[Any, ...]], **how: Any) -> Iterator[tuple[int, Record]]:
    """`run_tasks` of `encode_chunk` where the nodes see neither the source nor the store.

    Args:
        tasks: the arguments of `encode_chunk`.
        how: further arguments of `run_tasks`.

    Yields:
        The index of a finished chunk, and its record.
    """
    import ray

    home = ray.get_runtime_context().get_node_id()
    block_bytes, in_flight = budget(ray.nodes(), home)

    def collect(index: int, blocks: Iterator[tuple[str, np.ndarray]]) -> Record:
        _, key, _, _, _, store, *_ = tasks[index]
        return receive(blocks, key, store)

    shipped = [
        (chunk, key, Origin(home, raw, column, block_bytes), params, *engine)
        for chunk, key, raw, column, params, _, *engine in tasks
    ]
    yield from run_tasks(encode_shipped, shipped, in_flight, "tokenize", collect=collect, **how)


def budget(nodes: Sequence[dict[str, Any]], home: str) -> tuple[int, int]:
    """How long a block may be, and how many tasks may be sent text at a time.

    What is on its way takes at most half of any node's object store, for each of its CPUs may run a
    task; the driver's is shared by all tasks.

    Args:
        nodes: as `ray.nodes()` describes them.
        home: the id of the driver's.
    """
    block_bytes = BLOCK_BYTES
    at_home = 0
    for node in nodes:
        if node["Alive"]:
            store = int(node["Resources"].get("object_store_memory", 0))
            if cpus := int(node["Resources"].get("CPU", 0)):
                block_bytes = min(block_bytes, store // 2 // (cpus * _BLOCKS_THERE))
            if node["NodeID"] == home:
                at_home = store
    block_bytes = max(block_bytes, _LEAST_BYTES)
    return block_bytes, max(1, at_home // 2 // (_BLOCKS_HERE * block_bytes))


def encode_shipped(
    chunk: Chunk,
    key: str,
    origin: Origin,
    params: TokenizeParams,
    engine: engines.Name,
    check_fraction: float,
) -> Iterator[tuple[str, np.ndarray]]:
    """A task: fetch a chunk's text from the driver's node, encode it, send the piece's files.

    Yields:
        Name of a file and (n,) uint8, its next bytes; the record is the last.
    """
    # What a killed worker leaves on this node's disk, the next one removes.
    local = Store(Path(tempfile.gettempdir()) / "gpt2-shipped")
    local.sweep()
    with local.lock("shipped", key):
        folder = local.folder("tmp", f"shipped-{key}")
        try:
            read = functools.partial(fetch_batches, chunk, origin)
            make_piece(read, chunk, key, params, folder, engine, check_fraction)
            names = sorted(p.name for p in folder.iterdir() if p.name != RECORD)
            for name in (*names, RECORD):
                for block in file_blocks(folder / name, origin.block_bytes):
                    yield name, block
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def fetch_batches(chunk: Chunk, origin: Origin) -> Iterator[tuple[int, pa.Array]]:
    """In a task: a chunk's text, as it comes from the driver's node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {
        "num_cpus": 0,  # it waits most of the time, and a head often offers none
        "num_returns": "streaming",
        "_generator_backpressure_num_objects": _AHEAD,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(origin.node, soft=False),
    }
    reader: Any = ray.remote(**options)(read_packed).options(name=f"read {chunk.label}")
    return unpack(map(ray.get, reader.remote(chunk, origin)), chunk.start)


def file_blocks(path: Path, block_bytes: int) -> Iterator[np.ndarray]:
    """The bytes of a file: (n,) uint8, n at most ``block_bytes``."""
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, np.uint8, block_bytes)):
            yield block


def read_packed(chunk: Chunk, origin: Origin) -> Iterator[np.ndarray]:
    """A task on the driver's node: a chunk's text, packed."""
    path = origin.raw / chunk.file.path
    yield from pack(read_batches(path, origin.column, chunk.start, chunk.stop), origin.block_bytes)


def pack(batches: Iterable[tuple[int, pa.Array]], block_bytes: int) -> Iterator[np.ndarray]:
    """One Arrow IPC stream of lz4-compressed batches, cut anywhere into blocks.

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
            rest = sink.getvalue()
            whole = len(rest) // block_bytes * block_bytes
            yield from _cut(rest[:whole], block_bytes)
            sink.seek(0)
            sink.truncate()
            sink.write(rest[whole:])
    if writer is not None:
        writer.close()
        yield from _cut(sink.getvalue(), block_bytes)


def _cut(data: bytes, block_bytes: int) -> Iterator[np.ndarray]:
    for start in range(0, len(data), block_bytes):
        yield np.frombuffer(data[start : start + block_bytes], np.uint8)


def unpack(blocks: Iterator[np.ndarray], start: int) -> Iterator[tuple[int, pa.Array]]:
    """What `pack` packed: batches, each with the number of its first row.

    Args:
        blocks: each is let go when it is read.
        start: the number of the first row of all.
    """
    first = next(blocks, None)
    if first is None:
        return
    with pa.ipc.open_stream(pa.PythonFile(_Blocks(first, blocks), "r")) as stream:
        for batch in stream:
            yield start, batch.column(0)
            start += batch.num_rows


class _Blocks(io.RawIOBase):
    """A file of blocks that come one by one."""

    def __init__(self, first: np.ndarray, rest: Iterator[np.ndarray]) -> None:
        self._block, self._rest = first.data, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(target):
            if not self._block:
                self._block = memoryview(b"")  # let go before the next one is waited for
                following = next(self._rest, None)
                if following is None:
                    break
                self._block = following.data
            count = min(len(target) - filled, len(self._block))
            target[filled : filled + count] = self._block[:count]
            self._block = self._block[count:]
            filled += count
        return filled


def receive(blocks: Iterator[tuple[str, np.ndarray]], key: str, store: Store) -> Record:
    """Take a piece into the store; the record of the piece.

    Raises:
        TaskError: the files are not those that the record tells of.
    """
    with store.lock("chunks", key):
        if (folder := store.find("chunks", key)) is None:
            hashes: dict[str, str] = {}
            with store.make("chunks", key, hashes) as folder:
                hashes |= _write(blocks, folder)
                _check(hashes, folder, key)
            folder = store.root / "chunks" / key
    return read_record(folder)


def _write(blocks: Iterator[tuple[str, np.ndarray]], folder: Path) -> dict[str, str]:
    """Write files as they come, one after another; the sha256 of each."""
    digests: dict[str, Any] = {}
    for name, block in blocks:
        with open(folder / name, "ab") as file:
            file.write(block.data)
        digests.setdefault(name, sha256()).update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _check(hashes: dict[str, str], folder: Path, key: str) -> None:
    if RECORD not in hashes:
        raise TaskError("the piece came without its record")
    record, told = read_record(folder), {name: hashes.get(name) for name in (RECORD, ENGINE)}
    for split, facts in record["splits"].items():
        told |= {f"{split}.bin": facts["sha256"], f"{split}.docs.npy": facts["docs_sha256"]}
    if record["chunk_key"] != key or told != hashes:
        raise TaskError("the files that came are not those that the record tells of")
