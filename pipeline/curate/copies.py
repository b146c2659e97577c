"""Rules that compare rows with each other: exact and near duplicates, copies of validation rows.

```
rows of the source ── bands of their signatures ──► buckets: rows that agree on a band
                                                         │ similarity of two rows
                                                         ▼
                      in row order: near an earlier kept row? ──► dropped, with that row as its twin
```

Rows of validation come first where copies of them must not be in training: then each kept row is
far from all others that are kept, in both splits, and a twin is always a kept row.
"""

import os
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from pipeline.curate import near_duplicates
from pipeline.curate.decisions import Decisions
from pipeline.curate.pieces import Pieces
from pipeline.curate.signatures import HASHES
from pipeline.params import CurateParams
from pipeline.store.store import require_space

EXACT, NEAR, VAL_COPIES = "exact_duplicates", "near_duplicates", "validation_copies"

Shingles = Callable[[np.ndarray], Callable[[int], np.ndarray]]
"""Takes rows (k,) int64; returns a function from an index into them to the n-grams of that row."""


def drop_exact(
    pieces: Pieces, rows: np.ndarray, groups: np.ndarray | None, decisions: Decisions
) -> None:
    """Drop rows whose text is that of an earlier kept row.

    Args:
        rows: (k,) int64, ascending: the rows to compare.
        groups: (k,) int64: only rows of one group are compared; None: all.
    """
    hashes = pieces.gather("texts", "hashes.npy", rows, np.empty((len(rows), 2), np.uint64))
    twins = near_duplicates.exact_duplicates(hashes, decisions.kept[rows], groups)
    found = np.flatnonzero(twins >= 0)
    decisions.drop(EXACT, rows[found], twins=rows[twins[found]])


def drop_near(
    pieces: Pieces,
    rows: np.ndarray,
    groups: np.ndarray | None,
    params: CurateParams,
    is_val: np.ndarray,
    shingles: Shingles,
    decisions: Decisions,
) -> int:
    """Drop near duplicates and copies of validation rows, as the parameters ask.

    Args:
        rows: (k,) int64, ascending: the rows to compare.
        groups: (k,) int64: only rows of one group are compared; None: all.
        is_val: (k,) bool, the rows of validation.

    Returns:
        The number of training rows that are near a validation row, before near duplicates are
        dropped; 0 if these rows are dropped.
    """
    val_first = params.val_copies == "drop"
    order = np.argsort(~is_val, kind="stable") if val_first else np.arange(len(rows))
    in_order, is_val = rows[order], is_val[order]

    def keys() -> Iterator[np.ndarray]:
        for band in range(params.bands):
            out = np.empty(len(rows), np.uint64)
            yield pieces.gather("bands", "bands.npy", rows, out, band)[order]

    kept = decisions.kept[in_order]
    buckets = near_duplicates.shared_buckets(
        keys(), kept, None if groups is None else groups[order]
    )
    similarity = _similarity(pieces, in_order, buckets.rows, params, shingles)
    near_val = 0
    if not (params.near_duplicates and val_first):
        twins, values = near_duplicates.decide(
            buckets, len(rows), similarity, params.similarity, reference=is_val & kept
        )
        twins = np.where(kept & ~is_val, twins, -1)
        if val_first:
            _drop(VAL_COPIES, in_order, twins, values, decisions)
        else:
            near_val = int(np.count_nonzero(twins >= 0))
    if params.near_duplicates:
        if params.clusters == "components":
            twins = near_duplicates.components(buckets, len(rows))
            values = np.full(len(rows), np.nan)
        else:
            twins, values = near_duplicates.decide(
                buckets, len(rows), similarity, params.similarity
            )
        is_copy = is_val[twins] & ~is_val if val_first else np.zeros(len(rows), bool)
        _drop(NEAR, in_order, np.where(is_copy, -1, twins), values, decisions)
        if val_first:
            _drop(VAL_COPIES, in_order, np.where(is_copy, twins, -1), values, decisions)
    return near_val


def _drop(
    rule: str, rows: np.ndarray, twins: np.ndarray, values: np.ndarray, decisions: Decisions
) -> None:
    """Drop the rows that have a twin.

    Args:
        rows: (k,) int64.
        twins: (k,) int64, indices into ``rows``; -1: none.
    """
    found = np.flatnonzero(twins >= 0)
    decisions.drop(rule, rows[found], values=values[found], twins=rows[twins[found]])


def _similarity(
    pieces: Pieces,
    rows: np.ndarray,
    candidates: np.ndarray,
    params: CurateParams,
    shingles: Shingles,
) -> near_duplicates.Similarity | None:
    """Return the similarity of rows that share a bucket.

    Args:
        rows: (k,) int64, the rows compared, numbered in the source.
        candidates: (m,) int64, indices into ``rows``: those that share a bucket.
    """
    if params.compare is None:
        return None
    at = rows[candidates]
    order = np.argsort(at)  # of the source: rows of validation may come first here
    position = np.empty_like(order)
    position[order] = np.arange(len(at))
    if params.compare == "text":
        in_order = near_duplicates.exactly(shingles(at[order]))
    else:
        in_order = near_duplicates.estimate(_signatures(pieces, at[order]))

    def similarity(row: int, others: np.ndarray) -> np.ndarray:
        index = int(position[np.searchsorted(candidates, row)])
        return in_order(index, position[np.searchsorted(candidates, others)])

    return similarity


def _signatures(pieces: Pieces, rows: np.ndarray) -> np.ndarray:
    """Copy the signatures of ascending rows to a temporary file: (k, HASHES) uint16."""
    shape = (len(rows), HASHES)
    if not len(rows):
        return np.zeros(shape, np.uint16)
    size = 2 * HASHES * len(rows)
    require_space(pieces.store.root, size, "the signatures of rows to compare")
    with tempfile.TemporaryFile(dir=pieces.store.root) as file:
        # A full disk is an error here; while mapped memory is written, it is SIGBUS.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.truncate(size)
        out: np.ndarray = np.memmap(file, np.uint16, "r+", shape=shape)
    pieces.gather("signatures", "signatures.npy", rows, out)
    return out
