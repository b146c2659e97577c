"""Stage `curate`: decide which rows of the sources are kept, and publish `data/selection`.

```
data/raw ─ chunks ─► measure_chunk: Ray tasks ─► pieces of the store: counts, hashes, signatures
                                                        │  in this process, in row order
        columns ─► heuristics ─► contamination ─► exact duplicates ─► near duplicates
                                                        ▼
                                 data/selection: bitmap and ledger per file, manifest
```

Duplicates come last, so the row of which another is a copy is always kept. No decision depends on
how rows are cut into chunks and files.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cluster.join import cluster
from pipeline.cluster.tasks import run_tasks
from pipeline.curate import copies, decontaminate, measure_chunk, row_rules
from pipeline.curate.decisions import Decisions
from pipeline.curate.measure_chunk import Facts
from pipeline.curate.pieces import Pieces
from pipeline.curate.write_selection import write_all_kept, write_selection
from pipeline.format.manifest import RawManifest, SelectionManifest
from pipeline.params import CurateParams, TokenizeParams
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import Machine, find_file
from pipeline.runtime.progress import Progress
from pipeline.store import atomic
from pipeline.store.store import Store, require_space
from pipeline.tokenize.chunk_plan import plan_chunks

RAW = Path("data/raw")

MAX_ROWS = 200_000_000
"""Rows that are compared with each other at most: about 300 bytes of memory each."""
MAX_SOURCE_ROWS = 2_000_000_000
"""Rows of the source at most: 5 bytes of memory each, and 60 for each that is dropped."""

_TASK_MEMORY = 400 * 2**20
_PIECE_BYTES = 450  # of all pieces per row
_OPEN_PIECES = 256


def curate(
    raw: Path, out: Path, params: CurateParams, split: TokenizeParams, machine: Machine
) -> SelectionManifest:
    """Decide which rows of the source files in ``raw`` are kept, and publish this in ``out``.

    What a killed run has measured is in the store. So is what another one with other thresholds, or
    with fewer files, has measured.

    Args:
        split: Decides which rows are for validation.

    Raises:
        UserError: The rules do not fit the source, no row is left, or there are too many.
    """
    source = RawManifest.load(raw)
    if not params.has_rules:
        return write_all_kept(out, source)
    if not source.has_text:
        raise UserError(
            "params.yaml: curate: sources of kind tokens have no text; turn all rules off"
        )
    if params.val_copies == "drop" and split.val_split != "documents":
        raise UserError("params.yaml: curate.val_copies: drop needs tokenize.val_split: documents")
    stage = _Stage(raw.absolute(), source, params, split, machine, Store.open(machine))
    task_files = {path: atomic.sha256_file(find_file(path)) for path in params.decontaminate}
    decisions, found = stage.decide()
    pieces, tasks = stage.pieces, stage.facts.tasks
    unclean = row_rules.unclean_tasks(pieces, tasks, decisions) if tasks is not None else {}
    return write_selection(
        raw, out, source, params, decisions, found, unclean, task_files, pieces.named(), stage.store
    )


class _Stage:
    """One call of `curate` in which there are rules."""

    def __init__(
        self,
        raw: Path,
        source: RawManifest,
        params: CurateParams,
        split: TokenizeParams,
        machine: Machine,
        store: Store,
    ) -> None:
        self.raw, self.source, self.params, self.split = raw, source, params, split
        self.machine, self.store = machine, store
        self.rules, _ = row_rules.thresholds(params)
        self.facts = facts_for(params)
        self.pieces = plan_pieces(raw, source, self.facts, store)

    def decide(self) -> tuple[Decisions, dict[str, Any]]:
        """Apply the rules in order; return the decisions, and what was only counted."""
        params, pieces = self.params, self.pieces
        if pieces.rows > MAX_SOURCE_ROWS:
            raise UserError(
                f"params.yaml: curate: the source has {pieces.rows:,} rows, and rules apply "
                f"to at most {MAX_SOURCE_ROWS:,}; make one project per dump, or part, of it"
            )
        if params.has_hashes and params.scope == "all":
            _check_rows(pieces.rows, "the source", "set curate.scope: dump")
        self._measure()
        decisions = Decisions(np.ones(pieces.rows, bool))
        found: dict[str, Any] = {}
        row_rules.drop_by_columns(pieces, params.columns, decisions)
        row_rules.drop_by_heuristics(pieces, self.rules, decisions)
        if self.facts.tasks is not None:
            is_dropped = params.contaminated == "drop"
            found |= row_rules.drop_contaminated(pieces, self.facts.tasks, is_dropped, decisions)
        if params.has_hashes:
            found |= self._drop_copies(decisions)
        if not decisions.kept.any():
            counts = ", ".join(f"{name} {count:,}" for name, count in decisions.counts.items())
            raise UserError(f"params.yaml: curate: drops every row ({counts}); relax a rule")
        return decisions, found

    def _measure(self) -> None:
        """Build the pieces that the store lacks."""
        chunks, store = self.pieces.chunks, self.store
        keys = self.pieces.keys
        missing = [
            index
            for index, kinds in enumerate(keys)
            if store.fresh or not all(store.find(kind, key) for kind, key in kinds.items())
        ]
        print(
            f"curate: {len(self.source.files)} files, {self.pieces.rows:,} rows in {len(chunks)} "
            f"chunks; {len(chunks) - len(missing)} chunks measured before, {len(missing)} to do",
            flush=True,
        )
        if store.fresh:
            for kind, key in self.pieces.named():
                with store.lock(kind, key):
                    store.discard(kind, key)
        rows = sum(chunks[i].stop - chunks[i].start for i in missing)
        require_space(store.root, _PIECE_BYTES * rows, "what curate measures")
        column = self.source.column
        self._run(
            measure_chunk.measure_chunk,
            [(chunks[i], self.raw, column(chunks[i].file), keys[i], store) for i in missing],
            self.facts,
        )

    def _run(
        self, function: Callable[..., int], tasks: Sequence[tuple[Any, ...]], *shared: Any
    ) -> None:
        """Run tasks on Ray whose first argument is a chunk and whose result is bytes read.

        Args:
            shared: Last arguments of all tasks.
        """
        if not tasks:
            return
        chunks = [task[0] for task in tasks]
        rows = [chunk.stop - chunk.start for chunk in chunks]
        labels = [chunk.label for chunk in chunks]
        sizes = [chunk.estimated_tokens for chunk in chunks]
        files = sorted({self.raw / chunk.file.path for chunk in chunks})
        size, began = 0, time.monotonic()
        with (
            cluster(self.machine, files),
            Progress("curate", sum(rows), "rows") as progress,
        ):
            for index, read in run_tasks(
                function, tasks, None, "curate",
                shared=shared, labels=labels, sizes=sizes, memory=_TASK_MEMORY, progress=progress,
            ):  # fmt: skip
                size += read
                speed = size / 1e6 / (time.monotonic() - began)
                progress.advance(rows[index], f"{speed:.1f} MB/s of text")

    def _drop_copies(self, decisions: Decisions) -> dict[str, Any]:
        """Apply the rules that compare rows; return what was only counted."""
        params, near_val = self.params, 0
        for rows, groups in self._passes():
            if params.exact_duplicates:
                copies.drop_exact(self.pieces, rows, groups, decisions)
            if params.has_signatures:
                near_val += copies.drop_near(
                    self.pieces, rows, groups, params, self._is_val(rows), self._shingles, decisions
                )
        is_counted = params.has_signatures and self.split.val_split == "documents"
        return {"training_rows_near_validation": near_val} if is_counted else {}

    def _is_val(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows `tokenize` takes for validation by their hash: (k,) bool."""
        if self.split.val_split != "documents":
            return np.zeros(len(rows), bool)
        hashes = np.empty(len(rows), np.uint64)
        self.pieces.gather("texts", "split.npy", rows, hashes)
        is_val: np.ndarray = hashes % np.uint64(10_000) < np.uint64(self.split.val_per_10k)
        return is_val

    def _passes(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield the rows to compare at a time, and the groups within which to compare them."""
        if self.params.scope == "all":
            yield np.arange(self.pieces.rows), None
            return
        groups, names = row_rules.dumps(self.pieces)
        sizes = np.bincount(groups, minlength=len(names))
        for name, rows in zip(names, sizes.tolist(), strict=True):
            _check_rows(rows, f"dump {printable(name)}", "take fewer files of it")
        first = 0
        while first < len(names):  # as many dumps at a time as the limit allows
            fitting = np.searchsorted(np.cumsum(sizes[first:]), MAX_ROWS, "right")
            last = first + max(1, int(fitting))
            rows = np.flatnonzero((groups >= first) & (groups < last))
            yield rows, groups[rows]
            first = last

    def _shingles(self, rows: np.ndarray) -> Callable[[int], np.ndarray]:
        """Read the n-grams of some rows from their text; return them by index into ``rows``.

        Args:
            rows: (k,) int64, numbered in the source.
        """
        pieces = self.pieces
        code = measure_chunk.code_keys()
        borders = np.searchsorted(rows, pieces.starts)
        tasks, made = [], []
        for number, chunk in enumerate(pieces.chunks):
            column = self.source.column(chunk.file)
            chosen = rows[borders[number] : borders[number + 1]] - pieces.starts[number]
            key = measure_chunk.shingles_key(chunk, column, self.params.ngram, chosen, code)
            made.append(self.store.path("shingles", key))
            is_made = not self.store.fresh and self.store.find("shingles", key)
            if len(chosen) and not is_made:
                arguments = (self.params.ngram, chosen, key, self.store)
                tasks.append((chunk, self.raw, column, *arguments))
        self._run(measure_chunk.write_shingles, tasks)

        @lru_cache(maxsize=_OPEN_PIECES)
        def opened(number: int) -> tuple[np.ndarray, np.ndarray]:
            names = ("starts.npy", "shingles.npy")
            starts, values = (np.load(made[number] / name, mmap_mode="r") for name in names)
            return starts, values

        def of_row(index: int) -> np.ndarray:
            number = int(np.searchsorted(borders, index, side="right")) - 1
            starts, values = opened(number)
            first, last = starts[index - borders[number] :][:2]
            return values[first:last]

        return of_row


def _check_rows(rows: int, where: str, advice: str) -> None:
    if rows > MAX_ROWS:
        raise UserError(
            f"params.yaml: curate: {rows:,} rows of {where} are to be compared with each other, "
            f"but at most {MAX_ROWS:,} can be; {advice}"
        )


def plan_pieces(raw: Path, source: RawManifest, facts: Facts, store: Store) -> Pieces:
    """Cut the source into chunks; return the pieces to measure, which the store may lack."""
    chunks = plan_chunks(raw, source, measure_chunk.CHUNK_TOKENS)
    code = measure_chunk.code_keys()
    keys = [measure_chunk.piece_keys(c, source.column(c.file), facts, code) for c in chunks]
    return Pieces(store, chunks, keys)


def facts_for(params: CurateParams) -> Facts:
    """Return what the rules need to know about each row.

    Raises:
        UserError: A heuristic is unknown, or a file of tasks cannot be read.
    """
    rules, limits = row_rules.thresholds(params)
    items = [
        item
        for path in params.decontaminate
        for item in decontaminate.read_items(path, find_file(path))
    ]
    columns = {rule.column for rule in params.columns}
    if params.has_hashes and params.scope == "dump":
        columns.add(row_rules.DUMP)
    return Facts(
        columns=tuple(sorted(columns)),
        sets=tuple(sorted({rule.set for rule in rules})),
        limits=limits,
        tasks=decontaminate.index(items, params.contamination_words) if items else None,
        has_texts=params.has_hashes,
        ngram=params.ngram if params.has_signatures else None,
        bands=(params.bands, params.rows) if params.has_signatures else None,
    )
