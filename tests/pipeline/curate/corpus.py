"""A small source with duplicates, short texts and metadata, cut into files in any way."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format.parquet import FINEWEB_SCHEMA
from tests.support.small_data import describe, write_manifest

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("ll", "nd", "rs", "m")]
"""Distinct words; FILLER makes them look like English to the heuristics."""
FILLER = ["the", "of", "and", "to", "with", "that", "have", "be"]


def sentence(draw: random.Random, words: int = 14) -> str:
    """Return a sentence of random words."""
    chosen = [draw.choice(FILLER if i % 3 else WORDS) for i in range(words)]
    return " ".join(chosen).capitalize() + "."


def document(draw: random.Random, sentences: int = 9) -> str:
    """Return a text that all heuristics keep."""
    return " ".join(sentence(draw) for _ in range(sentences)) + "\n"


def some_rows(count: int = 60, seed: int = 1) -> list[dict[str, object]]:
    """Return rows: each seventh repeats one before, each ninth nearly; some are short or null."""
    draw = random.Random(seed)
    texts: list[str | None] = []
    for i in range(count):
        if i % 7 == 6:
            texts.append(texts[i - 5])
        elif i % 9 == 8 and (near := texts[i - 4]):
            texts.append(near.replace(" the ", " a ", 1))
        elif i % 20 == 3:
            texts.append((None, "", "Too short.", "日本語 の 文")[i // 20 % 4])
        else:
            texts.append(document(draw))
    return [
        {
            "text": text,
            "id": str(i),
            "dump": f"dump-{i % 2}",
            "url": f"https://example.org/{i}",
            "language": "de" if i % 10 == 1 else "en",
            "language_score": None if i == 30 else i % 8 / 8,
        }
        for i, text in enumerate(texts)
    ]


def write_source(folder: Path, rows: Sequence[dict[str, object]], borders: Sequence[int]) -> Path:
    """Write a `data/raw`: the rows, cut into files before the rows ``borders``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    edges = [0, *borders, len(rows)]
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        path = folder / f"part-{number:03d}.parquet"
        table = pa.Table.from_pylist(list(rows[first:last]), schema=FINEWEB_SCHEMA)
        pq.write_table(table, path, row_group_size=7)
        files.append(describe(path, last - first))
    write_manifest(folder, files)
    return folder
