"""Stage `download`: the source's text, as parquet, into `data/raw`."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from pipeline import atomic, stage
from pipeline.cluster import cluster, run_tasks
from pipeline.machine import Machine
from pipeline.manifest import NAME, RawManifest, Source, SourceFile
from pipeline.params import SourceParams, load_section
from pipeline.pieces import PIECE, Item, Kept, arrived, bring, find, keep, published_path
from pipeline.progress import Progress
from pipeline.recut import inspect
from pipeline.sources import sample_source, write_sample
from pipeline.store import Store, publish, require_space

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
        file.path: store.root / "files" / file.sha256 / PIECE for file in files
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
            stored = store.root / "files" / sha256 / PIECE
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
        _require_space(wanted, column, store, out)
        fetched = _fetch(wanted, column, store, machine)
        kept |= {missing[nth]: piece for nth, piece in fetched.items()}
    files = []
    for index, item in enumerate(items):
        piece = kept[index]
        path = store.root / "files" / piece.sha256 / PIECE
        files.append(
            SourceFile(
                path=published_path(item),
                bytes=path.stat().st_size,
                rows=inspect(path, item.path, column),
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
        from pipeline import hub

        return hub.resolve(params, machine.patience)
    from pipeline import files

    items = files.resolve(params.paths)
    return Source(kind="files", repo="files", revision=""), items


def first_of(items: Sequence[Item], params: SourceParams) -> list[Item]:
    """The files that `files`, `max_bytes` and `max_tokens` leave; the first always."""
    taken: list[Item] = []
    size = 0
    for item in items[: params.files]:
        size += item.size
        tokens = size * _TOKENS_PER_100_BYTES // 100
        if taken and (size > (params.max_bytes or size) or tokens > (params.max_tokens or tokens)):
            break
        taken.append(item)
    return taken


def _require_space(items: Sequence[Item], column: str, store: Store, out: Path) -> None:
    """Refuse before the first byte what would fill the disk: the files, and their tokens."""
    size = sum(item.size for item in items)
    left = sum(max(0, item.space(store.root) - arrived(item, column, store)) for item in items)
    tokens = size * _TOKENS_PER_100_BYTES // 100 * _TOKEN_BYTES
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
    in_flight = machine.parallel_downloads
    with cluster(machine) as cpus, Progress("download", size - sum(at_start), "bytes") as progress:
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
        for index, piece in run_tasks(bring, tasks, in_flight, "download", share, look):
            done[index] = piece
            look()
    return done


def main() -> None:
    """Read the parameters, download, print one summary."""
    params = load_section("source", SourceParams)
    machine = Machine.load()
    manifest = download(params, Store.open(machine), OUT, machine)
    files = manifest.files
    print(
        f"download: {manifest.source.repo} at {manifest.source.revision}: {len(files)} files, "
        f"{sum(f.rows for f in files):,} documents, {sum(f.bytes for f in files) / 1e6:.1f} MB "
        f"in {OUT}"
    )


if __name__ == "__main__":
    stage.run(main)
