"""What the data are like: counted by the tasks of `verify`, a shard and a source file at a time.

What is a function of tokens is counted from the shards; where texts come from, and FineWeb's own
count of tokens, is read from the cheap columns of `data/raw`.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.format.manifest import SPLITS, Manifest, Split
from pipeline.format.parquet import open_parquet
from pipeline.tokenize.encode_chunk import read_engine

TOP = 20
"""Dumps and hosts that are named."""

_COLUMNS = {"dump": pa.string(), "url": pa.string(), "token_count": pa.int64()}
_BATCH_ROWS = 1 << 15
# A counter of names is cut to so many when it has twice as many: what it then says of a rare one
# is too low, of a frequent one it is not.
_NAMES = 1 << 17
# Hashes that are held: 1 GB. Beyond it, those of one text in 2, 4, ... are.
_HASHES = 1 << 27


@dataclass(frozen=True)
class ShardFacts:
    """Of one shard."""

    split: Split
    lengths: np.ndarray
    """(32,) int64: documents of 2^i to 2^(i+1) - 1 tokens."""
    shortest: tuple[int, str] | None
    """Tokens, and which document: source file and row."""
    longest: tuple[int, str] | None
    hashes: np.ndarray
    """(docs,) uint64, equal for equal texts."""


@dataclass
class SourceFacts:
    """Of one source file."""

    dumps: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)
    counted: int = 0
    """Documents with a `token_count`."""
    agreeing: int = 0
    """Those of them that have as many tokens here."""


def length_bins(lengths: np.ndarray) -> np.ndarray:
    """(32,) int64: how many of the (n,) lengths, 1 or more, are 2^i to 2^(i+1) - 1."""
    return np.bincount(np.frexp(lengths)[1] - 1, minlength=32)


def source_facts(path: Path, counts: np.ndarray) -> SourceFacts:
    """Read the cheap columns of a source file, as far as it has them.

    Nothing is said of a file in which they cannot be read: its text can, and that is what counts.

    Args:
        counts: (rows,) the tokens of each row's text, without `<|endoftext|>`; -1: not encoded.
    """
    try:
        return _read_columns(path, counts)
    except (pa.ArrowException, OSError, ValueError):
        return SourceFacts()


def _read_columns(path: Path, counts: np.ndarray) -> SourceFacts:
    facts = SourceFacts()
    with open_parquet(path) as file:
        schema = file.schema_arrow
        names = [n for n, kind in _COLUMNS.items() if n in schema.names and _is(schema, n, kind)]
        if not names:
            return facts
        row = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
            kept = counts[row : row + len(batch)]
            row += len(batch)
            if "dump" in names:
                _count(facts.dumps, batch.column("dump"))
            if "url" in names:
                _count(facts.hosts, hosts(batch.column("url")))
            if "token_count" in names:
                column = batch.column("token_count")
                said = column.fill_null(-2).to_numpy(zero_copy_only=False)
                facts.counted += int(((said >= 0) & (kept >= 0)).sum())
                facts.agreeing += int(((said == kept) & (kept >= 0)).sum())
    return facts


def _is(schema: pa.Schema, name: str, kind: pa.DataType) -> bool:
    found = schema.field(name).type
    return bool(found == kind or (kind == pa.string() and pa.types.is_large_string(found)))


def hosts(urls: pa.Array) -> pa.Array:
    """The hosts of web addresses, in lower case; null where there is none."""
    pattern = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>[^/?#:]+)"
    return pc.utf8_lower(pc.struct_field(pc.extract_regex(urls, pattern), "host"))


def _count(counter: Counter[str], names: pa.Array) -> None:
    for entry in pc.value_counts(names.drop_null()).to_pylist():
        counter[entry["values"]] += entry["counts"]
    _cut(counter)


def _cut(counter: Counter[str]) -> None:
    if len(counter) > 2 * _NAMES:
        most = counter.most_common(_NAMES)
        counter.clear()
        counter.update(dict(most))


class Copies:
    """Counts documents whose text has come before, by 64-bit hashes: 8 bytes a document.

    Beyond ``limit`` hashes it holds those of one text in 2, 4, 8, ..., chosen by the hash itself,
    so that all copies of a text are held or none, and says what that comes to for the whole.
    """

    def __init__(self, limit: int = _HASHES) -> None:
        self.limit = limit
        self.halvings = 0
        self._held: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}

    def add(self, split: Split, hashes: np.ndarray) -> None:
        """Take the hashes of a shard's documents."""
        self._held[split].append(self._sampled(hashes))
        while sum(len(part) for parts in self._held.values() for part in parts) > self.limit:
            self.halvings += 1
            self._held = {s: [self._sampled(p) for p in parts] for s, parts in self._held.items()}

    def _sampled(self, hashes: np.ndarray) -> np.ndarray:
        if not self.halvings:
            return hashes
        return hashes[hashes >> np.uint64(64 - self.halvings) == 0]

    def count(self) -> tuple[int, int]:
        """Documents that repeat one before them, and validation documents whose text is trained on.

        Both are estimates where texts were left out.
        """
        # Sorted: of uint64 numpy does that 200 times as fast as `np.unique` and `np.isin`.
        train, val = (np.concatenate([np.zeros(0, np.uint64), *self._held.pop(s)]) for s in SPLITS)
        train.sort()
        val.sort()
        is_first = np.append(True, val[1:] != val[:-1])[: len(val)]
        is_shared = np.zeros(len(val), bool)
        if len(train):
            nearest = np.searchsorted(train, val).clip(max=len(train) - 1)
            is_shared = train[nearest] == val
        distinct = np.count_nonzero(train[1:] != train[:-1]) + bool(len(train))
        distinct += np.count_nonzero(is_first & ~is_shared)
        repeated = len(train) + len(val) - int(distinct)
        return repeated << self.halvings, int(is_shared.sum()) << self.halvings


