"""One chunk of text to one piece of tokens: the work of a tokenize task.

A document is `<|endoftext|>` and its tokens. It belongs to validation where
``xxh3_64(text) mod 10000 < val_per_10k``: by content, so copies of a text never straddle the split.

A piece holds, for each split that has documents, `<split>.bin` and `<split>.docs.npy`, and
`record.json`: what went in, what came out, every hash, and the documents' statistics. Besides,
unpublished, for it says how the piece was made and not what it is: `engine.json`.

The **content sum** of a split is the sum mod 2^128 of xxh3_128 over the tokens of its documents,
seeded with where they stand in the source. A sum does not depend on the order or the cutting of
what is summed, so those of chunks add up to that of the dataset, whatever its shards look like.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.format import tokenizer
from pipeline.format.manifest import SPLITS, Split
from pipeline.format.parquet import read_batches
from pipeline.format.shards import TOKEN_DTYPE, ShardWriter
from pipeline.params import TokenizeParams
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize import engines
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.encode_batch import Differs, Encoded, Report, encode_batch

RECORD = "record.json"
ENGINE = "engine.json"

CHECK_FRACTION = 0.002
"""Of the fast engine's documents, the part that the reference encodes as well."""

Record = dict[str, Any]


def chunk_key(chunk: Chunk, column: str, params: TokenizeParams, code_key: str) -> str:
    """What decides a chunk's bytes: its text, the tokenizer, the parameters, the code."""
    return atomic.sha256_json(
        {
            "file": chunk.file.sha256,
            "path": chunk.file.path,  # the record names it
            "file_index": chunk.file_index,
            "rows": [chunk.start, chunk.stop],
            "column": column,
            "ranks": tokenizer.RANKS_SHA256,
            "val_per_10k": params.val_per_10k,
            "code": code_key,
        }
    )


def split_of(text: bytes, val_per_10k: int) -> Split:
    """The split that a document belongs to, by a hash of its UTF-8 bytes."""
    return "val" if xxhash.xxh3_64_intdigest(text) % 10_000 < val_per_10k else "train"


def content_hash(file_index: int, row: int, tokens: np.ndarray | memoryview) -> int:
    """xxh3_128 of a document's (n,) little-endian uint16 tokens, seeded with its file and row."""
    view = tokens if isinstance(tokens, memoryview) else np.ascontiguousarray(tokens).data
    return xxhash.xxh3_128_intdigest(view, file_index << 40 | row)


def content_sum(encoded: Encoded, mask: np.ndarray, file_index: int) -> int:
    """The sum of the content hashes of the documents of the (d,) bool mask."""
    starts, rows, view = encoded.starts.tolist(), encoded.rows.tolist(), encoded.tokens.data
    return sum(
        content_hash(file_index, rows[i], view[starts[i] : starts[i + 1]])
        for i in np.flatnonzero(mask).tolist()
    )


def length_bins(lengths: np.ndarray) -> dict[str, int]:
    """How many documents have so many tokens: (d,) int64 lengths, counted by powers of two.

    A bin is named by the power of two at or below the lengths in it.
    """
    powers = np.bincount(np.frexp(lengths)[1] - 1)
    return {str(1 << power): int(powers[power]) for power in np.flatnonzero(powers)}


def encode_text(text: str) -> np.ndarray:
    """A document: (n + 1,) uint16, `<|endoftext|>` and the text's n tokens, by the reference."""
    return np.array([tokenizer.EOT, *tokenizer.encode(text)], dtype=TOKEN_DTYPE)


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
    """Make a chunk's piece in the store, unless it stands there; return its record."""

    def read() -> Iterable[tuple[int, pa.Array]]:
        return read_batches(raw / chunk.file.path, column, chunk.start, chunk.stop)

    with store.lock("chunks", key):
        if (folder := store.find("chunks", key)) is None:
            hashes: dict[str, str] = {}
            with store.make("chunks", key, hashes) as folder:
                hashes |= make_piece(read, chunk, key, params, folder, engine, check_fraction)
            folder = store.root / "chunks" / key
    return read_record(folder)


def make_piece(
    read: Callable[[], Iterable[tuple[int, pa.Array]]],
    chunk: Chunk,
    key: str,
    params: TokenizeParams,
    folder: Path,
    engine: engines.Name,
    check_fraction: float,
) -> dict[str, str]:
    """`write_piece`, once more with engine tiktoken where the fast engine was wrong.

    Args:
        read: the batches of the chunk, from the first on, each time that it is called.
    """
    try:
        return write_piece(read(), chunk, key, params, folder, engine, check_fraction)
    except Differs as difference:
        row = difference.row
        return write_piece(read(), chunk, key, params, folder, "tiktoken", differs=row)


