"""The checks of one file, which read each byte once: the work of a verify task."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.format.manifest import (
    ChunkRecord,
    Part,
    SelectedFile,
    Shard,
    SourceFile,
    Split,
    Tokenizer,
)
from pipeline.format.parquet import read_batches, row_groups
from pipeline.format.selection import read_bits
from pipeline.format.shards import HEADER_BYTES, ShardError, docs_path, open_shard, read_docs
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from pipeline.tokenize import engines
from pipeline.tokenize.chunk_record import Record, length_bins
from pipeline.tokenize.encode_chunk import split_of
from pipeline.tokenize.token_stats import BLOCK_TOKENS, TokenStats, blocks
from pipeline.verify.data_report import NOT_KEPT, ShardFacts, SourceFacts, source_facts


@dataclass(frozen=True)
class Fault:
    """A file that fails a check."""

    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass
class Findings:
    """The result of a task: faults, and facts for the data report."""

    faults: list[Fault] = field(default_factory=list)
    shard: ShardFacts | None = None
    source: SourceFacts | None = None
    dropped: Counter[str] | None = None
    """Rows that each rule of `curate` dropped."""


@dataclass(frozen=True)
class PartSpan:
    """The position of one part within its shard."""

    shard: str
    split: Split
    part: Part
    tokens: tuple[int, int]
    """The part's tokens [first, end) in the shard."""
    docs: tuple[int, int]
    """The part's documents [first, end) in the shard."""


def part_spans(shard: Shard) -> list[PartSpan]:
    """Return the position of each part of a shard, in order."""
    spans, token, doc = [], 0, 0
    for part in shard.parts:
        tokens, docs = (token, token + part.tokens), (doc, doc + part.docs)
        spans.append(PartSpan(shard.name, shard.split, part, tokens, docs))
        token, doc = tokens[1], docs[1]
    return spans


def check_record(path: Path, chunk: ChunkRecord) -> Record | Fault:
    """Return a chunk's commit record, or a fault if it does not match the manifest."""
    try:
        data = atomic.read_bytes(path)
    except OSError as error:
        return Fault(path, _reason(error))
    if (found := hashlib.sha256(data).hexdigest()) != chunk.sha256:
        return Fault(path, f"sha256 is {found}, expected {chunk.sha256}")
    try:
        record: Record = atomic.parse_json(data)
        if record["chunk_key"] == chunk.chunk_key:
            return record
    except (ValueError, KeyError, TypeError):
        pass
    return Fault(path, f"not the record of chunk {chunk.chunk_key[:12]}")


