"""Index one chunk of a token file: the work of a Ray task where the source has tokens, not text.

The piece is the same as that of an encoded chunk. Documents are found by `<|endoftext|>`; there are
no rows, so a document's position in its source file is its first token there. A file that has the
layout of our shards is hard-linked; chunks of other files are written as shards.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.format import tokenizer
from pipeline.format.foreign_tokens import TokenFile, open_token_file, split_of_file
from pipeline.format.shards import ShardWriter, docs_path
from pipeline.format.tokenizer import EOT, N_VOCAB
from pipeline.params import errors_of_source
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from pipeline.store.store import Store, unlink_damaged
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.chunk_record import Record, build_piece, write_record
from pipeline.tokenize.token_stats import BLOCK_TOKENS, shard_facts


def index_key(chunk: Chunk, code_key: str) -> str:
    """Hash what decides a chunk's bytes: its tokens and the code."""
    return atomic.sha256_json(
        {
            "file": chunk.file.sha256,
            "source": chunk.file.source,  # the record names it
            "split": split_of_file(chunk.file.path),
            "file_index": chunk.file_index,
            "tokens": [chunk.start, chunk.stop],
            "ranks": tokenizer.RANKS_SHA256,
            "code": code_key,
        }
    )


def index_chunk(chunk: Chunk, key: str, raw: Path, store: Store) -> Record:
    """Build a chunk's piece in the store, unless it is already there; return its record.

    Raises:
        UserError: The file has tokens outside GPT-2's vocabulary.
        RuntimeError: The file was damaged after the download.
    """

    def build(folder: Path) -> dict[str, str]:
        with errors_of_source(chunk.file.source):
            file = open_token_file(raw / chunk.file.path, chunk.file.path)
        split = split_of_file(chunk.file.path)
        shard = folder / f"{split}.bin"
        (_link if file.is_shard else _write)(file, chunk, shard)
        found = {split: _facts(shard, chunk, file, store)} if shard.exists() else {}
        write_record(folder, chunk, key, {}, found)
        return {f"{name}.bin": facts["sha256"] for name, facts in found.items()}

    return build_piece(store, key, build)


def _link(file: TokenFile, chunk: Chunk, shard: Path) -> None:
    """Hard-link the file as the piece's shard, and write its document index."""
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
    """Write the documents that begin in the chunk, each after its `<|endoftext|>`."""
    tokens = file.read()
    begin, end = (_document_border(tokens, at, file.eot_after) for at in (chunk.start, chunk.stop))
    writer = ShardWriter(shard)

    def append(block: np.ndarray) -> None:
        starts = np.flatnonzero(block == EOT)
        positions = begin + writer.tokens + starts
        writer.append(block, np.stack([starts, positions], axis=1))

    if file.eot_after and begin < end:
        append(np.array([EOT], np.uint16))  # the EOT of the last document moves to the first
        end -= int(tokens[end - 1] == EOT)
    for at in range(begin, end, BLOCK_TOKENS):
        append(np.array(tokens[at : min(at + BLOCK_TOKENS, end)]))
    writer.close()


def _document_border(tokens: np.ndarray, at: int, eot_after: bool) -> int:
    """Return where the first document at or after token ``at`` begins, or the end of the file."""
    if at in (0, len(tokens)):
        return at
    at -= eot_after  # the document begins after the EOT of the one before
    while at < len(tokens):
        found = np.flatnonzero(tokens[at : at + BLOCK_TOKENS] == EOT)
        if len(found):
            return at + int(found[0]) + eot_after
        at += BLOCK_TOKENS
    return len(tokens)


def _facts(shard: Path, chunk: Chunk, source: TokenFile, store: Store) -> dict[str, Any]:
    """Read the shard once; return the split's part of the record."""
    facts, largest = shard_facts(shard, chunk.file_index, chunk.start)
    if source.is_shard and facts["sha256"] != chunk.file.sha256:
        unlink_damaged(source.path)
        with store.lock("files", chunk.file.sha256):
            store.discard("files", chunk.file.sha256)
        raise RuntimeError(
            f"{source.path}: the file was damaged after the download and is now removed; run "
            "`dvc repro` to download it again"
        )
    if largest >= N_VOCAB:
        raise UserError(
            f"{chunk.file.path}: token {largest} is outside GPT-2's vocabulary; remove the "
            f"file from sources.{chunk.file.source}.paths"
        )
    return facts
