"""One chunk of a token file to one piece: the work of a tokenize task where tokens come as tokens.

The piece is as `encode.py` makes it, with nothing encoded. Documents are found by `<|endoftext|>`;
there are no rows, and a document's place in its source file is its first token there. A file that
is laid out as our shards are is linked; of the others each chunk is written as a shard.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.format import tokenizer
from pipeline.format.foreign_tokens import TokenFile, open_token_file, split_of_file
from pipeline.format.manifest import SourceFile
from pipeline.format.shards import (
    HEADER_BYTES,
    MAX_TOKENS,
    ShardWriter,
    docs_path,
    open_shard,
    read_docs,
)
from pipeline.format.tokenizer import EOT, N_VOCAB
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from pipeline.store.store import Store, unlink_bad
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.encode_chunk import RECORD, Record, length_bins, read_record
from pipeline.tokenize.token_stats import BLOCK_TOKENS, Measure, blocks


def plan_token_chunks(raw: Path, files: Sequence[SourceFile], shard_tokens: int) -> list[Chunk]:
    """The chunks of token files; their "rows" are tokens of the file.

    A file that is a shard already is one chunk. The others are cut every ``shard_tokens`` tokens
    or so; a chunk has the documents that begin in it.
    """
    chunks = []
    for index, file in enumerate(files):
        found = open_token_file(raw / file.path, file.path)
        count = 1 if found.is_shard else max(1, round(found.tokens / min(shard_tokens, MAX_TOKENS)))
        borders = [found.tokens * nth // count for nth in range(count + 1)]
        for start, stop in pairwise(borders):
            chunks.append(Chunk(index, file, start, stop, stop - start))
    return chunks


def index_key(chunk: Chunk, code_key: str) -> str:
    """What decides a chunk's bytes: its tokens and the code."""
    return atomic.sha256_json(
        {
            "file": chunk.file.sha256,
            "path": chunk.file.path,  # its name says the split
            "file_index": chunk.file_index,
            "tokens": [chunk.start, chunk.stop],
            "ranks": tokenizer.RANKS_SHA256,
            "code": code_key,
        }
    )


def written_tokens(chunk: Chunk, raw: Path) -> int:
    """The tokens of a chunk that its piece holds a copy of: none of a training file that is linked.

    Of validation there are two, for its pieces are merged.
    """
    if split_of_file(chunk.file.path) == "val":
        return 2 * chunk.estimated_tokens
    is_linked = open_token_file(raw / chunk.file.path, chunk.file.path).is_shard
    return 0 if is_linked else chunk.estimated_tokens


def index_chunk(chunk: Chunk, key: str, raw: Path, store: Store) -> Record:
    """Make a chunk's piece in the store, unless it stands there; return its record.

    Raises:
        UserError: tokens outside GPT-2's vocabulary are among them.
        RuntimeError: the file is not what `data/raw` says; the next run brings it anew.
    """
    with store.lock("chunks", key):
        if (folder := store.find("chunks", key)) is None:
            file = open_token_file(raw / chunk.file.path, chunk.file.path)
            hashes: dict[str, str] = {}
            with store.make("chunks", key, hashes) as folder:
                shard = folder / f"{split_of_file(chunk.file.path)}.bin"
                (_link if file.is_shard else _write)(file, chunk, shard)
                facts = _facts(shard, chunk, file, store) if shard.exists() else None
                if facts:
                    hashes[shard.name] = facts["sha256"]
                record = {
                    "chunk_key": key,
                    "source": chunk.file.model_dump(),
                    "rows": [chunk.start, chunk.stop],
                    "skipped": {},
                    "splits": {shard.stem: facts} if facts else {},
                }
                (folder / RECORD).write_bytes(atomic.json_bytes(record))  # `make` syncs it
            folder = store.root / "chunks" / key
    return read_record(folder)


def _link(file: TokenFile, chunk: Chunk, shard: Path) -> None:
    """Have the file itself as the piece's shard, and write the sidecar beside it."""
    try:
        os.link(file.path.resolve(), shard)
    except OSError:
        shutil.copyfile(file.path, shard)
    tokens = file.read()
    found = [
        np.flatnonzero(tokens[at : at + BLOCK_TOKENS] == EOT) + at
        for at in range(0, len(tokens), BLOCK_TOKENS)
    ]
    starts = np.concatenate(found).astype("<i8")
    np.save(docs_path(shard), np.stack([starts, starts], axis=1), allow_pickle=False)


def _write(file: TokenFile, chunk: Chunk, shard: Path) -> None:
    """Write the documents that begin in the chunk, each behind its `<|endoftext|>`."""
    tokens = file.read()
    begin, end = (_border(tokens, at, file.eot_after) for at in (chunk.start, chunk.stop))
    writer = ShardWriter(shard)

    def append(block: np.ndarray) -> None:
        starts = np.flatnonzero(block == EOT)
        places = begin + writer.tokens + starts
        writer.append(block, np.stack([starts, places], axis=1))

    if file.eot_after and begin < end:
        append(np.array([EOT], np.uint16))  # that of the last document moves to the first
        end -= int(tokens[end - 1] == EOT)
    for at in range(begin, end, BLOCK_TOKENS):
        append(np.array(tokens[at : min(at + BLOCK_TOKENS, end)]))
    writer.close()


def _border(tokens: np.ndarray, at: int, eot_after: bool) -> int:
    """Where the first document begins that begins at or after token ``at``; else the end."""
    if at in (0, len(tokens)):
        return at
    at -= eot_after  # it begins behind the EOT of the one before
    while at < len(tokens):
        found = np.flatnonzero(tokens[at : at + BLOCK_TOKENS] == EOT)
        if len(found):
            return at + int(found[0]) + eot_after
        at += BLOCK_TOKENS
    return len(tokens)


def _facts(shard: Path, chunk: Chunk, source: TokenFile, store: Store) -> dict[str, Any]:
    """The shard's part of the chunk's record."""
    tokens, docs = open_shard(shard), read_docs(shard)
    measure = Measure(chunk.file_index)
    digest, largest = hashlib.sha256(), 0
    with open(shard, "rb") as file:
        digest.update(file.read(HEADER_BYTES))
    for begin, end, those in blocks(docs, 0, len(tokens)):
        block = np.array(tokens[begin:end])
        digest.update(block.tobytes())
        largest = max(largest, int(block.max()))
        measure.add(block, begin, those, chunk.start)
    if source.is_shard and digest.hexdigest() != chunk.file.sha256:
        unlink_bad(source.path)
        with store.lock("files", chunk.file.sha256):
            store.discard("files", chunk.file.sha256)
        raise RuntimeError(f"{source.path} was damaged; `dvc repro` brings it anew")
    if largest >= N_VOCAB:
        raise UserError(
            f"{chunk.file.path}: token {largest} is not of GPT-2's vocabulary; leave it out"
        )
    return {
        "tokens": len(tokens),
        "docs": len(docs),
        "text_bytes": measure.text_bytes,
        "content": f"{measure.content:032x}",
        "lengths": length_bins(np.concatenate(measure.lengths)),
        "sha256": digest.hexdigest(),
        "docs_sha256": atomic.sha256_file(docs_path(shard)),
    }
