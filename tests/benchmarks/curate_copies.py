"""Near duplicates of known similarity: how many are found, and what is dropped that is not near.

Copies of real documents are made by changing scattered words, a block of words, or by wrapping the
text in that of another document. The Jaccard similarity s of each pair is computed exactly, from
the n-grams of both texts, so the rate of hits to expect is the mean of ``1 - (1 - s**r)**b`` over
the pairs, and its standard error follows from the same probabilities.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curate import near_duplicates, signatures
from pipeline.curate.hashing import splitmix64
from pipeline.curate.signatures import HASHES
from pipeline.curate.words import Texts, as_texts

LAYOUTS = ((14, 8), (16, 7))
EDGES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Bins of Jaccard similarity."""
WORDS = (60, 2000)
"""Documents of fewer words are left out; longer ones are cut."""
SIMILARITY = 0.7
"""Threshold of the stage by default."""
BATCH = 2000


class Kind(NamedTuple):
    """A way to make copies."""

    name: str
    make: Callable[[np.ndarray, np.ndarray, float, np.random.Generator], np.ndarray]
    """Words of a document and of another one, the part to change, random numbers -> a copy."""
    least: float
    most: float
    """Bounds of the part of the words that is changed or added."""


def scattered(
    words: np.ndarray, other: np.ndarray, part: float, rng: np.random.Generator
) -> np.ndarray:
    """Replace single words, anywhere."""
    copy, count = words.copy(), max(1, round(part * len(words)))
    at = rng.choice(len(words), count, replace=False)
    copy[at] = rng.choice(other, count)
    return copy


def block(
    words: np.ndarray, other: np.ndarray, part: float, rng: np.random.Generator
) -> np.ndarray:
    """Replace consecutive words."""
    copy, count = words.copy(), max(1, round(part * len(words)))
    first = rng.integers(len(words) - count + 1)
    copy[first : first + count] = np.resize(other, count)
    return copy


def wrapped(
    words: np.ndarray, other: np.ndarray, part: float, rng: np.random.Generator
) -> np.ndarray:
    """Add words before and after the text."""
    added = np.resize(other, max(1, round(part * len(words))))
    before = rng.integers(len(added) + 1)
    return np.concatenate([added[:before], words, added[before:]])


KINDS = (
    Kind("words, 0.5 to 2.5 % changed", scattered, 0.005, 0.025),
    Kind("a block, 2 to 10 % changed", block, 0.02, 0.10),
    Kind("2 to 20 % added around it", wrapped, 0.02, 0.20),
)
FAR = Kind("words, 2.5 to 12 % changed", scattered, 0.025, 0.12)
"""For the lower part of the curve; not among the copies that are to be found."""


def read_texts(folders: Sequence[Path], most: int) -> list[str]:
    """Read documents of parquet files, spread evenly over all."""
    files = [path for folder in folders for path in sorted(folder.rglob("*.parquet"))]
    tables = [pq.read_table(path, columns=["text"])["text"] for path in files]
    column = pa.chunked_array([chunk for table in tables for chunk in table.chunks])
    rows = np.unique(np.linspace(0, len(column) - 1, most).astype(int))
    texts: list[str] = column.take(pa.array(rows)).to_pylist()
    return texts


def batch(texts: Sequence[str]) -> Texts:
    return as_texts(pa.array(texts, pa.large_string()))


def plant(texts: Sequence[str], seed: int = 1) -> tuple[list[str], dict[str, list[str]]]:
    """Return the documents that are long enough, and a copy of each of every kind."""
    rng = np.random.default_rng(seed)
    words = [np.array(text.split()[: WORDS[1]], dtype=object) for text in texts]
    words = [each for each in words if len(each) >= WORDS[0]]
    copies: dict[str, list[str]] = {}
    for kind in (*KINDS, FAR):
        parts = rng.uniform(kind.least, kind.most, len(words))
        others = np.roll(np.arange(len(words)), 1 + rng.integers(len(words) - 1))
        made = (
            kind.make(each, words[other], part, rng)
            for each, other, part in zip(words, others, parts.tolist(), strict=True)
        )
        copies[kind.name] = [" ".join(copy) for copy in made]
    return [" ".join(each) for each in words], copies


