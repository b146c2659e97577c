"""Whether documents of a held-out text are among a variant's training documents.

Equal documents are found, by the hash of their tokens, in one pass over the training shards. A text
that is in part, or nearly, in the training data is not: `curate.decontaminate` with
`contaminated: drop` drops every row that shares 13 words with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from pipeline.format import tokenizer
from pipeline.format.shards import open_shard, read_docs


def count_shared(tokens: Path, texts: list[str]) -> int:
    """Return how many of the texts are training documents of `data/tokens`."""
    encoded = [np.array(tokenizer.encode(text), dtype="<u2") for text in texts]
    sought = {xxhash.xxh3_128_digest(one.tobytes()) for one in encoded}
    lengths = np.unique([len(one) + 1 for one in encoded])  # with <|endoftext|>
    found = set()
    for path in sorted(tokens.glob("train-*.bin")):
        shard = open_shard(path)
        firsts = np.append(read_docs(path)[:, 0], len(shard))
        for i in np.flatnonzero(np.isin(np.diff(firsts), lengths)).tolist():
            document = shard[firsts[i] + 1 : firsts[i + 1]]
            found.add(xxhash.xxh3_128_digest(np.ascontiguousarray(document).tobytes()))
    return len(found & sought)
