"""A chunk's piece in the store: its files, its record, and hashes of its content.

A document is `<|endoftext|>` followed by its tokens. A piece holds `<split>.bin` and
`<split>.docs.npy` for each split that has documents, and `record.json`: the inputs, counts, hashes
and document lengths. A piece encoded from text also holds `engine.json`, the engines that encoded
it, which is never published because the data do not depend on it.

The **content sum** of a split is the sum mod 2^128 of xxh3_128 over the tokens of each document,
seeded with the document's position in its source. A sum does not depend on order or grouping, so
the sums of the chunks add up to the sum of the dataset, however it is cut into shards.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.format.manifest import SPLITS, Split
from pipeline.format.shards import docs_path
from pipeline.store import atomic
from pipeline.store.store import Store, unlink_damaged
from pipeline.tokenize.chunk_plan import Chunk

RECORD = "record.json"
ENGINE = "engine.json"

Record = dict[str, Any]


def build_piece(store: Store, key: str, build: Callable[[Path], Mapping[str, str]]) -> Record:
    """Return the record of a chunk, building its piece first if the store does not have it.

    Args:
        build: Writes the files into the folder it is given; returns known sha256 by name.
    """
    with store.lock("chunks", key):
        if store.find("chunks", key) is None:
            hashes: dict[str, str] = {}
            with store.make("chunks", key, hashes) as folder:
                hashes |= build(folder)
    return read_record(store.root / "chunks" / key)


def write_record(
    folder: Path,
    chunk: Chunk,
    key: str,
    skipped: Mapping[str, int],
    splits: Mapping[Split, Any],
    **more: str,
) -> None:
    """Write a chunk's `record.json`, without syncing it: `Store.make` syncs all files of a piece.

    Args:
        skipped: Number of skipped documents by reason.
        splits: `split_facts` of each split that has documents.
        more: Further entries: `cut_from`, the key of the piece from which this one was cut.
    """
    record = {
        "chunk_key": key,
        "source": chunk.file.model_dump(exclude={"path"}),  # the path may change: see chunk_key
        "rows": [chunk.start, chunk.stop],
        "skipped": dict(skipped),
        "splits": splits,
        **more,
    }
    (folder / RECORD).write_bytes(atomic.json_bytes(record))


def split_facts(
    shard: Path, sha256: str, tokens: int, text_bytes: int, content: int, lengths: np.ndarray
) -> dict[str, Any]:
    """Return a split's part of the record.

    Args:
        shard: The split's shard, with its document index beside it.
        sha256: The hash of the shard.
        content: The content sum, not yet reduced mod 2^128.
        lengths: (docs,) int64, tokens of each document.
    """
    bins = length_bins(lengths)
    return {
        "tokens": tokens,
        "docs": len(lengths),
        "text_bytes": text_bytes,
        "content": f"{content % 2**128:032x}",
        "lengths": {str(1 << power): int(bins[power]) for power in np.flatnonzero(bins).tolist()},
        "sha256": sha256,
        "docs_sha256": atomic.sha256_file(docs_path(shard)),
    }


def read_record(folder: Path) -> Record:
    """Read the record of a piece."""
    record: Record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record


def check_unchanged(path: Path, sha256: str) -> None:
    """Refuse to copy from a damaged file of a piece: the hash of the copy would hide the damage."""
    if atomic.sha256_file(path) != sha256:
        unlink_damaged(path)  # the store then treats the piece as incomplete
        raise RuntimeError(f"{path}: damaged, now removed; run `dvc repro` to rebuild it")


def read_engine_report(folder: Path) -> dict[str, Any]:
    """Read `engine.json`: documents and bytes by engine, documents checked, rows that differed.

    Raises:
        FileNotFoundError: The piece was indexed from tokens, not encoded from text.
    """
    report: dict[str, Any] = json.loads((folder / ENGINE).read_text(encoding="utf-8"))
    return report


def content_sum(
    file_index: int, rows: Sequence[int], tokens: np.ndarray, borders: Sequence[int]
) -> int:
    """Return the content sum of consecutive documents, not yet reduced mod 2^128.

    Args:
        file_index: Number of the file among those of its source.
        rows: (d,), the documents' rows in the source file; in a token file, their first tokens.
        tokens: (n,) uint16.
        borders: (d + 1,): document i is ``tokens[borders[i] : borders[i + 1]]``.
    """
    view, digest, seed = tokens.data, xxhash.xxh3_128_intdigest, file_index << 40
    spans = zip(rows, pairwise(borders), strict=True)
    return sum([digest(view[start:stop], seed | row) for row, (start, stop) in spans])


def length_bins(lengths: np.ndarray) -> np.ndarray:
    """Count (n,) int64 lengths >= 1: (32,) int64, entry i for lengths 2^i to 2^(i + 1) - 1."""
    return np.bincount(np.frexp(lengths)[1] - 1, minlength=32)


def dataset_key(records: Sequence[Record]) -> str:
    """Return a hash of the dataset's content: documents, tokens and content sum of each split.

    It does not change with the cutting into shards, the code, or the layout of the parquet files.
    That of several sources is a hash of their names and keys; that of one has not its name.
    """
    of_source: dict[str, list[Record]] = {}
    for record in records:
        of_source.setdefault(record["source"]["source"], []).append(record)
    keys = {name: _content_key(found) for name, found in sorted(of_source.items())}
    return keys.popitem()[1] if len(keys) == 1 else atomic.sha256_json(keys)


def _content_key(records: Sequence[Record]) -> str:
    """Return the `dataset_key` of one source."""
    content = {}
    for split in SPLITS:
        facts = [record["splits"][split] for record in records if split in record["splits"]]
        content[split] = [
            sum(fact["docs"] for fact in facts),
            sum(fact["tokens"] for fact in facts),
            f"{sum(int(fact['content'], 16) for fact in facts) % 2**128:032x}",
        ]
    return atomic.sha256_json(content)
