"""One chunk of text to one piece of tokens: the work of a tokenize task.

A document is `<|endoftext|>` and its tokens. It belongs to validation where
``xxh3_64(text) mod 10000 < val_per_10k``: by content, so copies of a text never straddle the split.

A piece holds, for each split that has documents, `<split>.bin` and `<split>.docs.npy`, and
`record.json`: what went in, what came out, every hash, and the documents' statistics.

The **content sum** of a split is the sum mod 2^128 of xxh3_128 over (file index, row, tokens) of
its documents. A sum does not depend on the order or the cutting of what is summed, so those of
chunks add up to that of the dataset, whatever its shards look like.
"""

import json
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline import atomic, tokenizer
from pipeline.chunks import Chunk
from pipeline.manifest import SPLITS, Split
from pipeline.params import TokenizeParams
from pipeline.parquet import read_batches
from pipeline.shards import TOKEN_DTYPE, ShardWriter
from pipeline.store import Store

RECORD = "record.json"
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


def content_hash(file_index: int, row: int, tokens: np.ndarray) -> int:
    """xxh3_128 of a document: where it stands in the source, and its (n,) uint16 tokens."""
    digest = xxhash.xxh3_128(struct.pack("<QQ", file_index, row))
    digest.update(tokens.astype(TOKEN_DTYPE, copy=False).tobytes())
    return digest.intdigest()


def length_bin(n_tokens: int) -> int:
    """The power of two at or below a document's length in tokens: its bin in the histogram."""
    return 1 << (n_tokens.bit_length() - 1)


def encode_text(text: str) -> np.ndarray:
    """A document: (n + 1,) uint16, `<|endoftext|>` and the text's n tokens."""
    return np.array([tokenizer.EOT, *tokenizer.encode(text)], dtype=TOKEN_DTYPE)


def encode_chunk(
    chunk: Chunk, key: str, raw: Path, column: str, params: TokenizeParams, store: Store
) -> Record:
    """Make a chunk's piece in the store, unless it stands there; return its record."""
    with store.lock("chunks", key):
        if (folder := store.find("chunks", key)) is None:
            with store.make("chunks", key) as folder:
                path = raw / chunk.file.path
                batches = read_batches(path, column, chunk.start, chunk.stop)
                write_piece(batches, chunk, key, params, folder)
            folder = store.root / "chunks" / key
    return read_record(folder)


def write_piece(
    batches: Iterable[tuple[int, pa.Array]],
    chunk: Chunk,
    key: str,
    params: TokenizeParams,
    folder: Path,
) -> None:
    """Write a chunk's piece into an empty folder, wherever its text comes from.

    Args:
        batches: runs of the chunk's rows in order: the first one's number in the file, their texts.
    """
    skipped: Counter[str] = Counter()
    splits = {split: _Split(ShardWriter(folder / f"{split}.bin")) for split in SPLITS}
    for first_row, texts in batches:
        for row, text in enumerate(texts.to_pylist(), start=first_row):
            if not text:
                skipped["null" if text is None else "empty"] += 1
                continue
            utf8 = text.encode()
            split = splits[split_of(utf8, params.val_per_10k)]
            split.add(chunk.file_index, row, utf8, encode_text(text))
    record = {
        "chunk_key": key,
        "source": chunk.file.model_dump(),
        "rows": [chunk.start, chunk.stop],
        "skipped": dict(skipped),
        "splits": {name: facts for name, split in splits.items() if (facts := split.close())},
    }
    atomic.write_json(folder / RECORD, record)


def read_record(folder: Path) -> Record:
    """The record of a piece."""
    record: Record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record


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
        self.lengths: Counter[int] = Counter()

    def add(self, file_index: int, row: int, text: bytes, tokens: np.ndarray) -> None:
        self.shard.append(tokens, np.array([[0, row]], dtype=np.int64))
        self.text_bytes += len(text)
        self.content = (self.content + content_hash(file_index, row, tokens)) % 2**128
        self.lengths[length_bin(len(tokens))] += 1

    def close(self) -> dict[str, Any] | None:
        """Finish the shard; its part of the record, or None where it has no documents."""
        self.shard.close()
        if not self.shard.tokens:
            return None
        return {
            "tokens": self.shard.tokens,
            "docs": self.shard.docs,
            "text_bytes": self.text_bytes,
            "content": f"{self.content:032x}",
            "lengths": {str(size): count for size, count in sorted(self.lengths.items())},
            "sha256": atomic.sha256_file(self.shard.path),
            "docs_sha256": atomic.sha256_file(self.shard.docs_path),
        }
