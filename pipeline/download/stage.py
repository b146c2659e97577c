"""Stage `download`: the source's text, as parquet, into `data/raw`."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.cluster.join import cluster, run_tasks
from pipeline.download.ingest import (
    Item,
    Kept,
    arrived,
    bring,
    find,
    keep,
    piece_path,
    published_path,
)
from pipeline.download.row_groups import inspect
from pipeline.download.sample import sample_source, write_sample
from pipeline.format.foreign_tokens import SUFFIXES, is_token_file, open_token_file, split_of_file
from pipeline.format.manifest import NAME, RawManifest, Source, SourceFile
from pipeline.params import SourceParams
from pipeline.runtime.machine import Machine
from pipeline.runtime.progress import Progress
from pipeline.store import atomic
from pipeline.store.store import Store, publish, require_space

OUT = Path("data/raw")

# FineWeb's sample-10BT: 10.3 billion tokens in 15 parquet files of 2.15 GB.
_TOKENS_PER_100_BYTES = 32
_TOKEN_BYTES = 2
# A download waits for the network most of the time.
_TASK_CPUS = 0.25


def download(params: SourceParams, store: Store, out: Path, machine: Machine) -> RawManifest:
    """Bring the source's files into the store, by their sha256, and publish them in ``out``.

    Files that stand in the store are not fetched again; what a killed run had of a file is kept.

    Raises:
        UserError: the source cannot be had as the parameters name it.
    """
    if params.kind == "sample":
        source = sample_source()
        files = _sample(params, store)
    else:
        source, files = _fetched(params, store, out, machine)
    manifest = RawManifest(source=source, text_column=params.text_column, files=files)
    links: dict[str, Path | bytes] = {
        file.path: piece_path(store, file.path, file.sha256) for file in files
    }
    publish({**links, NAME: atomic.json_bytes(manifest.model_dump())}, out)
    return manifest


def _sample(params: SourceParams, store: Store) -> list[SourceFile]:
    scratch = store.root / "tmp" / "source-sample"
    files = []
    with store.lock("source", "sample"):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for path in write_sample(scratch, params.files):
            sha256 = atomic.sha256_file(path)
            keep(store, path, sha256)
            stored = piece_path(store, path.name, sha256)
            rows, size = pq.read_metadata(stored).num_rows, stored.stat().st_size
            files.append(SourceFile(path=path.name, bytes=size, rows=rows, sha256=sha256))
        shutil.rmtree(scratch)
    return files


def _fetched(
    params: SourceParams, store: Store, out: Path, machine: Machine
) -> tuple[Source, list[SourceFile]]:
    """What the source is, and its files, which stand in the store."""
    source, items = _resolve(params, machine)
    items = first_of(items, params)
    column = params.text_column
    stored = {} if store.fresh else {i: find(item, column, store) for i, item in enumerate(items)}
    kept = {i: piece for i, piece in stored.items() if piece is not None}
    missing = [i for i in range(len(items)) if i not in kept]
    left = sum(items[i].size for i in missing)
    print(
        f"download: {len(items)} files of {sum(item.size for item in items) / 1e6:,.1f} MB; "
        f"{len(items) - len(missing)} stand in the store, {len(missing)} of {left / 1e6:,.1f} MB "
        "to fetch",
        flush=True,
    )
    if missing:
        wanted = [items[i] for i in missing]
        _require_space(wanted, params, store, out)
        fetched = _fetch(wanted, column, store, machine)
        kept |= {missing[nth]: piece for nth, piece in fetched.items()}
    files = []
    for index, item in enumerate(items):
        piece, name = kept[index], published_path(item)
        path = piece_path(store, name, piece.sha256)
        has_tokens = is_token_file(name)
        files.append(
            SourceFile(
                path=name,
                bytes=path.stat().st_size,
                rows=0 if has_tokens else inspect(path, item.path, column),
                tokens=open_token_file(path, item.path).tokens if has_tokens else None,
                sha256=piece.sha256,
                origin=piece.origin,
            )
        )
    if not source.revision:  # nobody else names it
        hashes = [file.origin or file.sha256 for file in files]
        source = source.model_copy(update={"revision": atomic.sha256_json(hashes)})
    return source, files


def _resolve(params: SourceParams, machine: Machine) -> tuple[Source, Sequence[Item]]:
    # Their libraries take seconds to import, which the sample does not pay for.
    if params.kind == "hub":
        from pipeline.download import hub

        return hub.resolve(params, machine.patience)
    from pipeline.download import local_files

    formats = SUFFIXES if params.kind == "tokens" else local_files.TEXT_FORMATS
    items = local_files.resolve(params.paths, formats)
    return Source(kind=params.kind, repo=params.kind, revision=""), items


def first_of(items: Sequence[Item], params: SourceParams) -> list[Item]:
    """The files that `files`, `max_bytes` and `max_tokens` leave; the first always.

    Of tokens they cut the training files; those of validation are all taken.
    """
    apart: list[Item] = []
    if params.kind == "tokens":
        apart = [item for item in items if split_of_file(item.path) == "val"]
        items = [item for item in items if split_of_file(item.path) != "val"]
    taken: list[Item] = []
    size = 0
    for item in items[: params.files]:
        size += item.size
        tokens = _estimated_tokens(size, params)
        if taken and (size > (params.max_bytes or size) or tokens > (params.max_tokens or tokens)):
            break
        taken.append(item)
    return taken + apart


def _estimated_tokens(size: int, params: SourceParams) -> int:
    return size * (50 if params.kind == "tokens" else _TOKENS_PER_100_BYTES) // 100


def _require_space(items: Sequence[Item], params: SourceParams, store: Store, out: Path) -> None:
    """Refuse before the first byte what would fill the disk: the files, and their tokens."""
    column = params.text_column
    size = sum(item.size for item in items)
    left = sum(max(0, item.space(store.root) - arrived(item, column, store)) for item in items)
    # Token files may do as they are; `tokenize` sees which of them do not.
    tokens = 0 if params.kind == "tokens" else _estimated_tokens(size, params) * _TOKEN_BYTES
    require_space(store.root, left + tokens, "the source and its tokens")
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    if folder.stat().st_dev != store.root.stat().st_dev:
        require_space(folder, size + tokens, "a copy of them, for the store is on another disk,")


def _fetch(items: Sequence[Item], column: str, store: Store, machine: Machine) -> dict[int, Kept]:
    """Fetch files by Ray tasks, so many at a time; what came of each, by its index."""
    size = sum(item.size for item in items)
    at_start = [arrived(item, column, store) for item in items]
    done: dict[int, Kept] = {}
    tasks = [(item, column, store, machine.patience) for item in items]
    in_flight, paths = machine.parallel_downloads, [path for item in items if (path := item.here)]
    with (
        cluster(machine, paths) as cpus,
        Progress("download", size - sum(at_start), "bytes") as progress,
    ):
        started = time.monotonic()

        def look() -> None:
            """Show what has arrived in the partial files."""
            new = 0
            for index, item in enumerate(items):
                here = item.size if index in done else arrived(item, column, store)
                new += here - at_start[index]
            rate = new / 1e6 / max(time.monotonic() - started, 1e-3)
            more = max(new - progress.done, 0)
            progress.advance(more, f"{rate:.1f} MB/s, {len(done)} of {len(items)} files")

        share = min(_TASK_CPUS, cpus * 10_000 // in_flight / 10_000)  # Ray takes four decimals
        labels, sizes = [item.path for item in items], [item.size for item in items]
        for index, piece in run_tasks(
            bring, tasks, in_flight, "download", share, look,
            labels=labels, sizes=sizes, progress=progress,
        ):  # fmt: skip
            done[index] = piece
            look()
    return done
