"""Statistics of the data, collected by the tasks of `verify` per shard and per source file.

Token statistics come from the shards. Dumps, hosts and FineWeb's own token counts come from the
metadata columns of `data/raw`.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.format.manifest import SPLITS, Manifest, Split
from pipeline.format.parquet import as_binary, is_text, open_parquet
from pipeline.runtime.errors import printable
from pipeline.tokenize.chunk_record import read_engine_report

COMPARED = ("documents", "tokens", "skipped", "duplicates")
"""Those statistics that are metrics, by which data sets are compared."""

TOP = 20
"""The number of dumps and of hosts in the report."""

NOT_KEPT = -2
"""In place of a number of tokens: the row was dropped by stage `curate`."""

_COLUMNS = {"dump": pa.string(), "url": pa.string(), "token_count": pa.int64()}
_BATCH_ROWS = 1 << 15
# A tweet has more. Documents that are shorter on average are probably lines of longer ones.
_SHORT_TOKENS = 30
# A counter with twice as many names is cut to this many: counts of rare names become too low, those
# of frequent names stay exact.
_MAX_NAMES = 1 << 17
# 1 GB. Above it, only the hashes of one text in 2, 4, ... are kept.
_MAX_HASHES = 1 << 27


@dataclass(frozen=True)
class ShardFacts:
    """Statistics of one shard."""

    split: Split
    lengths: np.ndarray
    """(32,) int64: documents of 2^i to 2^(i + 1) - 1 tokens."""
    shortest: tuple[int, str] | None
    """Tokens of the shortest document, and its source file and row."""
    longest: tuple[int, str] | None
    hashes: np.ndarray
    """(docs,) uint64; equal for equal texts."""


@dataclass
class SourceFacts:
    """Statistics of one source file."""

    dumps: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)
    counted: int = 0
    """Documents with a `token_count`."""
    agreeing: int = 0
    """Documents whose `token_count` is their number of tokens here."""


def source_facts(path: Path, counts: np.ndarray) -> SourceFacts:
    """Read the metadata columns of a source file, as far as it has them.

    A file in which they cannot be read contributes nothing: only its text column is required.

    Args:
        counts: (rows,) tokens of each row's text, without `<|endoftext|>`; -1 if not encoded;
            `NOT_KEPT` if the row is no part of the data.
    """
    try:
        return _read_columns(path, counts)
    except (pa.ArrowException, OSError, ValueError):
        return SourceFacts()


def _read_columns(path: Path, counts: np.ndarray) -> SourceFacts:
    facts = SourceFacts()
    with open_parquet(path) as file:
        schema = file.schema_arrow
        names = [name for name, kind in _COLUMNS.items() if _has_type(schema, name, kind)]
        if not names:
            return facts
        row = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
            found = counts[row : row + len(batch)]
            row += len(batch)
            if len(kept := np.flatnonzero(found != NOT_KEPT)) < len(batch):
                batch, found = batch.take(pa.array(kept)), found[kept]
            if "dump" in names:
                _count(facts.dumps, _as_string(batch.column("dump")))
            if "url" in names:
                _count(facts.hosts, hosts(_as_string(batch.column("url"))))
            if "token_count" in names:
                column = batch.column("token_count")
                expected = column.fill_null(-2).to_numpy(zero_copy_only=False)
                facts.counted += int(((expected >= 0) & (found >= 0)).sum())
                facts.agreeing += int(((expected == found) & (found >= 0)).sum())
    return facts


def _has_type(schema: pa.Schema, name: str, kind: pa.DataType) -> bool:
    index = schema.get_field_index(name)  # -1 if there is none, or more than one
    found = schema.field(index).type if index >= 0 else None
    return bool(found == kind or (found is not None and kind == pa.string() and is_text(found)))


def _as_string(texts: pa.Array) -> pa.Array:
    return as_binary(texts).cast(pa.large_string())


def hosts(urls: pa.Array) -> pa.Array:
    """Return the host of each URL in lower case, or null."""
    pattern = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>[^/?#:]+)"
    return pc.utf8_lower(pc.struct_field(pc.extract_regex(urls, pattern), "host"))


def _count(counter: Counter[str], names: pa.Array) -> None:
    for entry in pc.value_counts(names.drop_null()).to_pylist():
        counter[entry["values"]] += entry["counts"]
    _cut(counter)


def _cut(counter: Counter[str]) -> None:
    if len(counter) > 2 * _MAX_NAMES:
        most = counter.most_common(_MAX_NAMES)
        counter.clear()
        counter.update(dict(most))


class DuplicateCounter:
    """Counts documents whose text occurred before, by 64-bit hashes: 8 bytes per document.

    Above ``limit`` hashes it keeps those of one text in 2, 4, 8, ..., selected by the hash itself,
    so all copies of a text are kept or none, and extrapolates the counts.
    """

    def __init__(self, limit: int = _MAX_HASHES) -> None:
        self.limit = limit
        self.halvings = 0
        self._hashes: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}

    def add(self, split: Split, hashes: np.ndarray) -> None:
        """Add the hashes of a shard's documents."""
        self._hashes[split].append(self._sample(hashes))
        while sum(len(part) for parts in self._hashes.values() for part in parts) > self.limit:
            self.halvings += 1
            self._hashes = {
                s: [self._sample(p) for p in parts] for s, parts in self._hashes.items()
            }

    def _sample(self, hashes: np.ndarray) -> np.ndarray:
        if self.halvings:
            hashes = hashes[hashes >> np.uint64(64 - self.halvings) == 0]
        return hashes

    def count(self) -> tuple[int, int]:
        """Count documents that repeat an earlier one, and validation documents also in train.

        Both counts are estimates if hashes were dropped.
        """
        # Sorting uint64 in NumPy is 200 times as fast as `np.unique` and `np.isin`.
        train, val = (
            np.concatenate([np.zeros(0, np.uint64), *self._hashes.pop(s)]) for s in SPLITS
        )
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
    """The sum of the tasks' statistics."""

    def __init__(self) -> None:
        self.lengths = np.zeros(32, np.int64)
        self.shortest: tuple[int, str] | None = None
        self.longest: tuple[int, str] | None = None
        self.source = SourceFacts()
        self.duplicates = DuplicateCounter()

    def add_shard(self, facts: ShardFacts) -> None:
        """Add the statistics of a shard."""
        self.lengths += facts.lengths
        # Break ties by name, so that the order of the shards does not matter.
        self.shortest = min(filter(None, (self.shortest, facts.shortest)), default=None)
        longest = filter(None, (self.longest, facts.longest))
        self.longest = min(longest, key=lambda entry: (-entry[0], entry[1]), default=None)
        self.duplicates.add(facts.split, facts.hashes)

    def add_source(self, facts: SourceFacts) -> None:
        """Add the statistics of a source file."""
        self.source.counted += facts.counted
        self.source.agreeing += facts.agreeing
        for mine, others in ((self.source.dumps, facts.dumps), (self.source.hosts, facts.hosts)):
            mine.update(others)
            _cut(mine)

    def statistics(self, manifest: Manifest, engines: dict[str, float]) -> dict[str, Any]:
        """Return the contents of `data/statistics.json`.

        Args:
            engines: The result of `engine_metrics`.
        """
        train, val = manifest.totals["train"], manifest.totals["val"]
        n_tokens, n_docs = train.tokens + val.tokens, train.docs + val.docs
        text_bytes = train.text_bytes + val.text_bytes
        repeated, shared = self.duplicates.count()
        facts: dict[str, Any] = {
            "documents": n_docs,
            "tokens": n_tokens,
            "train_tokens": train.tokens,
            "val_tokens": val.tokens,
            "text_bytes": text_bytes,
            "bytes_per_token": round(text_bytes / max(n_tokens - n_docs, 1), 4),
            "tokens_per_document": round(n_tokens / max(n_docs, 1), 1),
            "shards": train.shards + val.shards,
            "skipped": sum(manifest.skipped.values()),
            "duplicates": repeated,
            "val_documents_in_train": shared,
            **engines,
        }
        for name, entry in (("shortest", self.shortest), ("longest", self.longest)):
            if entry is not None:
                facts |= {f"{name}_document": entry[0], f"{name}_document_at": entry[1]}
        if self.source.counted:
            share = self.source.agreeing / self.source.counted
            facts["token_count_agreement"] = round(share, 6)
        if n_docs and n_tokens < _SHORT_TOKENS * n_docs:
            facts["warning"] = (
                f"documents average {n_tokens / n_docs:.1f} tokens: is a document {_unit(manifest)}"
            )
        return facts

    def tables(self) -> dict[str, str]:
        """Return the tables of the plots as CSV, by name."""
        powers = np.flatnonzero(self.lengths).tolist()
        lengths = [(f"{1 << i:,} to {(2 << i) - 1:,}", self.lengths[i]) for i in powers]
        return {
            "document_lengths": _table("tokens", lengths),
            "dumps": _table("dump", _top(self.source.dumps)),
            "hosts": _table("host", _top(self.source.hosts)),
        }


