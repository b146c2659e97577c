"""Stage `tokenize`: parquet or token files to token shards and their manifest."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from pipeline.cluster.join import cluster
from pipeline.format import tokenizer
from pipeline.format.manifest import (
    NAME,
    SPLITS,
    ChunkRecord,
    Manifest,
    Part,
    RawManifest,
    Shard,
    Split,
    Tokenizer,
    Totals,
)
from pipeline.format.selection import Selection
from pipeline.format.shards import ShardWriter, docs_path, open_shard, read_docs
from pipeline.params import TokenizeParams
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import Machine
from pipeline.runtime.progress import Progress
from pipeline.store import atomic
from pipeline.store.store import Store, merged_key, publish, require_space
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.chunk_record import RECORD, Record, check_unchanged, dataset_key, read_record
from pipeline.tokenize.from_text import TextChunks
from pipeline.tokenize.from_tokens import TokenFileChunks
from pipeline.tokenize.split_by_position import split_pieces

RAW = Path("data/raw")
OUT = Path("data/tokens")
FORMAT = "llm.c"

# Peak memory of a worker on chunks of 20M tokens, with a margin.
_TASK_MEMORY = 700 * 2**20
_SHOWN = 8  # chunks to do, named in the log


class ChunkBuilder(Protocol):
    """Plans and builds the chunks of one kind of source: text, or token files."""

    @property
    def can_ship(self) -> bool:
        """Whether tasks can receive their input from this machine (`data: ship`)."""

    def plan(self) -> list[tuple[Chunk, str]]:
        """Cut the source into chunks; return each with its key."""

    def written_tokens(self, chunk: Chunk) -> int:
        """Return the number of tokens that building a chunk writes to the store."""

    def build(
        self, missing: Sequence[tuple[Chunk, str]], progress: Progress, **options: Any
    ) -> Iterator[tuple[int, Record]]:
        """Build chunks by `run_tasks`, which takes the options; yield the index and the record."""


def tokenize(
    raw: Path,
    out: Path,
    params: TokenizeParams,
    machine: Machine,
    code: str,
    selection: Path | None = None,
) -> Manifest:
    """Turn the source files in ``raw`` into token shards in ``out``.

    Chunks that are already in the store are not built again. So a killed run resumes, and a changed
    parameter or a new source file costs only the chunks that it changes.

    Args:
        code: The code key of this stage.
        selection: The folder that says which rows are kept; None: all are.

    Raises:
        UserError: An input is missing or unreadable, a split is empty, or the disk is too small.
    """
    store = Store.open(machine)
    source = RawManifest.load(raw)
    selected = Selection.load(selection, source) if selection else None
    builders: list[ChunkBuilder] = [
        TextChunks(raw, source, params, store, code, machine, selected),
        TokenFileChunks(raw, source, params, store, code),
    ]
    plans = [builder.plan() for builder in builders]
    chunks = [entry for plan in plans for entry in plan]
    places = {name: number for number, name in enumerate(source.sources)}
    chunks.sort(key=lambda entry: places[entry[0].file.source])  # stable: in file order
    missing = [
        (chunk, key) for chunk, key in chunks if store.fresh or not store.find("chunks", key)
    ]
    estimate = sum(chunk.estimated_tokens for chunk, _ in chunks)
    print(
        f"tokenize: {len(source.files)} files, {len(chunks)} chunks, about {estimate:,} tokens; "
        f"{len(chunks) - len(missing)} chunks done before, {len(missing)} to do",
        flush=True,
    )
    if 0 < len(missing) < len(chunks):
        labels = [printable(chunk.label) for chunk, _ in missing]
        more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
        print(f"tokenize: to do: {', '.join(labels[:_SHOWN])}{more}", flush=True)
    for builder, plan in zip(builders, plans, strict=True):
        keys = {key for _, key in plan}
        if of_builder := [entry for entry in missing if entry[1] in keys]:
            _build_missing(builder, of_builder, raw, machine, store)
    if params.val_split == "position":
        chunks = [
            piece
            for _, of_source in groupby(chunks, lambda entry: entry[0].file.source)
            for piece in split_pieces(list(of_source), params.val_per_10k, store)
        ]
    pieces = [store.root / "chunks" / key for _, key in chunks]
    records = [read_record(piece) for piece in pieces]
    paths = [chunk.file.path for chunk, _ in chunks]
    _check_splits(source, records, params)
    files: dict[str, Path | bytes] = {}
    shards = [
        *_link_train(pieces, records, paths, files),
        *_merge_val(pieces, records, paths, params.shard_tokens, store, files),
    ]
    commits = []
    for index, (chunk, key) in enumerate(chunks):
        name, sha256 = f"chunks/{index:05d}.json", store.sha256("chunks", key)[RECORD]
        files[name] = pieces[index] / RECORD
        commits.append(
            ChunkRecord(source=chunk.file.source, name=name, chunk_key=key, sha256=sha256)
        )
    selection_key = selected.key if selected else None
    manifest = _manifest(source, selection_key, params, records, commits, shards)
    publish({**files, NAME: atomic.json_bytes(atomic.sealed(manifest.model_dump()))}, out)
    return manifest


def _build_missing(
    builder: ChunkBuilder,
    missing: Sequence[tuple[Chunk, str]],
    raw: Path,
    machine: Machine,
    store: Store,
) -> None:
    if store.fresh:
        for _, key in missing:
            with store.lock("chunks", key):
                store.discard("chunks", key)
    chunks = [chunk for chunk, _ in missing]
    written = sum(map(builder.written_tokens, chunks))
    require_space(store.root, 5 * written // 2, "the token shards")  # 2 bytes each, and a margin
    files = [raw / chunk.file.path for chunk in chunks]
    sizes = [chunk.estimated_tokens for chunk in chunks]
    documents, text_bytes, began = 0, 0, time.monotonic()
    with (
        cluster(machine, files, ships=builder.can_ship),
        Progress("tokenize", sum(sizes), "tokens") as progress,
    ):
        labels = [chunk.label for chunk in chunks]
        for index, record in builder.build(
            missing, progress, labels=labels, sizes=sizes, memory=_TASK_MEMORY
        ):
            documents += sum(facts["docs"] for facts in record["splits"].values())
            text_bytes += sum(facts["text_bytes"] for facts in record["splits"].values())
            speed = text_bytes / 1e6 / (time.monotonic() - began)
            progress.advance(sizes[index], f"{documents:,} documents, {speed:.1f} MB/s")


def _check_splits(source: RawManifest, records: Sequence[Record], params: TokenizeParams) -> None:
    """Refuse data without training tokens, or without the validation tokens asked for.

    A source may be too small for validation documents, but not empty.
    """
    for name in source.sources:
        found = [record["splits"] for record in records if record["source"]["source"] == name]
        if not any(found):
            raise UserError(
                f"data/raw: no document has text; check sources.{name}.text_column, the source, "
                "and what section curate drops of it"
            )
    splits = [record["splits"] for record in records]
    train, val = (sum(s[name]["tokens"] for s in splits if name in s) for name in SPLITS)
    by_position = params.val_split == "position"
    if not by_position and not source.has_text:
        return  # split by file name
    if params.val_per_10k and not (train and val):
        empty, other = ("validation", "training") if train else ("training", "validation")
        raise UserError(
            f"params.yaml: tokenize.val_per_10k: {params.val_per_10k} leaves nothing for "
            f"{empty}: all {train + val:,} tokens are for {other}; set another value"
            + ("" if by_position else ", or tokenize.val_split: position")
        )


def _part(record: Record, path: str, split: Split) -> Part:
    counts = {key: record["splits"][split][key] for key in ("tokens", "docs")}
    return Part(chunk_key=record["chunk_key"], path=path, rows=record["rows"], **counts)


def _link_train(
    pieces: Sequence[Path],
    records: Sequence[Record],
    paths: Sequence[str],
    files: dict[str, Path | bytes],
) -> list[Shard]:
    """Publish the train documents of each chunk as one shard; add its files to ``files``."""
    shards: list[Shard] = []
    keys = ("tokens", "docs", "text_bytes", "sha256", "docs_sha256")
    for piece, record, path in zip(pieces, records, paths, strict=True):
        if (facts := record["splits"].get("train")) is None:
            continue
        shard = Shard(
            name=f"train-{len(shards):05d}.bin",
            source=record["source"]["source"],
            split="train",
            parts=[_part(record, path, "train")],
            **{key: facts[key] for key in keys},
        )
        files[shard.name] = piece / "train.bin"
        files[shard.docs_name] = docs_path(piece / "train.bin")
        shards.append(shard)
    return shards


def _merge_val(
    pieces: Sequence[Path],
    records: Sequence[Record],
    paths: Sequence[str],
    shard_tokens: int,
    store: Store,
    files: dict[str, Path | bytes],
) -> list[Shard]:
    """Merge the validation documents, in chunk order, into shards of up to ``shard_tokens``."""
    groups: list[list[int]] = []
    sources = [record["source"]["source"] for record in records]
    size = 0
    for index, record in enumerate(records):
        if "val" not in record["splits"]:
            continue
        tokens = record["splits"]["val"]["tokens"]
        is_other = bool(groups) and sources[groups[-1][0]] != sources[index]
        if not groups or is_other or size + tokens > shard_tokens:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += tokens
    shards = []
    for number, group in enumerate(groups):
        parts = [_part(records[i], paths[i], "val") for i in group]
        key = merged_key([part.chunk_key for part in parts])
        with store.lock("merged", key):
            if store.fresh or store.find("merged", key) is None:
                with store.make("merged", key) as folder:
                    writer = ShardWriter(folder / "val.bin")
                    for index in group:
                        path = pieces[index] / "val.bin"
                        check_unchanged(path, records[index]["splits"]["val"]["sha256"])
                        writer.append(open_shard(path), read_docs(path))
                    writer.close()
        sha256 = store.sha256("merged", key)
        path = store.root / "merged" / key / "val.bin"
        shard = Shard(
            name=f"val-{number:05d}.bin",
            source=sources[group[0]],
            split="val",
            tokens=sum(part.tokens for part in parts),
            docs=sum(part.docs for part in parts),
            text_bytes=sum(records[i]["splits"]["val"]["text_bytes"] for i in group),
            sha256=sha256[path.name],
            docs_sha256=sha256[docs_path(path).name],
            parts=parts,
        )
        files[shard.name] = path
        files[shard.docs_name] = docs_path(path)
        shards.append(shard)
    return shards


def _manifest(
    source: RawManifest,
    selection_key: str | None,
    params: TokenizeParams,
    records: Sequence[Record],
    commits: list[ChunkRecord],
    shards: list[Shard],
) -> Manifest:
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record["skipped"])
    for file in source.files:
        skipped.update(file.skipped)
    totals = {}
    for split in SPLITS:
        of_split = [shard for shard in shards if shard.split == split]
        keys = ("docs", "tokens", "text_bytes")
        sums = {key: sum(getattr(shard, key) for shard in of_split) for key in keys}
        totals[split] = Totals(shards=len(of_split), **sums)
    return Manifest(
        dataset_key=dataset_key(records),
        format=FORMAT,
        dtype="uint16",
        tokenizer=Tokenizer(
            name="gpt2",
            ranks_sha256=tokenizer.RANKS_SHA256,
            n_vocab=tokenizer.N_VOCAB,
            eot=tokenizer.EOT,
        ),
        params=params.model_dump(),
        source=source,
        selection_key=selection_key,
        chunks=commits,
        shards=shards,
        totals=totals,
        skipped=dict(skipped),
    )
