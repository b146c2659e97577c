"""What a run of documents comes to, in tokens: read once, a block of whole documents at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from pipeline.format.tokenizer import EOT, N_VOCAB, token_bytes
from pipeline.tokenize.encode_chunk import content_hash

BLOCK_TOKENS = 1 << 22


@dataclass
class Measure:
    """Sums over documents, block by block."""

    file_index: int
    """The source file's number."""
    text_bytes: int = 0
    """Bytes of text behind the tokens."""
    content: int = 0
    """The content sum: see `encode.py`."""
    eots: list[np.ndarray] = field(default_factory=list)
    """Where `<|endoftext|>` stands."""
    lengths: list[np.ndarray] = field(default_factory=list)
    """Tokens of each document, its `<|endoftext|>` among them."""
    hashes: list[np.ndarray] = field(default_factory=list)
    """xxh3_64 of each document's tokens; of equal texts they are equal."""

    def add(self, block: np.ndarray, begin: int, docs: np.ndarray, place: int) -> None:
        """Take the tokens (n,) uint16 from ``begin`` in the shard on, and their documents.

        Args:
            docs: (d, 2) int64: the documents' first tokens in the shard, and their places.
            place: of the tokens before the first of them, which continue another document.
        """
        self.eots.append(np.flatnonzero(block == EOT) + begin)
        self.text_bytes += int(np.bincount(block, minlength=N_VOCAB)[:N_VOCAB] @ token_bytes())
        starts = docs[:, 0] - begin
        ends = np.append(starts[1:], len(block))[: len(starts)]
        self.lengths.append(ends - starts)
        view = block.view(np.uint8).data
        texts = (xxhash.xxh3_64_intdigest(view[2 * a : 2 * b]) for a, b in _pairs(starts, ends))
        self.hashes.append(np.fromiter(texts, np.uint64, len(starts)))
        content = sum(
            content_hash(self.file_index, row, block[a:b])
            for (a, b), row in zip(_pairs(starts, ends), docs[:, 1].tolist(), strict=True)
        )
        head = int(starts[0]) if len(starts) else len(block)
        if head:
            content += content_hash(self.file_index, place, block[:head])
        self.content = (self.content + content) % 2**128

    def merge(self, other: "Measure") -> None:
        """Take the next part of the shard, of another chunk; the content is each chunk's own."""
        self.text_bytes += other.text_bytes
        self.eots += other.eots
        self.lengths += other.lengths
        self.hashes += other.hashes

    def starts(self) -> np.ndarray:
        """Where `<|endoftext|>` stands: (n,) int64."""
        return np.concatenate([np.zeros(0, np.int64), *self.eots])


def _pairs(starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    return zip(starts.tolist(), ends.tolist(), strict=True)


def blocks(docs: np.ndarray, begin: int, end: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut a shard's tokens ``begin`` to ``end`` where documents begin, `BLOCK_TOKENS` or so each.

    Args:
        docs: (d, 2) int64, ascending, the documents that begin there.

    Yields:
        A block's first token, the token after its last, and its documents.
    """
    starts = docs[:, 0]
    first = 0
    while begin < end:
        last = int(np.searchsorted(starts, begin + BLOCK_TOKENS))
        stop = int(starts[last]) if last < len(starts) else end
        yield begin, stop, docs[first:last]
        begin, first = stop, last
