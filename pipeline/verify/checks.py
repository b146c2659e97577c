"""What must hold of one file of the data, each byte read once: the work of a verify task."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.format.manifest import ChunkRecord, Part, Shard, SourceFile, Split, Tokenizer
from pipeline.format.parquet import read_texts
from pipeline.format.shards import HEADER_BYTES, ShardError, docs_path, open_shard, read_docs
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from pipeline.tokenize import engines
from pipeline.tokenize.encode_chunk import Record, split_of
from pipeline.tokenize.token_stats import BLOCK_TOKENS, Measure, blocks
from pipeline.verify.data_report import ShardFacts, SourceFacts, length_bins, source_facts


@dataclass(frozen=True)
class Fault:
    """A file that is not what it must be."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass
class Findings:
    """What a task found: faults, and facts for the data report."""

    faults: list[Fault] = field(default_factory=list)
    shard: ShardFacts | None = None
    source: SourceFacts | None = None


@dataclass(frozen=True)
class Place:
    """Where the documents of one part of a shard lie."""

    shard: str
    split: Split
    part: Part
    tokens: tuple[int, int]
    """The part's first token in the shard, and the token after its last."""
    docs: tuple[int, int]
    """Its first document there, and the document after its last."""


def places_of(shard: Shard) -> list[Place]:
    """The parts of a shard, in order."""
    places, token, doc = [], 0, 0
    for part in shard.parts:
        tokens, docs = (token, token + part.tokens), (doc, doc + part.docs)
        places.append(Place(shard.name, shard.split, part, tokens, docs))
        token, doc = tokens[1], docs[1]
    return places


