"""Split by position: the last part of the token stream is validation (`val_split: position`).

```
chunks    |   0   |   1   |   2   |   3   |     encoded once, with everything in train
                      cut ^
pieces    |   0   |   1   | 2 | 2 |   3   |     2 is cut in two, 3 holds its shard by hard link
            train   train   tr val   val
```

The target is the last ``val_per_10k`` / 10,000 of all tokens, rounded down. If the document at the
target begins or ends within a tenth of that size from it, the cut is there, at the nearer of the
two. Otherwise the cut is inside the document, at the target, and the second part becomes a document
of its own: `<|endoftext|>` and the remaining tokens, with the row of the first part. So the cut
depends on the documents alone, and not on how they are cut into chunks.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.format.manifest import SPLITS, Split
from pipeline.format.shards import ShardWriter, docs_path, open_shard, read_docs
from pipeline.format.tokenizer import EOT
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.chunk_record import (
    ENGINE,
    Record,
    build_piece,
    check_unchanged,
    read_record,
    write_record,
)
from pipeline.tokenize.token_stats import shard_facts


def val_size(tokens: int, val_per_10k: int) -> tuple[int, int]:
    """Return the validation tokens to aim at, and how far the cut may be from there."""
    size = tokens * val_per_10k // 10_000
    return size, size // 10


def split_pieces(
    chunks: Sequence[tuple[Chunk, str]], val_per_10k: int, store: Store
) -> list[tuple[Chunk, str]]:
    """Replace the pieces from the cut on by pieces that hold validation documents.

    Args:
        chunks: Chunks and keys of their pieces, which have no validation documents.

    Returns:
        The chunks and the keys of the pieces to publish.
    """
    records = [read_record(store.root / "chunks" / key) for _, key in chunks]
    sizes = [sum(facts["tokens"] for facts in r["splits"].values()) for r in records]
    total = sum(sizes)
    size, tolerance = val_size(total, val_per_10k)
    found, before, is_cut, has_begun = [], 0, size == 0, False
    for (chunk, key), record, tokens in zip(chunks, records, sizes, strict=True):
        target = total - size - before
        if tokens and not is_cut and target < tokens:
            docs = read_docs(store.root / "chunks" / key / "train.bin")
            target, is_cut = find_cut(docs[:, 0], tokens, target, tolerance, before, total), True
        if tokens and target < tokens:
            key = _cut_piece(chunk, key, record, max(0, target), store, begins=not has_begun)
            has_begun = True
        found.append((chunk, key))
        before += tokens
    return found


def find_cut(
    starts: np.ndarray, tokens: int, target: int, tolerance: int, before: int, total: int
) -> int:
    """Return the token of a chunk at which validation begins.

    Args:
        starts: (docs,) int64, the first token of each document.
        tokens: Tokens of the chunk.
        target: The token to cut at, in [0, tokens).
        tolerance: Largest distance of a document's border to be used instead.
        before: Tokens of the stream before the chunk.
        total: Tokens of the stream: the cut leaves neither split empty, if it can.
    """
    borders = np.unique([0, *starts.tolist(), tokens])
    number = int(np.searchsorted(borders, target, side="right")) - 1
    start, end = borders[number : number + 2].tolist()
    inner = [border for border in (start, end) if 0 < before + border < total]
    nearest = min(inner, key=lambda border: abs(border - target), default=None)
    if nearest is not None and (abs(nearest - target) <= tolerance or end - start <= 2):
        return int(nearest)
    # Both parts keep a token beside their `<|endoftext|>`.
    return min(max(target, start + 2), end - 1) if end - start > 2 else int(end)


def _cut_piece(
    chunk: Chunk, key: str, record: Record, train_tokens: int, store: Store, begins: bool
) -> str:
    """Build the piece in which a chunk's tokens from ``train_tokens`` on are validation.

    Args:
        begins: Whether validation begins with this piece, and so must with an `<|endoftext|>`.
    """
    source = store.root / "chunks" / key / "train.bin"
    is_written = train_tokens > 0 or (begins and open_shard(source)[0] != EOT)
    cut_key = atomic.sha256_json({"cut": key, "train_tokens": train_tokens, "begins": begins})

    def build(folder: Path) -> Mapping[str, str]:
        facts = record["splits"]["train"]
        check_unchanged(source, facts["sha256"])
        check_unchanged(docs_path(source), facts["docs_sha256"])
        if (source.parent / ENGINE).exists():
            _link(source.parent / ENGINE, folder / ENGINE)
        found: dict[Split, Any] = {"val": facts}
        if is_written:
            found = _write_halves(source, chunk, train_tokens, folder)
        else:
            _link(source, folder / "val.bin")
            _link(docs_path(source), docs_path(folder / "val.bin"))
        write_record(folder, chunk, cut_key, record["skipped"], found, cut_from=key)
        hashes = {f"{split}.bin": facts["sha256"] for split, facts in found.items()}
        return hashes | {f"{split}.docs.npy": f["docs_sha256"] for split, f in found.items()}

    if store.fresh:
        with store.lock("chunks", cut_key):
            store.discard("chunks", cut_key)
    build_piece(store, cut_key, build)
    return cut_key


def _write_halves(source: Path, chunk: Chunk, cut: int, folder: Path) -> dict[Split, Any]:
    """Write a shard's tokens before and from the cut on; return their parts of the record.

    Where a published token file begins within a document, the cut may be at its first token.
    """
    tokens, docs = open_shard(source), read_docs(source)
    first = int(np.searchsorted(docs[:, 0], cut))
    halves = {split: ShardWriter(folder / f"{split}.bin") for split in SPLITS}
    halves["train"].append(tokens[:cut], docs[:first])
    if first == len(docs) or docs[first, 0] != cut:  # inside a document
        row = int(docs[first - 1, 1]) if first else chunk.start
        halves["val"].append(np.array([EOT], np.uint16), np.array([[0, row]]))
    halves["val"].append(tokens[cut:], docs[first:] - np.array([cut, 0]))
    found: dict[Split, Any] = {}
    for split, writer in halves.items():
        writer.close()
        if writer.tokens:
            found[split], _ = shard_facts(writer.path, chunk.file_index, chunk.start)
    return found


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
