"""Measure one chunk of the source: the work of a Ray task.

What the rules need to know about each row is kept in the store, one piece per kind of fact and
chunk, and no decision is. So another threshold reads no text, and one more source file costs only
the measuring of that file.

```
columns         columns.parquet     the values of the columns that rules name, and the dump
measures        measures.parquet    integer counts of the heuristics: words, lines, ...
contamination   found.npy           (f, 3) int64: row in the chunk, task, n-grams of words in common
texts           hashes.npy          (rows, 2) uint64: xxh3_128 of the text
                split.npy           (rows,) uint64: xxh3_64, which decides the split
signatures      signatures.npy      (rows, 112) uint16: MinHash
bands           bands.npy           (bands, rows) uint64: made from the signatures alone
```
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.curate import decontaminate, heuristics, near_duplicates, signatures, words
from pipeline.curate.piece_files import RowsFile, TableFile
from pipeline.curate.words import Texts
from pipeline.format.parquet import as_binary, is_text, open_parquet, read_batches, read_columns
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.params_file import nearest
from pipeline.store import atomic
from pipeline.store.code_key import modules_key
from pipeline.store.store import Store
from pipeline.tokenize.chunk_plan import Chunk

CHUNK_TOKENS = 30_000_000
"""Size of a chunk, in tokens as `plan_chunks` estimates them: 135 MB of text."""

_ROOM = Path("pipeline/curate")
_READS_TEXT = ("words.py", "characters.py", "hashing.py", "measure_chunk.py", "piece_files.py")
MODULES: dict[str, tuple[str, ...]] = {
    "columns": ("measure_chunk.py", "piece_files.py"),
    "measures": ("heuristics.py", "quality.py", "repetition.py", "surface.py", *_READS_TEXT),
    "contamination": ("decontaminate.py", *_READS_TEXT),
    "texts": ("near_duplicates.py", "signatures.py", *_READS_TEXT),
    "signatures": ("signatures.py", *_READS_TEXT),
    "bands": ("near_duplicates.py", "signatures.py", *_READS_TEXT),
    "shingles": ("signatures.py", *_READS_TEXT),
}
"""The modules of this room that decide a piece of each kind."""


@dataclass(frozen=True)
class Facts:
    """What the rules need to know about the rows."""

    columns: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    limits: heuristics.Limits | None = None
    tasks: decontaminate.Index | None = None
    has_texts: bool = False
    ngram: int | None = None
    bands: tuple[int, int] | None = None
    """Bands, and hashes per band."""


@lru_cache(maxsize=1)
def code_keys() -> dict[str, str]:
    """Return the hash of the code that decides the pieces of each kind."""
    root = Path(__file__).parents[2]
    reader = Path("pipeline/format/parquet.py")
    return {
        kind: modules_key([reader, *(_ROOM / name for name in sorted(names))], root)
        for kind, names in MODULES.items()
    }


def piece_keys(chunk: Chunk, column: str, facts: Facts, code: Mapping[str, str]) -> dict[str, str]:
    """Return the key of each piece of a chunk, by kind.

    Args:
        column: The column of the text.
        code: `code_keys`.
    """
    base = {"file": chunk.file.sha256, "rows": [chunk.start, chunk.stop]}
    of_text = {**base, "column": column}
    keys: dict[str, str] = {}

    def add(kind: str, decides: Mapping[str, Any]) -> None:
        keys[kind] = atomic.sha256_json({**decides, "code": code[kind]})

    if facts.columns:
        add("columns", {**base, "columns": list(facts.columns)})
    if facts.sets:
        limits = facts.limits._asdict() if facts.limits else {}
        add("measures", {**of_text, "sets": list(facts.sets), "limits": limits})
    if facts.tasks is not None:
        add("contamination", {**of_text, "tasks": facts.tasks.key})
    if facts.has_texts:
        add("texts", of_text)
    if facts.ngram is not None:
        add("signatures", {**of_text, "ngram": facts.ngram})
    if facts.bands is not None:
        add("bands", {"signatures": keys["signatures"], "bands": list(facts.bands)})
    return keys


def measure_chunk(
    chunk: Chunk, raw: Path, column: str, keys: Mapping[str, str], store: Store, facts: Facts
) -> int:
    """Build those pieces of a chunk that the store lacks; return the bytes of text read.

    Args:
        keys: `piece_keys`.

    Raises:
        UserError: The file is damaged, or has no such column of numbers or strings.
    """
    with contextlib.ExitStack() as locks:
        for kind, key in sorted(keys.items()):
            locks.enter_context(store.lock(kind, key))
        missing = [kind for kind, key in keys.items() if store.find(kind, key) is None]
        if "columns" in missing:
            with store.make("columns", keys["columns"]) as folder:
                _write_columns(chunk, raw, facts.columns, folder / "columns.parquet")
        size = 0
        if makers := [kind for kind in missing if kind in _WRITERS]:
            size = _read_text(
                chunk, raw, column, facts, {kind: keys[kind] for kind in makers}, store
            )
        if facts.bands is not None and "bands" in missing:
            made = store.path("signatures", keys["signatures"]) / "signatures.npy"
            found = near_duplicates.band_keys(np.load(made, mmap_mode="r"), *facts.bands)
            with store.make("bands", keys["bands"]) as folder:
                np.save(folder / "bands.npy", found)
    return size


def shingles_key(
    chunk: Chunk, column: str, ngram: int, rows: np.ndarray, code: Mapping[str, str]
) -> str:
    """Return the key of the piece that `write_shingles` makes."""
    return atomic.sha256_json(
        {
            "file": chunk.file.sha256,
            "rows": [chunk.start, chunk.stop],
            "column": column,
            "ngram": ngram,
            "chosen": sha256(rows.tobytes()).hexdigest(),
            "code": code["shingles"],
        }
    )


def write_shingles(
    chunk: Chunk, raw: Path, column: str, ngram: int, rows: np.ndarray, key: str, store: Store
) -> int:
    """Write the n-grams of some rows, to compare these exactly; return the bytes of text read.

    Args:
        rows: (k,) int64, ascending: rows of the chunk.
    """
    found, size, done = [np.zeros(0, np.uint64)], 0, 0
    lengths = np.zeros(len(rows) + 1, np.int64)
    for first, batch in read_batches(raw / chunk.file.path, column, chunk.start, chunk.stop):
        local = first - chunk.start
        chosen = rows[(rows >= local) & (rows < local + len(batch))]
        if not len(chosen):
            continue
        texts = words.as_texts(_utf8_only(batch.take(pa.array(chosen - local))))
        size += len(texts.data)
        sets = signatures.shingles(texts, ngram)
        lengths[done + 1 : done + 1 + len(sets)] = [len(values) for values in sets]
        found += sets
        done += len(sets)
    with store.lock("shingles", key), store.make("shingles", key) as folder:
        np.save(folder / "starts.npy", np.cumsum(lengths))
        np.save(folder / "shingles.npy", np.concatenate(found))
    return size


def _read_text(
    chunk: Chunk, raw: Path, column: str, facts: Facts, keys: Mapping[str, str], store: Store
) -> int:
    """Read the chunk's text once, and write all pieces that are made from it."""
    size = 0
    with contextlib.ExitStack() as stack:
        writers = []
        for kind, key in keys.items():
            folder = stack.enter_context(store.make(kind, key))
            writers.append(stack.enter_context(_WRITERS[kind](folder, chunk, facts)))
        for first, column_texts in read_batches(
            raw / chunk.file.path, column, chunk.start, chunk.stop
        ):
            texts = words.as_texts(_utf8_only(column_texts))
            size += len(texts.data)
            for writer in writers:
                writer(first - chunk.start, texts)
    return size