def read_record_of(path: Path, chunk: ChunkRecord) -> Record | Fault:
    """A chunk's commit record, where it is the one that the manifest names."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Fault(path, "missing")
    if (found := hashlib.sha256(data).hexdigest()) != chunk.sha256:
        return Fault(path, f"sha256 {found}, the manifest says {chunk.sha256}")
    try:
        record: Record = json.loads(data)
        if record["chunk_key"] == chunk.chunk_key:
            return record
    except (ValueError, KeyError, TypeError):
        pass
    return Fault(path, f"not the record of chunk {chunk.chunk_key[:12]}")


def check_source(
    raw: Path, file: SourceFile, tokens: Path, places: Sequence[Place], has_text: bool
) -> Findings:
    """A file of `data/raw` against its manifest, and its cheap columns for the report.

    Args:
        places: where its documents lie in the shards.
        has_text: whether it is parquet, and holds no tokens.
    """
    path = raw / file.path
    if not path.exists():
        return Findings([Fault(path, "missing")])
    if (found := atomic.sha256_file(path)) != file.sha256:
        return Findings([Fault(path, f"sha256 {found}, the manifest says {file.sha256}")])
    if not has_text:
        return Findings()
    counts = np.full(file.rows, -1, np.int32)
    for place in places:
        docs = _documents(tokens, place)
        if docs is not None and len(docs) and 0 <= docs[:, 2].min() <= docs[:, 2].max() < file.rows:
            counts[docs[:, 2]] = docs[:, 1] - docs[:, 0] - 1
    return Findings(source=source_facts(path, counts))


def _documents(tokens: Path, place: Place) -> np.ndarray | None:
    """A part's documents: (d, 3) int64, first token, the token after the last, row.

    None where the sidecar is damaged, which `check_shard` says.
    """
    try:
        docs = read_docs(tokens / place.shard)[slice(*place.docs)]
    except ShardError:
        return None
    ends = np.append(docs[1:, 0], place.tokens[1])[: len(docs)]
    return np.column_stack([docs[:, 0], ends, docs[:, 1]])


def check_shard(
    folder: Path,
    shard: Shard,
    tokenizer: Tokenizer,
    file_indices: dict[str, int],
    contents: dict[str, str],
    twin: Path | None = None,
) -> Findings:
    """A shard and its sidecar against the manifest and the chunks' records.

    Size, header, sha256, range of the tokens; each `<|endoftext|>` begins a document of the sidecar
    and each document begins with one; parts, documents and bytes of text add up; a part's documents
    are in the order of their rows, all of its chunk, and their content is what the chunk's record
    says, so that the records' `dataset_key` is that of the tokens.

    Args:
        file_indices: the number of each source file.
        contents: the content sum of each chunk in this split, as its record has it.
        twin: a file of `data/raw` that is the same file as this one, and so is not read again.
    """
    path = folder / shard.name
    faults: list[Fault] = []

    def compare(what: str, found: object, said: object, of: Path = path) -> None:
        if found != said:
            faults.append(Fault(of, f"{what} {found}, the manifest says {said}"))

    try:
        tokens = open_shard(path)
    except ShardError as error:
        return Findings(_with_twin([_fault(error, path)], path, twin))
    sidecar = docs_path(path)
    try:
        docs: np.ndarray | None = read_docs(path)
        compare("sha256", atomic.sha256_file(sidecar), shard.docs_sha256, sidecar)
    except ShardError as error:
        docs = None
        faults.append(_fault(error, sidecar))
    places = places_of(shard)
    compare("tokens", len(tokens), shard.tokens)
    compare("tokens of its parts", sum(p.part.tokens for p in places), shard.tokens)
    compare("documents of its parts", sum(p.part.docs for p in places), shard.docs)
    if docs is not None:
        compare("documents", len(docs), shard.docs)
        if not _is_ascending(docs[:, 0], 0, len(tokens)):
            faults.append(Fault(sidecar, "its documents do not follow one another in the shard"))
    if faults or docs is None:
        # What the documents are is not known: the tokens are hashed alone.
        docs, places = np.zeros((0, 2), np.int64), []
    digest = hashlib.sha256(path.open("rb").read(HEADER_BYTES))
    total = Measure(0)
    largest, wrong = 0, []
    for place in places:
        measure = Measure(file_indices[place.part.path])
        those, rows = docs[slice(*place.docs)], place.part.rows
        for begin, end, inside in blocks(those, *place.tokens):
            block = np.array(tokens[begin:end])
            digest.update(block.tobytes())
            largest = max(largest, int(block.max()))
            measure.add(block, begin, inside, rows[0])
        total.merge(measure)
        if not _is_ascending(those[:, 1], *rows):
            faults.append(Fault(sidecar, f"rows that are not of rows {rows} of {place.part.path}"))
        said = contents.get(place.part.chunk_key)
        if said is not None and f"{measure.content:032x}" != said:
            wrong.append(place.part)
    for at in range(0, 0 if places else len(tokens), BLOCK_TOKENS):
        block = np.array(tokens[at : at + BLOCK_TOKENS])
        digest.update(block.tobytes())
        largest = max(largest, int(block.max()))
    compare("sha256", digest.hexdigest(), shard.sha256)
    if largest >= tokenizer.n_vocab:
        faults.append(Fault(path, f"token {largest} is outside the vocabulary"))
    facts = None
    if places:
        if not np.array_equal(total.starts(), docs[:, 0]):
            faults.append(Fault(path, f"its <|endoftext|> tokens are not where {sidecar} says"))
        elif not faults:
            compare("bytes of text", total.text_bytes, shard.text_bytes)
            faults += [
                Fault(path, f"not the documents of rows {part.rows} of {part.path} (content)")
                for part in wrong
            ]
        facts = _facts(shard, places, docs, total)
    return Findings(_with_twin(faults, path, twin), shard=facts)


def _fault(error: ShardError, path: Path) -> Fault:
    return Fault(path, str(error).removeprefix(f"{path}: ").split("; `dvc repro`")[0])


def _with_twin(faults: list[Fault], path: Path, twin: Path | None) -> list[Fault]:
    if twin is not None and any(fault.path == path for fault in faults):
        return [*faults, Fault(twin, f"is the same file as {path}")]
    return faults


def _is_ascending(values: np.ndarray, low: int, high: int) -> bool:
    """Whether values rise from one to the next, from ``low`` to below ``high``."""
    if not len(values):
        return True
    return bool(values[0] >= low and values[-1] < high and (np.diff(values) > 0).all())


def _facts(shard: Shard, places: Sequence[Place], docs: np.ndarray, total: Measure) -> ShardFacts:
    lengths = np.concatenate([np.zeros(0, np.int64), *total.lengths])

    def entry(index: int) -> tuple[int, str]:
        place = next(p for p in places if index < p.docs[1])
        return int(lengths[index]), f"{place.part.path}:{docs[index, 1]}"

    return ShardFacts(
        split=shard.split,
        lengths=length_bins(lengths),
        shortest=entry(int(lengths.argmin())) if len(lengths) else None,
        longest=entry(int(lengths.argmax())) if len(lengths) else None,
        hashes=np.concatenate([np.zeros(0, np.uint64), *total.hashes]),
    )


def check_texts(
    raw: Path, column: str, tokens: Path, places: Sequence[Place], count: int, val_per_10k: int
) -> Findings:
    """Encode ``count`` documents of each part of a chunk again from the raw text, and compare.

    They are spread over the part: its first document, and every so many after it.
    """
    faults = []
    for place in places:
        path, source = tokens / place.shard, raw / place.part.path
        docs = _documents(tokens, place)
        try:
            shard = open_shard(path)
        except ShardError:
            continue  # `check_shard` names it
        if docs is None or len(docs) != place.part.docs or not len(docs):
            continue
        for index in range(0, len(docs), -(-len(docs) // count)):
            begin, end, row = docs[index].tolist()
            try:
                rows = read_texts(source, column, row, row + 1)
                text: str | bytes | None = next((texts for _, texts in rows), [None])[0]
            except (UserError, OSError, ValueError) as error:  # damaged: `check_source` says how
                faults.append(Fault(source, f"row {row} is not readable ({error})"))
                continue
            where = f"document {place.docs[0] + index}"
            utf8 = text.encode() if isinstance(text, str) else text or b""
            if not np.array_equal(shard[begin + 1 : end], _encode(utf8)):
                faults.append(Fault(path, f"{where} is not row {row} of {place.part.path}"))
            elif split_of(utf8, val_per_10k) != place.split:
                faults.append(Fault(path, f"{where} is not of split {place.split}"))
    return Findings(faults)


def _encode(text: bytes) -> np.ndarray:
    """The tokens of a text by the reference; none of one that has none, as no document has."""
    try:
        return engines.reference(text)
    except engines.Unfit:
        return np.zeros(0, np.uint16)