def write_piece(
    batches: Iterable[tuple[int, pa.Array]],
    chunk: Chunk,
    key: str,
    params: TokenizeParams,
    folder: Path,
    engine: engines.Name = "gigatoken",
    check_fraction: float = CHECK_FRACTION,
    differs: int | None = None,
) -> dict[str, str]:
    """Write a chunk's piece into a folder, wherever its text comes from.

    Args:
        batches: runs of the chunk's rows in order: the first one's number in the file, their texts.
        differs: the row for which the fast engine was given up, as `Differs` named it.

    Returns:
        The sha256 of the shards and sidecars, hashed here once, for `Store.make`.

    Raises:
        Differs: the fast engine was wrong: call again with the batches from the first on, with
            engine tiktoken; what is in the folder is overwritten.
    """
    fast = engines.fast() if engine == "gigatoken" else None
    report, skipped = Report(), Counter[str]()
    splits = {split: _Split(ShardWriter(folder / f"{split}.bin")) for split in SPLITS}
    try:
        for first_row, texts in batches:
            encoded = encode_batch(first_row, texts, fast, check_fraction, report)
            skipped += encoded.skipped
            val = encoded.hashes % np.uint64(10_000) < params.val_per_10k
            splits["train"].add(encoded, ~val, chunk.file_index)
            splits["val"].add(encoded, val, chunk.file_index)
    except Differs:
        for split in splits.values():
            split.shard.abandon()
        raise
    record: Record = {
        "chunk_key": key,
        "source": chunk.file.model_dump(),
        "rows": [chunk.start, chunk.stop],
        "skipped": dict(skipped),
        "splits": {name: facts for name, split in splits.items() if (facts := split.close())},
    }
    # Not synced one by one: whoever makes the folder a piece syncs all that is in it.
    (folder / RECORD).write_bytes(atomic.json_bytes(record))
    made = {
        "documents": dict(report.documents),
        "bytes": dict(report.bytes),
        "checked": report.checked,
        "differences": [] if differs is None else [differs],
    }
    (folder / ENGINE).write_bytes(atomic.json_bytes(made))
    return {
        name: facts[key]
        for split, facts in record["splits"].items()
        for name, key in ((f"{split}.bin", "sha256"), (f"{split}.docs.npy", "docs_sha256"))
    }


def read_record(folder: Path) -> Record:
    """The record of a piece."""
    record: Record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record


def read_engine(folder: Path) -> dict[str, Any]:
    """How a piece was made: documents and bytes by engine, those checked, rows that differed.

    Of one that was not encoded, for its tokens came as tokens: nothing.
    """
    if not (folder / ENGINE).exists():
        return {"documents": {}, "bytes": {}, "checked": 0, "differences": []}
    report: dict[str, Any] = json.loads((folder / ENGINE).read_text(encoding="utf-8"))
    return report


def dataset_key(records: Sequence[Record]) -> str:
    """The hash of a dataset's content: per split its documents, tokens and content sum.

    It does not change with the cutting into shards, with code, or with how parquet was written.
    """
    content = {}
    for split in SPLITS:
        facts = [record["splits"][split] for record in records if split in record["splits"]]
        content[split] = [
            sum(fact["docs"] for fact in facts),
            sum(fact["tokens"] for fact in facts),
            f"{sum(int(fact['content'], 16) for fact in facts) % 2**128:032x}",
        ]
    return atomic.sha256_json(content)


class _Split:
    """One split of a chunk: its shard, and what its record will say."""

    def __init__(self, shard: ShardWriter) -> None:
        self.shard = shard
        self.text_bytes = 0
        self.content = 0
        self.lengths: list[np.ndarray] = []

    def add(self, encoded: Encoded, mask: np.ndarray, file_index: int) -> None:
        """Append the documents of the (d,) bool mask."""
        # The shard takes whole runs of neighbours: their tokens are one slice.
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        for first, last in edges.reshape(-1, 2).tolist():
            starts, rows = encoded.starts[first : last + 1], encoded.rows[first:last]
            docs = np.column_stack([starts[:-1] - starts[0], rows])
            self.shard.append(encoded.tokens[starts[0] : starts[-1]], docs)
        self.content += content_sum(encoded, mask, file_index)
        self.text_bytes += int(encoded.text_bytes[mask].sum())
        self.lengths.append(np.diff(encoded.starts)[mask])

    def close(self) -> dict[str, Any] | None:
        """Finish the shard; its part of the record, or None where it has no documents."""
        self.shard.close()
        if not self.shard.tokens:
            return None
        return {
            "tokens": self.shard.tokens,
            "docs": self.shard.docs,
            "text_bytes": self.text_bytes,
            "content": f"{self.content % 2**128:032x}",
            "lengths": length_bins(np.concatenate(self.lengths)),
            "sha256": atomic.sha256_file(self.shard.path),
            "docs_sha256": atomic.sha256_file(self.shard.docs_path),
        }