def _utf8_only(texts: pa.Array) -> pa.Array:
    """Replace what is not UTF-8 by null: `tokenize` skips such texts, and they have no words."""
    try:
        texts.cast(pa.large_string())
    except pa.ArrowInvalid:
        decoded = [text and text.decode(errors="ignore").encode() for text in texts.to_pylist()]
        is_utf8 = pc.equal(texts, pa.array(decoded, texts.type))
        return pc.if_else(is_utf8, texts, pa.scalar(None, texts.type))
    return texts


Writer = Callable[[int, Texts], None]
"""Takes the number of a batch's first row in the chunk, and its texts."""


@contextlib.contextmanager
def _measures(folder: Path, chunk: Chunk, facts: Facts) -> Iterator[Writer]:
    limits = facts.limits or heuristics.Limits()
    with TableFile(folder / "measures.parquet") as file:
        yield lambda _, texts: file.append(heuristics.measure(texts, facts.sets, limits))


@contextlib.contextmanager
def _contamination(folder: Path, chunk: Chunk, facts: Facts) -> Iterator[Writer]:
    assert facts.tasks is not None
    tasks, rows = facts.tasks, [np.zeros((0, 3), np.int64)]

    def write(first: int, texts: Texts) -> None:
        found = decontaminate.find(texts, tasks)
        rows.append(np.column_stack([found.rows + first, found.items, found.counts]))

    yield write
    np.save(folder / "found.npy", np.concatenate(rows))