def _unit(manifest: Manifest) -> str:
    """Return the question of what a document is, from the source files."""
    source = manifest.source
    if not source.has_text:
        return "what <|endoftext|> delimits?"
    if any(".txt" in PurePosixPath(file.path.lower()).suffixes for file in source.files):
        return "a line? Set sources.NAME.text_documents to line, paragraph or file"
    columns = (f"sources.{n}.text_column is {o.text_column}" for n, o in source.sources.items())
    return f"a row? {', '.join(columns)}"


def _top(counter: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counter.items(), key=lambda entry: (-entry[1], entry[0]))[:TOP]


def _table(name: str, rows: Iterable[tuple[str, int]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([name, "documents"])
    writer.writerows((printable(label), count) for label, count in rows)
    return table.getvalue()


def engine_metrics(pieces: Sequence[Path]) -> dict[str, float]:
    """Return the share of the text's bytes that each engine encoded, from the pieces in the store.

    Empty if the store does not have the pieces, or they were not encoded from text.
    """
    sizes: Counter[str] = Counter()
    differences = 0
    for piece in pieces:
        try:
            report = read_engine_report(piece)
        except (OSError, ValueError):  # not from text
            continue
        sizes.update(report["bytes"])
        differences += len(report["differences"])
    if not (total := sum(sizes.values())):
        return {}
    shares = {f"{name}_share": round(size / total, 6) for name, size in sorted(sizes.items())}
    return {**shares, "engine_differences": differences}