class DataReport:
    """What the tasks found, added up."""

    def __init__(self) -> None:
        self.lengths = np.zeros(32, np.int64)
        self.shortest: tuple[int, str] | None = None
        self.longest: tuple[int, str] | None = None
        self.source = SourceFacts()
        self.copies = Copies()

    def add_shard(self, facts: ShardFacts) -> None:
        """Take what is known of a shard."""
        self.lengths += facts.lengths
        # Of several, the same one in whatever order the shards come.
        self.shortest = min(filter(None, (self.shortest, facts.shortest)), default=None)
        longest = filter(None, (self.longest, facts.longest))
        self.longest = min(longest, key=lambda entry: (-entry[0], entry[1]), default=None)
        self.copies.add(facts.split, facts.hashes)

    def add_source(self, facts: SourceFacts) -> None:
        """Take what is known of a source file."""
        self.source.counted += facts.counted
        self.source.agreeing += facts.agreeing
        for mine, others in ((self.source.dumps, facts.dumps), (self.source.hosts, facts.hosts)):
            mine.update(others)
            _cut(mine)

    def metrics(self, manifest: Manifest, engines: dict[str, float]) -> dict[str, Any]:
        """The figures of `metrics/data.json`.

        Args:
            engines: what `engine_metrics` gives.
        """
        train, val = manifest.totals["train"], manifest.totals["val"]
        n_tokens, n_docs = train.tokens + val.tokens, train.docs + val.docs
        text_bytes = train.text_bytes + val.text_bytes
        repeated, shared = self.copies.count()
        metrics: dict[str, Any] = {
            "documents": n_docs,
            "tokens": n_tokens,
            "train_tokens": train.tokens,
            "val_tokens": val.tokens,
            "text_bytes": text_bytes,
            "bytes_per_token": round(text_bytes / max(n_tokens - n_docs, 1), 4),
            "tokens_per_document": round(n_tokens / max(n_docs, 1), 1),
            "shards": train.shards + val.shards,
            "skipped": sum(manifest.skipped.values()),
            "duplicate_documents": repeated,
            "val_documents_in_train": shared,
            **engines,
        }
        for name, entry in (("shortest", self.shortest), ("longest", self.longest)):
            if entry is not None:
                metrics |= {f"{name}_document": entry[0], f"{name}_document_at": entry[1]}
        if self.source.counted:
            share = self.source.agreeing / self.source.counted
            metrics["token_count_agreement"] = round(share, 6)
        return metrics

    def tables(self) -> dict[str, str]:
        """The tables of the plots, as CSV, by their names."""
        sizes = [1 << int(i) for i in np.flatnonzero(self.lengths)]
        lengths = [
            (f"{size:,} to {2 * size - 1:,}", self.lengths[size.bit_length() - 1]) for size in sizes
        ]
        return {
            "document_lengths": _table("tokens", lengths),
            "dumps": _table("dump", _top(self.source.dumps)),
            "hosts": _table("host", _top(self.source.hosts)),
        }


def _top(counter: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counter.items(), key=lambda entry: (-entry[1], entry[0]))[:TOP]


def _table(name: str, rows: Iterable[tuple[str, int]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([name, "documents"])
    writer.writerows(rows)
    return table.getvalue()


def engine_metrics(pieces: Sequence[Path]) -> dict[str, float]:
    """The share of the text's bytes that each engine encoded, from the chunks' pieces in the store.

    Nothing where the pieces are not here, or were made without engines.
    """
    sizes: Counter[str] = Counter()
    differences = 0
    for piece in pieces:
        try:
            note = read_engine(piece)
        except (OSError, ValueError):
            continue
        sizes.update(note["bytes"])
        differences += len(note["differences"])
    if not (total := sum(sizes.values())):
        return {}
    shares = {f"{name}_share": round(size / total, 6) for name, size in sorted(sizes.items())}
    return {**shares, "engine_differences": differences}