@contextlib.contextmanager
def _texts(folder: Path, chunk: Chunk, facts: Facts) -> Iterator[Writer]:
    rows = chunk.stop - chunk.start
    with (
        RowsFile(folder / "hashes.npy", (rows, 2), "<u8") as hashes,
        RowsFile(folder / "split.npy", (rows,), "<u8") as split,
    ):

        def write(_: int, texts: Texts) -> None:
            hashes.append(near_duplicates.text_hashes(texts))
            view, borders = texts.data.data, pairwise(texts.offsets.tolist())
            found = [xxhash.xxh3_64_intdigest(view[a:b]) for a, b in borders]
            split.append(np.array(found, np.uint64))

        yield write


@contextlib.contextmanager
def _signatures(folder: Path, chunk: Chunk, facts: Facts) -> Iterator[Writer]:
    ngram, shape = facts.ngram or 0, (chunk.stop - chunk.start, signatures.HASHES)
    with RowsFile(folder / "signatures.npy", shape, "<u2") as file:
        yield lambda _, texts: file.append(signatures.sign(texts, ngram))


_WRITERS = {
    "measures": _measures,
    "contamination": _contamination,
    "texts": _texts,
    "signatures": _signatures,
}


def _write_columns(chunk: Chunk, raw: Path, columns: Sequence[str], target: Path) -> None:
    """Copy the chunk's rows of some columns; strings in any layout become one type."""
    path = raw / chunk.file.path
    with open_parquet(path) as file:
        for name in columns:
            _check_column(file.schema_arrow, chunk.file.path, name)
    with TableFile(target) as table:
        for batch in read_columns(path, columns, chunk.start, chunk.stop):
            table.append({name: _plain(batch.column(name)) for name in columns})


def _check_column(schema: pa.Schema, file: str, name: str) -> None:
    if schema.names.count(name) != 1:
        raise UserError(
            f"params.yaml: curate: {file} has no column {name!r}, or several; "
            f"{printable(nearest(name, schema.names))[:200]}"
        )
    kind = schema.field(schema.names.index(name)).type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise UserError(
            f"params.yaml: curate: column {name!r} of {file} holds {kind}; name one of numbers "
            "or strings"
        )


def _plain(values: pa.Array) -> pa.Array:
    """Return strings in one layout; those that are not UTF-8 are null."""
    if not is_text(values.type):
        return values
    return _utf8_only(as_binary(values)).cast(pa.large_string())
