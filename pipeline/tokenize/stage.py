"""Stage `tokenize`: parquet, or tokens as they come, to token shards and their manifest."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster.join import cluster, run_tasks
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
from pipeline.format.shards import ShardWriter, docs_path, open_shard, read_docs
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.runtime.progress import Progress
from pipeline.store import atomic
from pipeline.store.store import Store, merged_key, publish, require_space, unlink_bad
from pipeline.tokenize import engines, ship_chunks
from pipeline.tokenize.chunk_plan import Chunk, plan_chunks
from pipeline.tokenize.encode_chunk import (
    RECORD,
    Record,
    chunk_key,
    dataset_key,
    encode_chunk,
    read_engine,
    read_record,
)
from pipeline.tokenize.index_chunk import index_chunk, index_key, plan_token_chunks, written_tokens

RAW = Path("data/raw")
OUT = Path("data/tokens")
FORMAT = "llm.c"

# What a worker takes at its peak on chunks of 20M tokens, and some air.
_TASK_MEMORY = 700 * 2**20


def tokenize(raw: Path, out: Path, params: TokenizeParams, machine: Machine, code: str) -> Manifest:
    """Tokenize the parquet files of ``raw`` into ``out``; token files are indexed only.

    Chunks that stand in the store are not made again, so a killed run goes on where it was, and a
    changed parameter or one more file costs only what it changes.

    Args:
        code: the code key of this stage.

    Raises:
        UserError: on missing or unreadable input, or a disk too small.
    """
    store = Store.open(machine)
    source = RawManifest.load(raw)
    column = source.text_column
    if source.source.kind == "tokens":
        chunks = plan_token_chunks(raw, source.files, params.shard_tokens)
        keys = [index_key(chunk, code) for chunk in chunks]
    else:
        chunks = plan_chunks(raw, source.files, column, params.shard_tokens)
        keys = [chunk_key(chunk, column, params, code) for chunk in chunks]
    missing = [i for i, key in enumerate(keys) if store.fresh or store.find("chunks", key) is None]
    estimate = sum(chunk.estimated_tokens for chunk in chunks)
    print(
        f"tokenize: {len(source.files)} files, {len(chunks)} chunks, about {estimate:,} tokens; "
        f"{len(chunks) - len(missing)} chunks done before, {len(missing)} to do",
        flush=True,
    )
    if missing:
        _encode_missing(missing, chunks, keys, raw, source, params, machine, store)
    pieces = [store.root / "chunks" / key for key in keys]
    records = [read_record(piece) for piece in pieces]
    files: dict[str, Path | bytes] = {}
    shards = [
        *_link_train(pieces, records, files),
        *_merge_val(pieces, records, params.shard_tokens, store, files),
    ]
    commits = []
    for index, (piece, key) in enumerate(zip(pieces, keys, strict=True)):
        name, sha256 = f"chunks/{index:05d}.json", store.sha256("chunks", key)[RECORD]
        files[name] = piece / RECORD
        commits.append(ChunkRecord(name=name, chunk_key=key, sha256=sha256))
    manifest = _manifest(source, params, records, commits, shards)
    publish({**files, NAME: atomic.json_bytes(manifest.model_dump())}, out)
    return manifest


def _encode_missing(
    missing: Sequence[int],
    chunks: Sequence[Chunk],
    keys: Sequence[str],
    raw: Path,
    source: RawManifest,
    params: TokenizeParams,
    machine: Machine,
    store: Store,
) -> None:
    if store.fresh:
        for index in missing:
            with store.lock("chunks", keys[index]):
                store.discard("chunks", keys[index])
    tokens = sum(chunks[i].estimated_tokens for i in missing)
    work: Callable[..., Record]
    tasks: list[tuple[Any, ...]]
    has_text = source.source.kind != "tokens"
    if not has_text:
        work, written = index_chunk, sum(written_tokens(chunks[i], raw) for i in missing)
        tasks = [(chunks[i], keys[i], raw.absolute(), store) for i in missing]
    else:
        work, written, column = encode_chunk, tokens, source.text_column
        how = machine.engine, machine.check_fraction
        tasks = [(chunks[i], keys[i], raw.absolute(), column, params, store, *how) for i in missing]
        if machine.engine != "tiktoken" and (reason := engines.why_not_fast()) is not None:
            print(f"tokenize: {reason}: tiktoken serves, at a tenth of the speed", flush=True)
    require_space(store.root, 5 * written // 2, "the token shards")  # 2 bytes each, and some air
    documents, text_bytes, began = 0, 0, time.monotonic()
    encoded: Counter[str] = Counter()
    files = [raw / chunks[i].file.path for i in missing]
    with (
        cluster(machine, files, ships=has_text),
        Progress("tokenize", tokens, "tokens") as progress,
    ):
        how_run: dict[str, Any] = {
            "labels": [chunks[i].label for i in missing],
            "sizes": [chunks[i].estimated_tokens for i in missing],
            "memory": _TASK_MEMORY,
            "progress": progress,
        }
        if has_text and machine.data == "ship":
            finished = ship_chunks.encode_chunks(tasks, **how_run)
        else:
            finished = run_tasks(work, tasks, None, "tokenize", **how_run)
        for nth, record in finished:
            chunk = chunks[missing[nth]]
            made = read_engine(store.root / "chunks" / keys[missing[nth]])
            _warn_of_differences(made["differences"], chunk)
            encoded.update(made["bytes"])
            documents += sum(facts["docs"] for facts in record["splits"].values())
            text_bytes += sum(facts["text_bytes"] for facts in record["splits"].values())
            speed = text_bytes / 1e6 / (time.monotonic() - began)
            progress.advance(chunk.estimated_tokens, f"{documents:,} documents, {speed:.1f} MB/s")
    if encoded:
        share = 100 * encoded["tiktoken"] / encoded.total()
        print(f"tokenize: {share:.2f} % of the text was encoded by tiktoken", flush=True)


def _warn_of_differences(rows: Sequence[int], chunk: Chunk) -> None:
    for row in rows:
        print(
            f"warning: gigatoken and tiktoken differ on row {row} of {chunk.file.path}; tiktoken "
            "has encoded the chunk. Please report the document; engine: tiktoken in machine.yaml "
            "turns gigatoken off",
            flush=True,
        )


def _part(record: Record, split: Split) -> Part:
    facts = record["splits"][split]
    return Part(
        chunk_key=record["chunk_key"],
        path=record["source"]["path"],
        rows=record["rows"],
        tokens=facts["tokens"],
        docs=facts["docs"],
    )


def _link_train(
    pieces: Sequence[Path], records: Sequence[Record], files: dict[str, Path | bytes]
) -> list[Shard]:
    """Each chunk's train documents are a shard as they stand."""
    shards: list[Shard] = []
    for piece, record in zip(pieces, records, strict=True):
        if (facts := record["splits"].get("train")) is None:
            continue
        shard = Shard(
            name=f"train-{len(shards):05d}.bin",
            split="train",
            tokens=facts["tokens"],
            docs=facts["docs"],
            text_bytes=facts["text_bytes"],
            sha256=facts["sha256"],
            docs_sha256=facts["docs_sha256"],
            parts=[_part(record, "train")],
        )
        files[shard.name] = piece / "train.bin"
        files[shard.docs_name] = docs_path(piece / "train.bin")
        shards.append(shard)
    return shards