def sign(texts: Sequence[str], seed: int) -> np.ndarray:
    """Sign texts with the hash functions of a seed; 112 is that of the project."""
    multipliers = splitmix64(seed, HASHES) | np.uint64(1)
    with patch.object(signatures, "multipliers", lambda: multipliers):
        parts = [signatures.sign(batch(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)]
    return np.concatenate(parts)


def shingles(texts: Sequence[str]) -> list[np.ndarray]:
    return [
        each
        for first in range(0, len(texts), BATCH)
        for each in signatures.shingles(batch(texts[first : first + BATCH]))
    ]


def chance(jaccard: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Return the probability that pairs of these similarities agree on a band."""
    probability: np.ndarray = 1 - (1 - jaccard**rows) ** bands
    return probability


class Pairs(NamedTuple):
    """Pairs of a document and its copy."""

    jaccard: np.ndarray
    """(k,) float64, exact."""
    is_far: np.ndarray
    """(k,) bool: of the kind `FAR`."""
    hits: dict[tuple[int, int], np.ndarray]
    """By bands and rows: (seeds, k) bool."""


def measure_pairs(texts: Sequence[str], copies: dict[str, list[str]], seeds: int) -> Pairs:
    """Compute the similarity of each document with its copies, and which pairs are hits."""
    n, flat = len(texts), [copy for kind in copies.values() for copy in kind]
    exact = near_duplicates.exactly((sets := shingles([*texts, *flat])).__getitem__)
    pairs = range(n, len(sets))
    jaccard = np.array([exact(row, np.array([(row - n) % n]))[0] for row in pairs])
    is_far = np.repeat(np.array(list(copies)) == FAR.name, n)
    hits: dict[tuple[int, int], list[np.ndarray]] = {layout: [] for layout in LAYOUTS}
    for seed in range(112, 112 + seeds):
        signed = sign([*texts, *flat], seed)
        for layout in LAYOUTS:
            keys = near_duplicates.band_keys(signed, *layout)
            own = np.tile(keys[:, :n], len(copies))
            hits[layout].append((own == keys[:, n:]).any(axis=0))
    return Pairs(jaccard, is_far, {layout: np.stack(rows) for layout, rows in hits.items()})


def curve_table(pairs: Pairs) -> list[str]:
    """Return the rates of hits by Jaccard similarity as a Markdown table."""
    titles = [f"{b} x {r}, {what}" for b, r in LAYOUTS for what in ("expected", "found")]
    lines = [f"| Jaccard | pairs | {' | '.join(titles)} |", f"|---|---|{'---|' * len(titles)}"]
    rows = [
        (f"{low} to {high}", (pairs.jaccard >= low) & (pairs.jaccard < high + (high == 1)))
        for low, high in pairwise(EDGES)
    ]
    near = ~pairs.is_far
    rows += [(f"from {low}, near kinds", near & (pairs.jaccard >= low)) for low in (0.8, 0.85)]
    for name, inside in rows:
        if not inside.any():
            continue
        cells = [name, f"{inside.sum():,}"]
        for layout in LAYOUTS:
            found = pairs.hits[layout][:, inside]
            expected = chance(pairs.jaccard[inside], *layout)
            error = np.sqrt((expected * (1 - expected)).sum() * len(found)) / found.size
            apart = (found.mean() - expected.mean()) / max(error, 1e-12)
            cells += [f"{expected.mean():.4f}", f"{found.mean():.4f} ({apart:+.1f} errors)"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def decision_table(texts: Sequence[str], copies: dict[str, list[str]]) -> list[str]:
    """Decide on documents and copies in row order; return what was dropped as a Markdown table."""
    near = {kind: made for kind, made in copies.items() if kind != FAR.name}
    lines = [
        "| bands x rows | copies | `compare` | dropped | under 0.6 to the twin | least Jaccard |",
        "|---|---|---|---|---|---|",
    ]
    for title, planted in (("near kinds", near), ("all kinds", copies)):
        rows = [*texts, *(copy for kind in planted.values() for copy in kind)]
        sets, signed = shingles(rows), sign(rows, 112)
        exact = near_duplicates.exactly(sets.__getitem__)
        for layout in LAYOUTS:
            keys = near_duplicates.band_keys(signed, *layout)
            buckets = near_duplicates.shared_buckets(keys, np.ones(len(rows), bool))
            for name, similarity in (
                ("null", None),
                ("signatures", near_duplicates.estimate(signed)),
                ("text", exact),
            ):
                twins = near_duplicates.decide(buckets, len(rows), similarity, SIMILARITY).twins
                dropped = np.flatnonzero(twins >= 0).tolist()
                jaccard = np.array([exact(row, twins[row : row + 1])[0] for row in dropped])
                below = int((jaccard < 0.6).sum())
                lines.append(
                    f"| {layout[0]} x {layout[1]} | {title} | {name} | {len(dropped):,} of "
                    f"{len(rows):,} | {below:,}, {below / len(rows):.2%} of all rows | "
                    f"{jaccard.min():.3f} |"
                )
    return lines


def copies_part(folders: Sequence[Path], documents: int, seeds: int) -> str:
    """Return the tables of hits and decisions."""
    texts, copies = plant(read_texts(folders, documents))
    lines = [
        f"{len(texts):,} documents and {len(copies)} copies of each, with {seeds} sets of hash "
        "functions. An error is the standard error of the number of hits.",
        "",
        *curve_table(measure_pairs(texts, copies, seeds)),
        "",
        f"The same documents and copies, decided in row order with `similarity: {SIMILARITY}`:",
        "",
        *decision_table(texts, copies),
    ]
    return "\n".join(lines)
