"""Stage `download`: fetch the files of all sources and publish them in `data/raw`.

The files of a single source are in `data/raw` itself, those of several in a folder per source.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.cluster.join import cluster
from pipeline.cluster.tasks import run_tasks
from pipeline.download.ingest import (
    FaultyFile,
    SourceItem,
    StoredFile,
    add_to_store,
    find_stored,
    ingest_or_fault,
    item_key,
    partial_sizes,
    raw_path,
    remove_partial,
    stored_path,
)
from pipeline.download.raw_names import check_names
from pipeline.download.sample import sample_source, write_sample
from pipeline.download.to_parquet import ReadOptions
from pipeline.format.foreign_tokens import SUFFIXES, is_token_file, open_token_file, split_of_file
from pipeline.format.manifest import NAME, RawManifest, Source, SourceFile
from pipeline.format.parquet import check_text_column
from pipeline.params import SourceParams, Sources, errors_of_source
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.runtime.progress import Progress
from pipeline.store import atomic
from pipeline.store.store import Store, publish, require_space

OUT = Path("data/raw")

# FineWeb's sample-10BT: 10.3 billion tokens in 15 parquet files of 2.15 GB.
_TOKENS_PER_100_BYTES = 32
_TOKEN_BYTES = 2
# Of a task where any file is on a server: it mostly waits for the network. A local file's computes.
_REMOTE_CPUS = 0.25
_LINES = 20  # of a list in a message


def download(sources: Sources, store: Store, out: Path, machine: Machine) -> RawManifest:
    """Fetch the sources' files into the store, and publish them and their manifest in ``out``.

    Raises:
        UserError: A source is unavailable, or its parameters do not match it.
    """
    manifest = fetch(sources, store, out, machine)
    links: dict[str, Path | bytes] = {
        file.path: stored_path(store, file.path, file.sha256) for file in manifest.files
    }
    publish({**links, NAME: atomic.json_bytes(atomic.sealed(manifest.model_dump()))}, out)
    return manifest


def fetch(sources: Sources, store: Store, out: Path, machine: Machine) -> RawManifest:
    """Fetch the sources' files into the store, keyed by sha256; return their manifest.

    Files already in the store are not fetched again, and unfinished downloads are resumed.

    Args:
        out: The folder that will hold the files, for a check of the space on its disk.

    Raises:
        UserError: A source is unavailable, or its parameters do not match it.
    """
    origins, files = {}, []
    for name, params in sorted(sources.items()):
        origin, found = fetch_source(name, params, store, out, machine)
        origins[name] = origin.model_copy(update={"text_column": params.text_column})
        folder = f"{name}/" if len(sources) > 1 else ""
        files += [file.model_copy(update={"path": folder + file.path}) for file in found]
    return RawManifest(sources=origins, files=files)


def fetch_source(
    name: str, params: SourceParams, store: Store, out: Path, machine: Machine
) -> tuple[Source, list[SourceFile]]:
    """Fetch the files of one source; their paths are those within the source.

    Raises:
        UserError: The source is unavailable, or its parameters do not match it.
    """
    with errors_of_source(name):
        if params.kind == "sample":
            return sample_source(), _store_sample(name, params, store)
        return _fetch_remote(name, params, store, out, machine)


def _store_sample(name: str, params: SourceParams, store: Store) -> list[SourceFile]:
    scratch = store.root / "tmp" / "source-sample"
    files = []
    with store.lock("source", "sample"):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for path in write_sample(scratch, params.files):
            sha256 = atomic.sha256_file(path)
            add_to_store(store, path, sha256)
            stored = stored_path(store, path.name, sha256)
            rows, size = pq.read_metadata(stored).num_rows, stored.stat().st_size
            entry = {"path": path.name, "bytes": size, "rows": rows, "sha256": sha256}
            files.append(SourceFile(source=name, **entry))
        shutil.rmtree(scratch)
    return files


def _fetch_remote(
    name: str, params: SourceParams, store: Store, out: Path, machine: Machine
) -> tuple[Source, list[SourceFile]]:
    """Fetch all files that are not in the store; return the source and its files."""
    source, items = _resolve(name, params, machine)
    items = select_items(items, params)
    check_names(items)
    options = ReadOptions(params.text_column, params.text_documents, params.encoding)
    stored: dict[int, StoredFile | FaultyFile] = {}
    if not store.fresh:
        found = ((i, find_stored(item, options, store)) for i, item in enumerate(items))
        stored = {i: file for i, file in found if file is not None}
        for i in stored:
            remove_partial(items[i], options, store)
    missing = [i for i in range(len(items)) if i not in stored]
    print(
        f"download: {name}: {len(items)} files, {sum(item.size for item in items) / 1e6:,.1f} MB; "
        f"{len(stored)} already in the store, {len(missing)} to fetch "
        f"({sum(items[i].size for i in missing) / 1e6:,.1f} MB)",
        flush=True,
    )
    if missing:
        wanted = [items[i] for i in missing]
        _require_space(wanted, params, options, store, out)
        fetched = _fetch_items(wanted, options, store, machine)
        stored |= {missing[nth]: file for nth, file in fetched.items()}
    described = [(item, stored[i]) for i, item in enumerate(items)]
    files = _describe(name, described, options.column, store)
    if not source.revision:  # kinds files and tokens have no revision of their own
        hashes = [file.origin or file.sha256 for file in files]
        source = source.model_copy(update={"revision": atomic.sha256_json(hashes)})
    return source, files


def _describe(
    source: str,
    stored: Sequence[tuple[SourceItem, StoredFile | FaultyFile]],
    column: str,
    store: Store,
) -> list[SourceFile]:
    """Return the manifest's entries of files in the store, and print what was skipped.

    Raises:
        UserError: All faults, one per line; or there is no row in any file.
    """
    files, faults, skipping = [], [], []
    for item, file in stored:
        try:
            if isinstance(file, FaultyFile):
                raise file
            name = raw_path(item)
            path = stored_path(store, name, file.sha256)
            has_tokens = is_token_file(name)
            rows = 0 if has_tokens else check_text_column(path, item.path, column)
            tokens = open_token_file(path, item.path).tokens if has_tokens else None
        except UserError as fault:
            faults.append(fault)
            continue
        if file.skipped:
            counts = ", ".join(
                f"{rows.count:,} {reason} (first: number {rows.first:,})"
                for reason, rows in file.skipped.items()
            )
            skipping.append(f"download: {item.path}: lines or rows skipped: {counts}")
        files.append(
            SourceFile(
                source=source,
                path=name,
                bytes=path.stat().st_size,
                rows=rows,
                tokens=tokens,
                sha256=file.sha256,
                origin=file.origin,
                skipped={reason: rows.count for reason, rows in file.skipped.items()},
            )
        )
    if skipping:
        print(_some(skipping), flush=True)
    _raise_faults(faults)
    if not any(file.rows or file.tokens for file in files):
        more = f" and in {len(files) - 1} other files" if len(files) > 1 else ""
        raise UserError(
            f"params.yaml: sources.{source}: no rows in {stored[0][0].path}{more}; choose a source "
            "with text"
        )
    return files


def _raise_faults(faults: Sequence[UserError]) -> None:
    """Raise one error for all faults, a line each."""
    lines = list(dict.fromkeys(map(str, faults)))  # one of a parameter is the same for each file
    if lines:
        raise UserError(_some(lines))


def _some(lines: Sequence[str]) -> str:
    more = len(lines) - _LINES
    return "\n".join([*lines[:_LINES], *([f"and {more:,} more"] if more > 0 else [])])


def _resolve(
    name: str, params: SourceParams, machine: Machine
) -> tuple[Source, Sequence[SourceItem]]:
    # Imported here: their libraries take seconds to import, and the sample needs none of them.
    if params.kind == "hub":
        from pipeline.download import hub

        return hub.resolve(params, machine.patience, name)
    if params.kind in ("files", "tokens"):
        from pipeline.download import source_paths

        formats = SUFFIXES if params.kind == "tokens" else source_paths.TEXT_FORMATS
        items = source_paths.resolve(params.paths, formats, params.exclude, name)
        return Source(kind=params.kind, repo=params.kind, revision=""), items
    raise AssertionError(f"kind {params.kind}: no module in pipeline/download resolves it")


def select_items(items: Sequence[SourceItem], params: SourceParams) -> list[SourceItem]:
    """Return the first items within `files`, `max_bytes` and `max_tokens`, at least one.

    For source kind `tokens` the limits apply to training files; all validation files are included.
    """
    validation: list[SourceItem] = []
    if params.kind == "tokens":
        validation = [item for item in items if split_of_file(item.path) == "val"]
        items = [item for item in items if split_of_file(item.path) != "val"]
    selected: list[SourceItem] = []
    size = 0
    for item in items[: params.files]:
        size += item.size
        tokens = _estimated_tokens(size, params)
        if selected and (
            size > (params.max_bytes or size) or tokens > (params.max_tokens or tokens)
        ):
            break
        selected.append(item)
    return selected + validation


def _estimated_tokens(size: int, params: SourceParams) -> int:
    return size * (50 if params.kind == "tokens" else _TOKENS_PER_100_BYTES) // 100


def _require_space(
    items: Sequence[SourceItem],
    params: SourceParams,
    options: ReadOptions,
    store: Store,
    out: Path,
) -> None:
    """Check before the first byte that the disk can hold the files and their tokens."""
    size = sum(item.size for item in items)
    unfinished = partial_sizes(store)
    left = sum(max(0, item.size - unfinished.get(item_key(item, options), 0)) for item in items)
    # `tokenize` may use token files unchanged, and makes its own check for the others.
    tokens = 0 if params.kind == "tokens" else _estimated_tokens(size, params) * _TOKEN_BYTES
    require_space(store.root, left + tokens, "the source and its tokens")
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    if folder.stat().st_dev != store.root.stat().st_dev:
        require_space(folder, size + tokens, "a copy of the source and its tokens")


def _fetch_items(
    items: Sequence[SourceItem], options: ReadOptions, store: Store, machine: Machine
) -> dict[int, StoredFile | FaultyFile]:
    """Fetch files in Ray tasks; return the results by index.

    Files are fetched `parallel_downloads` at a time; if all are local, one per CPU.

    A fault of one file does not keep the others from being fetched. A fault that may be common to
    all does, so that a run without network does not wait for each.
    """
    keys = [item_key(item, options) for item in items]
    pending = {key: item.size for key, item in zip(keys, items, strict=True)}
    left = sum(pending.values())
    done: dict[int, StoredFile | FaultyFile] = {}
    tasks = [(item, options, store, machine.patience) for item in items]
    paths = [path for item in items if (path := item.local_path)]

    def missing() -> int:
        """Return the bytes of pending files that are not here yet."""
        here = partial_sizes(store).items()
        return left - sum(min(pending.get(key, 0), size) for key, size in here)

    at_start = missing()
    with cluster(machine, paths) as cpus, Progress("download", at_start, "bytes") as progress:
        started = time.monotonic()

        def show_progress() -> None:
            """Show the bytes received, from the sizes of the partial files."""
            new = at_start - missing()
            rate = new / 1e6 / max(time.monotonic() - started, 1e-3)
            more = max(new - progress.done, 0)
            progress.advance(more, f"{rate:.1f} MB/s, {len(done)} of {len(items)} files")

        in_flight, share = None, 1.0
        if len(paths) < len(items):
            in_flight = machine.parallel_downloads
            # Ray allows four decimals.
            share = min(_REMOTE_CPUS, max(1, cpus * 10_000 // in_flight) / 10_000)
        labels, sizes = [item.path for item in items], [item.size for item in items]
        try:
            for index, stored in run_tasks(
                ingest_or_fault, tasks, in_flight, "download", share, show_progress,
                labels=labels, sizes=sizes, progress=progress,
            ):  # fmt: skip
                done[index] = stored
                left -= pending.pop(keys[index], 0)
                show_progress()
        except UserError as error:
            _raise_faults([*(d for d in done.values() if isinstance(d, FaultyFile)), error])
    return done
