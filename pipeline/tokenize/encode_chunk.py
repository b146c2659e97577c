"""Encode one chunk of text into one piece of tokens: the work of a Ray task.

A document belongs to validation if ``xxh3_64(text) mod 10000 < val_per_10k``. The split depends on
the content alone, so copies of a text never end up in both splits.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.format import tokenizer
from pipeline.format.manifest import SPLITS, Split
from pipeline.format.parquet import read_batches
from pipeline.format.shards import ShardWriter
from pipeline.params import TokenizeParams
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize import engines
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.chunk_record import (
    ENGINE,
    Record,
    build_piece,
    content_sum,
    split_facts,
    write_record,
)
from pipeline.tokenize.encode_batch import Encoded, EngineMismatch, EngineReport, encode_batch

CHECK_FRACTION = 0.002
"""Fraction of the fast engine's documents that the reference encodes as well."""


def chunk_key(chunk: Chunk, column: str, params: TokenizeParams, code_key: str) -> str:
    """Hash what decides a chunk's bytes: its text, the tokenizer, the parameters and the code.

    The key of a chunk of which all rows are kept does not depend on the selection. No key depends
    on the file's path, to which a second source adds a folder.
    """
    kept = {} if chunk.bits is None else {"kept": sha256(chunk.bits).hexdigest()}
    return atomic.sha256_json(
        {
            "file": chunk.file.sha256,
            "source": chunk.file.source,  # the record names it
            "file_index": chunk.file_index,
            "rows": [chunk.start, chunk.stop],
            "column": column,
            "ranks": tokenizer.RANKS_SHA256,
            "val_per_10k": hashed_per_10k(params),
            "code": code_key,
            **kept,
        }
    )


def hashed_per_10k(params: TokenizeParams) -> int:
    """Return the share of documents that their hash sends to validation, per 10,000.

    0 if the split is by position: `split_by_position` makes it when all chunks are encoded.
    """
    return params.val_per_10k if params.val_split == "documents" else 0


def split_of(text: bytes, val_per_10k: int) -> Split:
    """Return the split of a document, decided by a hash of its UTF-8 bytes."""
    return "val" if xxhash.xxh3_64_intdigest(text) % 10_000 < val_per_10k else "train"


def encode_chunk(
    chunk: Chunk,
    key: str,
    raw: Path,
    column: str,
    params: TokenizeParams,
    store: Store,
    engine: engines.Name = "gigatoken",
    check_fraction: float = CHECK_FRACTION,
) -> Record:
    """Build a chunk's piece in the store, unless it is already there; return its record."""

    def read() -> Iterable[tuple[int, pa.Array]]:
        return read_batches(raw / chunk.file.path, column, chunk.start, chunk.stop)

    def build(folder: Path) -> dict[str, str]:
        return write_checked_piece(read, chunk, key, params, folder, engine, check_fraction)

    return build_piece(store, key, build)


def write_checked_piece(
    read: Callable[[], Iterable[tuple[int, pa.Array]]],
    chunk: Chunk,
    key: str,
    params: TokenizeParams,
    folder: Path,
    engine: engines.Name,
    check_fraction: float,
) -> dict[str, str]:
    """Call `write_piece`; if the engines differ on a document, again with tiktoken alone.

    Args:
        read: Returns the batches of the chunk, from the first one on each call.
    """
    try:
        return write_piece(read(), chunk, key, params, folder, engine, check_fraction)
    except EngineMismatch as mismatch:
        rows = [mismatch.row]
        return write_piece(read(), chunk, key, params, folder, "tiktoken", differences=rows)


def write_piece(
    batches: Iterable[tuple[int, pa.Array]],
    chunk: Chunk,
    key: str,
    params: TokenizeParams,
    folder: Path,
    engine: engines.Name = "gigatoken",
    check_fraction: float = CHECK_FRACTION,
    differences: Sequence[int] = (),
) -> dict[str, str]:
    """Write a chunk's piece into a folder, from text that may come from anywhere.

    Args:
        batches: The chunk's rows in order: the number of a batch's first row, and its texts.
        folder: Files in it are overwritten.
        differences: Rows on which the engines differed in an earlier call, for `engine.json`.

    Returns:
        The sha256 of the shards and document indexes, which `Store.make` need not compute again.

    Raises:
        EngineMismatch: The engines differ on a document. Call again with engine tiktoken.
    """
    fast = engines.fast() if engine == "gigatoken" else None
    report = EngineReport(differences=list(differences))
    skipped: Counter[str] = Counter()
    splits = {split: _SplitWriter(ShardWriter(folder / f"{split}.bin")) for split in SPLITS}
    kept = chunk.kept()
    try:
        for first_row, texts in batches:
            first = first_row - chunk.start
            keep = None if kept is None else kept[first : first + len(texts)]
            encoded = encode_batch(first_row, texts, fast, check_fraction, report, keep)
            skipped += encoded.skipped
            val = encoded.hashes % np.uint64(10_000) < hashed_per_10k(params)
            splits["train"].add(encoded, ~val, chunk.file_index)
            splits["val"].add(encoded, val, chunk.file_index)
    except EngineMismatch:
        for split in splits.values():
            split.shard.abandon()
        raise
    found = {name: facts for name, split in splits.items() if (facts := split.close())}
    write_record(folder, chunk, key, skipped, found)
    (folder / ENGINE).write_bytes(atomic.json_bytes(vars(report)))
    hashes = {f"{name}.bin": facts["sha256"] for name, facts in found.items()}
    return hashes | {f"{name}.docs.npy": facts["docs_sha256"] for name, facts in found.items()}


class _SplitWriter:
    """Writes the documents of one split of a chunk, and collects its part of the record."""

    def __init__(self, shard: ShardWriter) -> None:
        self.shard = shard
        self.text_bytes = 0
        self.content = 0
        self.lengths: list[np.ndarray] = []

    def add(self, encoded: Encoded, mask: np.ndarray, file_index: int) -> None:
        """Append the documents selected by the (d,) bool mask."""
        # Append runs of neighbours: their tokens are one slice.
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        for first, last in edges.reshape(-1, 2).tolist():
            starts, rows = encoded.starts[first : last + 1], encoded.rows[first:last]
            docs = np.column_stack([starts[:-1] - starts[0], rows])
            self.shard.append(encoded.tokens[starts[0] : starts[-1]], docs)
            self.content += content_sum(file_index, rows.tolist(), encoded.tokens, starts.tolist())
        self.text_bytes += int(encoded.text_bytes[mask].sum())
        self.lengths.append(np.diff(encoded.starts)[mask])

    def close(self) -> dict[str, Any] | None:
        """Finish the shard; return the split's part of the record, or None without documents."""
        self.shard.close()
        if not self.shard.tokens:
            return None
        path, lengths = self.shard.path, np.concatenate(self.lengths)
        sha256, tokens = atomic.sha256_file(path), self.shard.tokens
        return split_facts(path, sha256, tokens, self.text_bytes, self.content, lengths)
