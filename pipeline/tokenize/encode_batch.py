"""Encode a batch of texts: Arrow buffers in, NumPy arrays out, no Python object per document.

The exceptions: texts are hashed one by one, and so are the documents encoded that must go to the
reference.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.format.shards import TOKEN_DTYPE
from pipeline.format.tokenizer import EOT
from pipeline.tokenize.engines import FastEngine, Unencodable, needs_reference, reference

NOT_KEPT = "not kept"
"""The reason in `skipped` of rows that stage `curate` has dropped."""


class EngineMismatch(Exception):
    """A document that the fast engine and the reference encode differently."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row
        """The document's row in the source file."""


@dataclass
class EngineReport:
    """The contents of `engine.json`: the work of each engine, on which the data do not depend."""

    documents: Counter[str] = field(default_factory=Counter)
    """Documents by engine."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of text by engine."""
    checked: int = 0
    """Documents of the fast engine that the reference encoded as well."""
    differences: list[int] = field(default_factory=list)
    """Rows on which the engines differed."""


@dataclass(frozen=True)
class Encoded:
    """The encoded documents of a batch, in row order."""

    tokens: np.ndarray
    """(n,) uint16: each document is `<|endoftext|>` followed by its tokens."""
    starts: np.ndarray
    """(d + 1,) int64: document i is ``tokens[starts[i] : starts[i + 1]]``."""
    rows: np.ndarray
    """(d,) int64: rows in the source file."""
    hashes: np.ndarray
    """(d,) uint64: xxh3_64 of the texts."""
    text_bytes: np.ndarray
    """(d,) int64: length of the texts in UTF-8."""
    skipped: Counter[str]
    """Number of skipped documents by reason."""


def encode_batch(
    first_row: int,
    texts: pa.Array,
    fast: FastEngine | None,
    check_fraction: float,
    report: EngineReport,
    keep: np.ndarray | None = None,
) -> Encoded:
    """Encode the texts of consecutive rows.

    Args:
        first_row: Row of the first text in the source file.
        texts: Strings or bytes, in any of Arrow's layouts.
        fast: The fast engine; if None, the reference encodes everything.
        check_fraction: Fraction of the fast engine's documents to compare with the reference. They
            are chosen by their hash, so they are the same in each run. If it is not 0, the first
            document of a report is compared too.
        report: Updated with the counts of this batch.
        keep: (rows,) bool, the rows to encode; None: all.

    Raises:
        EngineMismatch: The first document found on which the engines differ.
    """
    skipped: Counter[str] = Counter()
    texts, rows = texts.cast(pa.large_binary()), np.arange(first_row, first_row + len(texts))
    if keep is not None:
        skipped[NOT_KEPT] += len(rows) - int(np.count_nonzero(keep))
        texts, rows = texts.filter(pa.array(keep)), rows[keep]
    texts, rows = _with_text(texts, rows, skipped)
    data, offsets = _buffers(texts)
    sizes = np.diff(offsets)
    hashes = _hashes(data, offsets)
    by_reference = np.ones(len(rows), bool) if fast is None else needs_reference(data, offsets)

    counts, encodable = np.zeros(len(rows), dtype=np.int64), np.ones(len(rows), dtype=bool)
    from_reference: dict[int, np.ndarray] = {}
    for index in np.flatnonzero(by_reference).tolist():
        try:
            from_reference[index] = reference(texts[index].as_py())
            counts[index] = len(from_reference[index])
        except Unencodable as reason:
            skipped[str(reason)] += 1
            encodable[index] = False
    by_fast = ~by_reference
    from_fast = np.zeros(0, dtype=np.uint32)
    if fast is not None and by_fast.any():
        all_fast = not by_reference.any()
        buffers = (data, offsets) if all_fast else _buffers(texts.filter(pa.array(by_fast)))
        from_fast, counts[by_fast] = fast.encode(*buffers)

    lengths = np.where(encodable, counts + 1, 0)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.empty(starts[-1], dtype=TOKEN_DTYPE)
    unfilled = np.ones(len(tokens), dtype=bool)
    first_tokens = starts[:-1][encodable]
    tokens[first_tokens], unfilled[first_tokens] = EOT, False
    for index, encoded in from_reference.items():
        span = slice(starts[index] + 1, starts[index + 1])
        tokens[span], unfilled[span] = encoded, False
    tokens[unfilled] = from_fast

    if check_fraction:
        chosen = hashes >> np.uint64(40) < check_fraction * 2**24
        if not report.checked:
            chosen[np.flatnonzero(by_fast)[:1]] = True
        for index in np.flatnonzero(chosen & by_fast).tolist():
            report.checked += 1
            found = tokens[starts[index] + 1 : starts[index + 1]]
            if not np.array_equal(found, reference(texts[index].as_py())):
                raise EngineMismatch(int(rows[index]))
    for name, mask in (("gigatoken", by_fast), ("tiktoken", by_reference & encodable)):
        report.documents[name] += int(mask.sum())
        report.bytes[name] += int(sizes[mask].sum())
    return Encoded(
        tokens=tokens,
        starts=np.append(first_tokens, len(tokens)),
        rows=rows[encodable],
        hashes=hashes[encodable],
        text_bytes=sizes[encodable],
        skipped=skipped,
    )


def _with_text(
    texts: pa.Array, rows: np.ndarray, skipped: Counter[str]
) -> tuple[pa.Array, np.ndarray]:
    """Return the non-empty texts in valid UTF-8 and their rows; count the others in ``skipped``."""
    sizes = pc.fill_null(pc.binary_length(texts), -1).to_numpy()
    keep = sizes > 0
    try:
        texts.cast(pa.large_string())
    except pa.ArrowInvalid:
        for index in np.flatnonzero(keep).tolist():
            try:
                texts[index].as_py().decode()
            except UnicodeDecodeError:
                keep[index] = False
                skipped["not UTF-8"] += 1
    for reason, size in (("null", -1), ("empty", 0)):
        if count := int((sizes == size).sum()):
            skipped[reason] += count
    return (texts, rows) if keep.all() else (texts.filter(pa.array(keep)), rows[keep])


def _buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the (n,) uint8 bytes and the (d + 1,) int64 offsets of a large_binary array."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    window = slice(texts.offset, texts.offset + len(texts) + 1)
    return np.frombuffer(data, dtype=np.uint8), np.frombuffer(offsets, dtype=np.int64)[window]


def _hashes(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return xxh3_64 of each document: (d,) uint64."""
    view = data.data
    hashes = (xxhash.xxh3_64_intdigest(view[a:b]) for a, b in pairwise(offsets.tolist()))
    return np.fromiter(hashes, np.uint64, len(offsets) - 1)
