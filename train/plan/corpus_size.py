"""Size of a source before it is downloaded: files, documents, tokens, shards, bytes.

Sizes of the smaller samples are those that the datasets state. Where only the bytes or only the
tokens are known, the other follows from FineWeb's 32 tokens per 100 bytes of parquet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from pipeline.params import SourceParams, TokenizeParams

TOKENS_PER_BYTE = 0.32  # of parquet
TOKENS_PER_DOCUMENT = 690  # in FineWeb
FILE_BYTES = 2.15e9  # of a full file in FineWeb's samples

# Repository and configuration: files, documents, GPT-2 tokens, all approximate. The 10BT samples
# are as the datasets count them; the larger ones are scaled by the size in their names.
KNOWN = {
    ("HuggingFaceFW/fineweb", "sample-10BT"): (15, 14_868_862, 10.3e9),
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): (14, 9_672_101, 9.95e9),
    ("HuggingFaceFW/fineweb", "sample-100BT"): (146, 148_000_000, 100e9),
    ("HuggingFaceFW/fineweb-edu", "sample-100BT"): (140, 97_000_000, 100e9),
    ("HuggingFaceFW/fineweb", "sample-350BT"): (510, 520_000_000, 350e9),
}
SAMPLE = (3, 249, 2_389_157, 4.46e6)  # State of the Union: files, documents, tokens, bytes


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Estimated output of the data stages."""

    files: int  # files to download
    raw_bytes: float  # bytes of those files
    documents: float  # documents in those files
    train_tokens: float  # tokens of the training split
    val_tokens: float  # tokens of the validation split
    shards: int  # shards of both splits
    token_bytes: float  # bytes of the shards and their document indexes

    @classmethod
    def estimate(cls, source: SourceParams, tokenize: TokenizeParams) -> Corpus | None:
        """Estimate the corpus of some parameters; None if its size is unknown before download."""
        found = _source_size(source)
        if found is None:
            return None
        files, documents, tokens, raw = found
        part = 1.0
        if source.files is not None:
            part = min(part, source.files / files)
        if source.max_bytes is not None:
            part = min(part, source.max_bytes / raw)
        if source.max_tokens is not None:
            part = min(part, source.max_tokens / tokens)
        held_out = tokenize.val_per_10k / 10_000
        train, val = (part * tokens * share for share in (1 - held_out, held_out))
        size = tokenize.shard_tokens
        return cls(
            files=math.ceil(part * files),
            raw_bytes=part * raw,
            documents=part * documents,
            train_tokens=train,
            val_tokens=val,
            # One training shard per chunk of about `size` tokens; validation shards are merged.
            shards=math.ceil(part * tokens / size) + math.ceil(val / size),
            # Two bytes per token, two int64 per document.
            token_bytes=2 * part * tokens + 16 * part * documents,
        )


def total(parts: Iterable[Corpus | None]) -> Corpus | None:
    """Add up the corpora of several sources; None if the size of one is unknown."""
    known = []
    for part in parts:
        if part is None:
            return None
        known.append(astuple(part))
    sums = map(sum, zip(*known, strict=True))
    return Corpus(**dict(zip(Corpus.__annotations__, sums, strict=True)))


def _source_size(source: SourceParams) -> tuple[int, float, float, float] | None:
    """Return files, documents, tokens and parquet bytes of the source, before any limit."""
    if source.kind == "sample":
        return SAMPLE
    if source.kind == "hub" and (known := KNOWN.get((source.repo, source.config or ""))):
        files, documents, tokens = known
        return files, documents, tokens, files * FILE_BYTES
    if source.kind in ("hub", "files") and (source.max_tokens or source.max_bytes):
        max_bytes = source.max_bytes or math.inf
        tokens = min(source.max_tokens or math.inf, max_bytes * TOKENS_PER_BYTE)
        raw = tokens / TOKENS_PER_BYTE
        return math.ceil(raw / FILE_BYTES), tokens / TOKENS_PER_DOCUMENT, tokens, raw
    return None
