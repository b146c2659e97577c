"""Statistics and hashes of the documents in a shard, from one pass over its tokens in blocks."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.format.shards import HEADER_BYTES, open_shard, read_docs
from pipeline.format.tokenizer import EOT, N_VOCAB, token_bytes
from pipeline.tokenize.chunk_record import content_sum, split_facts

BLOCK_TOKENS = 1 << 22


@dataclass
class TokenStats:
    """Statistics of a shard, updated block by block."""

    digest: Any = field(default_factory=hashlib.sha256)
    """The sha256 of the tokens, and of what the caller adds."""
    largest: int = 0
    """The largest token."""
    text_bytes: int = 0
    """Bytes of text behind the tokens."""
    eots: list[np.ndarray] = field(default_factory=list)
    """Positions of `<|endoftext|>` in the shard."""
    lengths: list[np.ndarray] = field(default_factory=list)
    """Tokens of each document, including its `<|endoftext|>`."""
    hashes: list[np.ndarray] = field(default_factory=list)
    """xxh3_64 of each document's tokens; equal texts have equal hashes."""

    def add(
        self, block: np.ndarray, begin: int, docs: np.ndarray, file_index: int, head_row: int
    ) -> int:
        """Add a block of tokens, and return its content sum, not yet reduced mod 2^128.

        Args:
            block: (n,) uint16.
            begin: Position of the block in the shard.
            docs: (d, 2) int64: the first token in the shard, and the row, of each document that
                begins in the block.
            file_index: The number of the source file.
            head_row: The row under which to hash the tokens before the first of these documents;
                they continue an earlier document.
        """
        self.digest.update(block)
        self.largest = max(self.largest, int(block.max()))
        self.eots.append(np.flatnonzero(block == EOT) + begin)
        # Arrow indexes with uint16; NumPy would first make them int64, in four times the time.
        text_bytes = pc.take(_bytes_by_token(), pa.array(block), boundscheck=False)
        self.text_bytes += pc.sum(text_bytes).as_py()
        edges = np.append(docs[:, 0] - begin, len(block))
        self.lengths.append(np.diff(edges))
        borders, rows, view = edges.tolist(), docs[:, 1].tolist(), block.data
        texts = [xxhash.xxh3_64_intdigest(view[a:b]) for a, b in pairwise(borders)]
        self.hashes.append(np.array(texts, np.uint64))
        if borders[0]:
            rows, borders = [head_row, *rows], [0, *borders]
        return content_sum(file_index, rows, block, borders)

    def eot_positions(self) -> np.ndarray:
        """Return the positions of `<|endoftext|>` in the shard: (n,) int64."""
        return np.concatenate([np.zeros(0, np.int64), *self.eots])


@lru_cache(maxsize=1)
def _bytes_by_token() -> pa.Array:
    """Return the bytes of each uint16; those beyond the vocabulary are no tokens and have none."""
    lengths = np.zeros(1 << 16, np.uint8)
    lengths[:N_VOCAB] = token_bytes()
    return pa.array(lengths)


def shard_facts(shard: Path, file_index: int, head_row: int) -> tuple[dict[str, Any], int]:
    """Read a shard of one chunk; return its split's part of the record, and its largest token.

    Args:
        file_index: The number of the source file.
        head_row: The row under which to hash the tokens before the first document.
    """
    tokens, docs = open_shard(shard), read_docs(shard)
    stats, content = TokenStats(), 0
    with open(shard, "rb") as file:
        stats.digest.update(file.read(HEADER_BYTES))
    for begin, end, block_docs in blocks(docs, 0, len(tokens)):
        content += stats.add(np.array(tokens[begin:end]), begin, block_docs, file_index, head_row)
    lengths = np.concatenate([np.zeros(0, np.int64), *stats.lengths])
    sha256 = stats.digest.hexdigest()
    facts = split_facts(shard, sha256, len(tokens), stats.text_bytes, content, lengths)
    return facts, stats.largest


def blocks(docs: np.ndarray, begin: int, end: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut tokens [begin, end) of a shard at document starts, into blocks of about `BLOCK_TOKENS`.

    Args:
        docs: (d, 2) int64, ascending: the documents that begin there.

    Yields:
        A block's first token, the token after its last, and the documents that begin in it.
    """
    starts = docs[:, 0]
    first = 0
    while begin < end:
        last = int(np.searchsorted(starts, begin + BLOCK_TOKENS))
        stop = int(starts[last]) if last < len(starts) else end
        yield begin, stop, docs[first:last]
        begin, first = stop, last
