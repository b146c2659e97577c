"""How much text a source has, before any of it is there: files, tokens, shards, bytes.

Counts of the smaller samples are those that the data sets give themselves; where only one of bytes
and tokens is known, the other follows from FineWeb's 32 tokens in 100 bytes of parquet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.params import SourceParams, TokenizeParams

TOKENS_A_BYTE = 0.32  # of parquet
TOKENS_A_DOCUMENT = 690  # of FineWeb
FILE_BYTES = 2.15e9  # of a full file of FineWeb's samples

# Repository and configuration: files, documents, GPT-2 tokens; about. The samples of 10BT are as
# the data sets count them; the larger ones follow from their names, in proportion.
KNOWN = {
    ("HuggingFaceFW/fineweb", "sample-10BT"): (15, 14_868_862, 10.3e9),
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): (14, 9_672_101, 9.95e9),
    ("HuggingFaceFW/fineweb", "sample-100BT"): (146, 148_000_000, 100e9),
    ("HuggingFaceFW/fineweb-edu", "sample-100BT"): (140, 97_000_000, 100e9),
    ("HuggingFaceFW/fineweb", "sample-350BT"): (510, 520_000_000, 350e9),
}
SAMPLE = (3, 249, 2_389_157, 4.46e6)  # the State of the Union addresses; bytes, too


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What the data stages will make, about.

    Attributes:
        files: To download.
        raw_bytes: Of them.
        documents: In them.
        train_tokens: In the training split.
        val_tokens: Held out.
        shards: Of both splits.
        token_bytes: Of the shards and what lies beside them.
    """

    files: int
    raw_bytes: float
    documents: float
    train_tokens: float
    val_tokens: float
    shards: int
    token_bytes: float

    @classmethod
    def of(cls, source: SourceParams, tokenize: TokenizeParams) -> Corpus | None:
        """What parameters come to; None where nobody can know without looking."""
        found = _size(source)
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
            # A training shard for each chunk of about so many tokens; the validation is merged.
            shards=math.ceil(part * tokens / size) + math.ceil(val / size),
            # Two bytes a token, and two int64 a document.
            token_bytes=2 * part * tokens + 16 * part * documents,
        )


def _size(source: SourceParams) -> tuple[int, float, float, float] | None:
    """Files, documents, tokens and bytes of parquet of a whole source."""
    if source.kind == "sample":
        return SAMPLE
    if source.kind == "hub" and (known := KNOWN.get((source.repo, source.config or ""))):
        files, documents, tokens = known
        return files, documents, tokens, files * FILE_BYTES
    if source.kind in ("hub", "files") and (source.max_tokens or source.max_bytes):
        tokens = min(source.max_tokens or math.inf, (source.max_bytes or math.inf) * TOKENS_A_BYTE)
        raw = tokens / TOKENS_A_BYTE
        return math.ceil(raw / FILE_BYTES), tokens / TOKENS_A_DOCUMENT, tokens, raw
    return None
