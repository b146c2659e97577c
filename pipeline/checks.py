"""What must hold of one file of the data, each byte read once: the work of a verify task.

A check returns its findings as lines that begin with the file's name; no lines, no fault.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from pipeline import atomic
from pipeline.encode import encode_text
from pipeline.errors import UserError
from pipeline.manifest import Shard, SourceFile, Tokenizer
from pipeline.parquet import read_texts
from pipeline.shards import ShardError, docs_path, open_shard, read_docs

_BLOCK_TOKENS = 1 << 22


def check_source(folder: Path, file: SourceFile) -> list[str]:
    """A file of `data/raw` against its manifest."""
    path = folder / file.path
    if not path.exists():
        return [f"{path}: missing"]
    found = atomic.sha256_file(path)
    if found != file.sha256:
        return [f"{path}: sha256 {found}, the manifest says {file.sha256}"]
    return []


def check_shard(folder: Path, shard: Shard, tokenizer: Tokenizer) -> list[str]:
    """A shard and its sidecar against the manifest.

    Size, header, sha256, range of the tokens; each `<|endoftext|>` begins a document of the sidecar
    and each document begins with one; the parts add up to the shard.
    """
    path = folder / shard.name
    try:
        tokens = open_shard(path)
        docs = read_docs(path)
    except ShardError as error:
        return [str(error).removesuffix("; `dvc repro` mends it")]
    faults = []
    # Header and tokens go through the hash and the checks together, block by block.
    digest = hashlib.sha256(path.open("rb").read(1024))
    starts, largest = [], 0
    for begin in range(0, len(tokens), _BLOCK_TOKENS):
        block = np.array(tokens[begin : begin + _BLOCK_TOKENS])
        digest.update(block.tobytes())
        starts.append(np.flatnonzero(block == tokenizer.eot) + begin)
        largest = max(largest, int(block.max()))
    if digest.hexdigest() != shard.sha256:
        faults.append(f"{path}: sha256 {digest.hexdigest()}, the manifest says {shard.sha256}")
    if len(tokens) != shard.tokens:
        faults.append(f"{path}: {len(tokens)} tokens, the manifest says {shard.tokens}")
    if largest >= tokenizer.n_vocab:
        faults.append(f"{path}: token {largest} is outside the vocabulary")
    if not np.array_equal(np.concatenate([[], *starts]), docs[:, 0]):
        faults.append(f"{path}: its <|endoftext|> tokens are not where {docs_path(path)} says")
    if (found := atomic.sha256_file(docs_path(path))) != shard.docs_sha256:
        faults.append(f"{docs_path(path)}: sha256 {found}, the manifest says {shard.docs_sha256}")
    if len(docs) != shard.docs:
        faults.append(f"{path}: {len(docs)} documents, the manifest says {shard.docs}")
    for name, total in (("tokens", shard.tokens), ("docs", shard.docs)):
        if sum(getattr(part, name) for part in shard.parts) != total:
            faults.append(f"{path}: the {name} of its parts do not add up to {total}")
    return faults


def check_record(path: Path, parts: dict[str, list[tuple[str, int, int]]]) -> list[str]:
    """A chunk's commit record against the manifest's parts of that chunk.

    Args:
        parts: chunk key -> (split, tokens, docs) of its parts in the manifest.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        said = sorted((s, f["tokens"], f["docs"]) for s, f in record["splits"].items())
        key = record["chunk_key"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{path}: no readable commit record"]
    if said != sorted(parts.get(key, [])):
        return [f"{path}: does not agree with the manifest"]
    return []


def check_tokens(raw: Path, column: str, folder: Path, shard: Shard, count: int) -> list[str]:
    """Encode ``count`` documents of each part again from the raw text, and compare the tokens."""
    path = folder / shard.name
    try:
        tokens, docs = open_shard(path), read_docs(path)
    except ShardError:
        return []  # named by `check_shard`
    ends = np.append(docs[1:, 0], len(tokens))
    faults, first = [], 0
    if len(docs) != shard.docs:
        return []  # named by `check_shard`
    for part in shard.parts:
        # Spread over the part: its first document, and every so many after it.
        for index in range(first, first + part.docs, max(1, -(-part.docs // max(count, 1)))):
            row = int(docs[index, 1])
            try:
                text = next(
                    (t for _, t in read_texts(raw / part.path, column, row, row + 1)), [None]
                )
            except (UserError, OSError, ValueError) as error:  # damaged: `check_source` says how
                faults.append(f"{raw / part.path}: row {row} is not readable ({error})")
                continue
            found = tokens[docs[index, 0] : ends[index]]
            if text[0] is None or not np.array_equal(found, encode_text(text[0])):
                faults.append(f"{path}: document {index} is not row {row} of {part.path}")
        first += part.docs
    return faults