def _merge_val(
    pieces: Sequence[Path],
    records: Sequence[Record],
    shard_tokens: int,
    store: Store,
    files: dict[str, Path | bytes],
) -> list[Shard]:
    """The chunks' few validation documents, in chunk order, in shards of up to ``shard_tokens``."""
    groups: list[list[int]] = []
    size = 0
    for index, record in enumerate(records):
        if "val" not in record["splits"]:
            continue
        tokens = record["splits"]["val"]["tokens"]
        if not groups or size + tokens > shard_tokens:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += tokens
    shards = []
    for number, group in enumerate(groups):
        parts = [_part(records[i], "val") for i in group]
        key = merged_key([part.chunk_key for part in parts])
        with store.lock("merged", key):
            if store.fresh or store.find("merged", key) is None:
                with store.make("merged", key) as folder:
                    writer = ShardWriter(folder / "val.bin")
                    for index in group:
                        path = pieces[index] / "val.bin"
                        _check_unchanged(path, records[index]["splits"]["val"]["sha256"])
                        writer.append(open_shard(path), read_docs(path))
                    writer.close()
        sha256 = store.sha256("merged", key)
        path = store.root / "merged" / key / "val.bin"
        shard = Shard(
            name=f"val-{number:05d}.bin",
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


def _check_unchanged(path: Path, sha256: str) -> None:
    """Refuse to merge bytes that rotted unseen: the merged shard's hash would bless them."""
    if atomic.sha256_file(path) != sha256:
        unlink_bad(path)  # so the store sees that the piece is not whole
        raise RuntimeError(f"{path} was damaged; `dvc repro` makes it anew")


def _manifest(
    source: RawManifest,
    params: TokenizeParams,
    records: Sequence[Record],
    commits: list[ChunkRecord],
    shards: list[Shard],
) -> Manifest:
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record["skipped"])
    totals = {}
    for split in SPLITS:
        of_split = [shard for shard in shards if shard.split == split]
        totals[split] = Totals(
            shards=len(of_split),
            docs=sum(shard.docs for shard in of_split),
            tokens=sum(shard.tokens for shard in of_split),
            text_bytes=sum(shard.text_bytes for shard in of_split),
        )
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
        chunks=commits,
        shards=shards,
        totals=totals,
        skipped=dict(skipped),
    )
