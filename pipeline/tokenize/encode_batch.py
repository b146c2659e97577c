"""A batch of texts to tokens: Arrow buffers in, numpy arrays out, no Python object a document.

But for two things: the hash of a text is taken one by one, and what the fast engine may not encode
goes to the reference one by one.
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
from pipeline.tokenize.engines import Fast, Unfit, left_to_reference, reference


class Differs(Exception):
    """A document that the fast engine encoded otherwise than the reference does."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row
        """Its row in the source file."""


@dataclass
class Report:
    """Who encoded what: no part of the data, for the data are the same either way."""

    documents: Counter[str] = field(default_factory=Counter)
    """Documents, by engine."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of their text, by engine."""
    checked: int = 0
    """Documents of the fast engine's that the reference encoded as well."""


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch that have tokens, in the order of their rows."""

    tokens: np.ndarray
    """(n,) uint16: each document is `<|endoftext|>` and its tokens."""
    starts: np.ndarray
    """(d + 1,) int64: document i is ``tokens[starts[i] : starts[i + 1]]``."""
    rows: np.ndarray
    """(d,) int64: rows in the source file."""
    hashes: np.ndarray
    """(d,) uint64: xxh3_64 of the texts."""
    text_bytes: np.ndarray
    """(d,) int64: the length of the texts in UTF-8."""
    skipped: Counter[str]
    """Documents without tokens, by reason."""


def encode_batch(
    first_row: int, texts: pa.Array, fast: Fast | None, check_fraction: float, report: Report
) -> Encoded:
    """Encode the texts of consecutive rows.

    Args:
        first_row: the first one's row in the source file.
        texts: strings or bytes, in any of Arrow's layouts.
        fast: the fast engine; without it everything is the reference's.
        check_fraction: of the fast engine's documents, the part that is compared with the
            reference: by their hash, so the same ones each time; and the first one of a report.
        report: is added to.

    Raises:
        Differs: naming the first document that was found to differ.
    """
    skipped: Counter[str] = Counter()
    texts, rows = _with_text(texts.cast(pa.large_binary()), first_row, skipped)
    data, offsets = _buffers(texts)
    sizes = np.diff(offsets)
    hashes = _hashes(data, offsets)
    left = np.ones(len(rows), dtype=bool) if fast is None else left_to_reference(data, offsets)

    counts, fit = np.zeros(len(rows), dtype=np.int64), np.ones(len(rows), dtype=bool)
    slow: dict[int, np.ndarray] = {}
    for index in np.flatnonzero(left).tolist():
        try:
            slow[index] = reference(texts[index].as_py())
            counts[index] = len(slow[index])
        except Unfit as reason:
            skipped[str(reason)] += 1
            fit[index] = False
    quick = ~left
    flat = np.zeros(0, dtype=np.uint32)
    if fast is not None and quick.any():
        part = _buffers(texts.filter(pa.array(quick))) if left.any() else (data, offsets)
        flat, counts[quick] = fast.encode(*part)

    lengths = np.where(fit, counts + 1, 0)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.empty(starts[-1], dtype=TOKEN_DTYPE)
    free = np.ones(len(tokens), dtype=bool)
    begins = starts[:-1][fit]
    tokens[begins], free[begins] = EOT, False
    for index, encoded in slow.items():
        span = slice(starts[index] + 1, starts[index + 1])
        tokens[span], free[span] = encoded, False
    tokens[free] = flat

    if check_fraction:
        chosen = hashes >> np.uint64(40) < check_fraction * 2**24
        if not report.checked:
            chosen[np.flatnonzero(quick)[:1]] = True
        for index in np.flatnonzero(chosen & quick).tolist():
            report.checked += 1
            found = tokens[starts[index] + 1 : starts[index + 1]]
            if not np.array_equal(found, reference(texts[index].as_py())):
                raise Differs(int(rows[index]))
    for name, mask in (("gigatoken", quick), ("tiktoken", left & fit)):
        report.documents[name] += int(mask.sum())
        report.bytes[name] += int(sizes[mask].sum())
    return Encoded(
        tokens=tokens,
        starts=np.append(begins, len(tokens)),
        rows=rows[fit],
        hashes=hashes[fit],
        text_bytes=sizes[fit],
        skipped=skipped,
    )


def _with_text(
    texts: pa.Array, first_row: int, skipped: Counter[str]
) -> tuple[pa.Array, np.ndarray]:
    """The texts that are neither null nor empty and are UTF-8, and their rows; the rest counted."""
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
    rows = np.flatnonzero(keep) + first_row
    return (texts if keep.all() else texts.filter(pa.array(keep))), rows


def _buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes behind a large_binary array, (n,) uint8, and its (d + 1,) int64 offsets."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    window = slice(texts.offset, texts.offset + len(texts) + 1)
    return np.frombuffer(data, dtype=np.uint8), np.frombuffer(offsets, dtype=np.int64)[window]


def _hashes(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(d,) uint64: xxh3_64 of each document."""
    view, borders = data.data, offsets.tolist()
    return np.array(
        [xxhash.xxh3_64_intdigest(view[start:stop]) for start, stop in pairwise(borders)],
        dtype=np.uint64,
    )
