"""Statistics and hashes of the documents in a shard, from one pass over its tokens in blocks."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from pipeline.format.tokenizer import EOT, N_VOCAB, token_bytes
from pipeline.tokenize.chunk_record import content_hash

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
        self.digest.update(block.tobytes())
        self.largest = max(self.largest, int(block.max()))
        self.eots.append(np.flatnonzero(block == EOT) + begin)
        self.text_bytes += int(np.bincount(block, minlength=N_VOCAB)[:N_VOCAB] @ token_bytes())
        starts = docs[:, 0] - begin
        ends = np.append(starts[1:], len(block))[: len(starts)]
        self.lengths.append(ends - starts)
        view = block.view(np.uint8).data
        spans = list(zip(starts.tolist(), ends.tolist(), docs[:, 1].tolist(), strict=True))
        texts = (xxhash.xxh3_64_intdigest(view[2 * a : 2 * b]) for a, b, _ in spans)
        self.hashes.append(np.fromiter(texts, np.uint64, len(starts)))
        content = sum(content_hash(file_index, row, block[a:b]) for a, b, row in spans)
        head = int(starts[0]) if len(starts) else len(block)
        if head:
            content += content_hash(file_index, head_row, block[:head])
        return content

    def eot_positions(self) -> np.ndarray:
        """Return the positions of `<|endoftext|>` in the shard: (n,) int64."""
        return np.concatenate([np.zeros(0, np.int64), *self.eots])


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