def _reason(error: OSError) -> str:
    return (
        "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    )


def check_source(
    raw: Path,
    file: SourceFile,
    tokens: Path,
    spans: Sequence[PartSpan],
    has_text: bool,
    bits: tuple[Path, SelectedFile] | None = None,
) -> Findings:
    """Check a file of `data/raw` against its manifest; read its metadata columns for the report.

    Args:
        spans: The parts of shards that come from this file.
        has_text: Whether the file is parquet rather than a token file.
        bits: The folder of the selection and the file in it, if some of the rows are dropped.
    """
    path = raw / file.path
    try:
        found = atomic.sha256_file(path)
    except OSError as error:
        return Findings([Fault(path, _reason(error))])
    if found != file.sha256:
        return Findings([Fault(path, f"sha256 is {found}, expected {file.sha256}")])
    if not has_text:
        return Findings()
    counts = np.full(file.rows, -1, np.int32)
    for span in spans:
        docs = _read_documents(tokens, span)
        first, end = span.part.rows
        if docs is not None and _is_ascending(docs[:, 2], first, min(end, file.rows)):
            # The two halves of a document that is cut between the splits add up.
            counts[docs[:, 2]] = np.maximum(counts[docs[:, 2]], 0) + docs[:, 1] - docs[:, 0] - 1
    if bits is not None and (kept := _read_kept(*bits)) is not None:
        if (counts[~kept] >= 0).any():
            row = int(np.flatnonzero(~kept & (counts >= 0))[0])
            shard = next(s.shard for s in spans if s.part.rows[0] <= row < s.part.rows[1])
            return Findings([Fault(docs_path(tokens / shard), f"has row {row}, which is dropped")])
        counts[~kept] = NOT_KEPT
    return Findings(source=source_facts(path, counts))


def _read_kept(folder: Path, file: SelectedFile) -> np.ndarray | None:
    """Read a bitmap; None if it is damaged, which `check_selected_file` reports."""
    try:
        return read_bits(folder, file)
    except UserError:
        return None


def _read_documents(tokens: Path, span: PartSpan) -> np.ndarray | None:
    """Read a part's documents: (d, 3) int64, first token, token after the last, row.

    Returns None if the document index is damaged; `check_shard` reports it, and rows that are not
    of the part.
    """
    try:
        docs = read_docs(tokens / span.shard)[slice(*span.docs)]
    except ShardError:
        return None
    ends = np.append(docs[1:, 0], span.tokens[1])[: len(docs)]
    return np.column_stack([docs[:, 0], ends, docs[:, 1]])


def check_shard(
    folder: Path,
    shard: Shard,
    tokenizer: Tokenizer,
    file_indices: dict[str, int],
    contents: dict[str, str],
    linked_raw: Path | None = None,
) -> Findings:
    """Check a shard and its document index against the manifest and the chunks' records.

    Size, header, sha256 and the range of the tokens; each `<|endoftext|>` begins a document of the
    index, and each document begins with one; parts, documents and bytes of text add up; the
    documents of a part are in row order, within the rows of its chunk, and their content sum is the
    one in the chunk's record, so the `dataset_key` of the records is that of the tokens.

    Args:
        file_indices: The number of each source file.
        contents: The content sum of each chunk in this split, from its record.
        linked_raw: The file of `data/raw` with the same inode, which is then not read again.
    """
    path = folder / shard.name
    faults: list[Fault] = []

    def compare(what: str, found: object, expected: object, file: Path = path) -> None:
        if found != expected:
            faults.append(Fault(file, f"{what} is {found}, expected {expected}"))

    try:
        tokens = open_shard(path)
    except ShardError as error:
        return Findings(_with_linked([_shard_fault(error, path)], path, linked_raw))
    index = docs_path(path)
    try:
        docs: np.ndarray | None = read_docs(path)
        compare("sha256", atomic.sha256_file(index), shard.docs_sha256, index)
    except ShardError as error:
        docs = None
        faults.append(_shard_fault(error, index))
    spans = part_spans(shard)
    compare("number of tokens", len(tokens), shard.tokens)
    compare("sum of its parts' tokens", sum(s.part.tokens for s in spans), shard.tokens)
    compare("sum of its parts' documents", sum(s.part.docs for s in spans), shard.docs)
    if docs is not None:
        compare("number of documents", len(docs), shard.docs)
        if not _is_ascending(docs[:, 0], 0, len(tokens)):
            faults.append(Fault(index, "its documents are not in order, or are beyond the shard"))
    if faults or docs is None:
        # The documents are unknown: only hash the tokens.
        docs, spans = np.zeros((0, 2), np.int64), []
    stats = TokenStats(hashlib.sha256(path.open("rb").read(HEADER_BYTES)))
    wrong_content = []
    for span in spans:
        file_index, content = file_indices[span.part.path], 0
        part_docs, rows = docs[slice(*span.docs)], span.part.rows
        for begin, end, block_docs in blocks(part_docs, *span.tokens):
            block = np.array(tokens[begin:end])
            content += stats.add(block, begin, block_docs, file_index, rows[0])
        if not _is_ascending(part_docs[:, 1], *rows):
            faults.append(Fault(index, f"has rows out of order or outside {span.part.path} {rows}"))
        expected = contents.get(span.part.chunk_key)
        if expected is not None and f"{content % 2**128:032x}" != expected:
            wrong_content.append(span.part)
    for at in range(0, 0 if spans else len(tokens), BLOCK_TOKENS):
        stats.add(np.array(tokens[at : at + BLOCK_TOKENS]), at, docs, 0, 0)
    compare("sha256", stats.digest.hexdigest(), shard.sha256)
    if stats.largest >= tokenizer.n_vocab:
        faults.append(Fault(path, f"token {stats.largest} is outside the vocabulary"))
    facts = None
    if spans:
        if not np.array_equal(stats.eot_positions(), docs[:, 0]):
            faults.append(Fault(path, f"its <|endoftext|> tokens are not at the starts in {index}"))
        elif not faults:
            compare("bytes of text", stats.text_bytes, shard.text_bytes)
            faults += [
                Fault(path, f"content differs from the record of {part.path}, rows {part.rows}")
                for part in wrong_content
            ]
        facts = _facts(shard, spans, docs, stats)
    return Findings(_with_linked(faults, path, linked_raw), shard=facts)


def _shard_fault(error: ShardError, path: Path) -> Fault:
    """Turn an error into a fault, without the path and the advice in its message."""
    return Fault(path, str(error).removeprefix(f"{path}: ").split("; ")[0])


def _with_linked(faults: list[Fault], path: Path, linked_raw: Path | None) -> list[Fault]:
    if linked_raw is not None and any(fault.path == path for fault in faults):
        return [*faults, Fault(linked_raw, f"is the same file as {path}")]
    return faults


def _is_ascending(values: np.ndarray, low: int, high: int) -> bool:
    """Return whether the values increase strictly within [low, high)."""
    if not len(values):
        return True
    return bool(values[0] >= low and values[-1] < high and (np.diff(values) > 0).all())


def _facts(
    shard: Shard, spans: Sequence[PartSpan], docs: np.ndarray, stats: TokenStats
) -> ShardFacts:
    lengths = np.concatenate([np.zeros(0, np.int64), *stats.lengths])

    def entry(index: int) -> tuple[int, str]:
        span = next(s for s in spans if index < s.docs[1])
        return int(lengths[index]), f"{span.part.path}:{docs[index, 1]}"

    return ShardFacts(
        split=shard.split,
        lengths=length_bins(lengths),
        shortest=entry(int(lengths.argmin())) if len(lengths) else None,
        longest=entry(int(lengths.argmax())) if len(lengths) else None,
        hashes=np.concatenate([np.zeros(0, np.uint64), *stats.hashes]),
    )


def check_texts(
    raw: Path,
    column: str,
    tokens: Path,
    spans: Sequence[PartSpan],
    count: int,
    val_per_10k: int | None,
) -> Findings:
    """Encode ``count`` documents of each part again from the raw text, and compare.

    The documents are spread evenly over the part. Those of training are near the first one of
    validation: often one row group has both, and a document that was cut for a split by position
    is compared with both of its halves.

    Args:
        spans: The parts of one chunk, of which training comes first.
        val_per_10k: Documents that their hash sends to validation; None if split by position.
    """
    opened = [(span, *found) for span in spans if (found := _open_part(tokens, span)) is not None]
    if not opened:
        return Findings()
    near = opened[-1][2][0, 2]
    chosen: dict[int, list[tuple[PartSpan, np.ndarray, np.ndarray, int]]] = {}
    for span, shard, docs in opened:
        step = -(-len(docs) // count)
        for index in range(int(np.searchsorted(docs[:-1, 2], near)) % step, len(docs), step):
            chosen.setdefault(int(docs[index, 2]), []).append((span, shard, docs, index))
    source, faults = raw / spans[0].part.path, []
    for row, text in _read_rows(source, column, sorted(chosen)):
        if isinstance(text, Fault):
            faults.append(text)
            continue
        try:
            expected = engines.reference(text or b"")
        except engines.Unencodable:
            expected = np.zeros(0, np.uint16)
        sizes = {span.split: _row_tokens(docs, row) for span, _, docs in opened}
        for span, shard, docs, index in chosen[row]:
            begin, end, _ = docs[index].tolist()
            before = sizes.get("train", 0) if span.split == "val" else 0
            is_row = sum(sizes.values()) == len(expected) and np.array_equal(
                shard[begin + 1 : end], expected[before : before + end - begin - 1]
            )
            path, document = tokens / span.shard, f"document {span.docs[0] + index}"
            if not is_row:
                faults.append(Fault(path, f"{document} is not row {row} of {span.part.path}"))
            elif val_per_10k is not None and split_of(text or b"", val_per_10k) != span.split:
                faults.append(Fault(path, f"{document} does not belong to split {span.split}"))
    return Findings(faults)


def _read_rows(
    source: Path, column: str, rows: Sequence[int]
) -> Iterator[tuple[int, bytes | Fault | None]]:
    """Read some rows' texts, ascending, decoding each row group at most once."""
    try:
        atomic.check_regular(source)
        ends = np.cumsum([count for count, _ in row_groups(source, column)])
        for _, group in groupby(rows, lambda row: int(np.searchsorted(ends, row, side="right"))):
            wanted = list(group)
            for first, texts in read_batches(source, column, wanted[0], wanted[-1] + 1):
                while wanted and wanted[0] < first + len(texts):
                    row = wanted.pop(0)
                    yield row, texts.slice(row - first, 1).cast(pa.large_binary())[0].as_py()
            for row in wanted:
                yield row, None
    except (UserError, pa.ArrowException, OSError, ValueError) as error:
        yield rows[0], Fault(source, f"its text is not readable ({error})")


def _row_tokens(docs: np.ndarray, row: int) -> int:
    """Return the number of tokens of a row in a part, without `<|endoftext|>`."""
    begin, end, _ = docs[docs[:, 2] == row].T
    return int((end - begin - 1).sum())


def _open_part(tokens: Path, span: PartSpan) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a part's shard and `_read_documents`; None if `check_shard` finds them damaged."""
    docs = _read_documents(tokens, span)
    if docs is None or not len(docs) or len(docs) != span.part.docs:
        return None
    try:
        return open_shard(tokens / span.shard), docs
    except ShardError:
        return None
