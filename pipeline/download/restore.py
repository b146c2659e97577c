"""The files of `data/raw`, made available when a stage is about to read them.

DVC keeps only the manifest of `data/raw`. After `dvc pull`, `dvc checkout` or `dvc exp apply` the
files that it lists may be missing, or those of another source may be there. Nothing here decides a
byte: a file is taken only if it has the sha256 of the manifest.
"""

from pathlib import Path

from pipeline.download.ingest import add_to_store, stored_name, stored_path
from pipeline.download.stage import fetch_source
from pipeline.format.manifest import NAME, RawManifest, SourceFile
from pipeline.params import load_sources
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store, publish


def restore(raw: Path, machine: Machine) -> None:
    """Make ``raw`` consist of its manifest and exactly the files that the manifest lists.

    Missing and damaged files come from the store, or else from the source, at the revision that the
    manifest records.

    Raises:
        UserError: The source is unavailable, or has other bytes than the manifest records.
    """
    manifest = RawManifest.load(raw)
    store = Store(Store.open(machine).root)  # not `fresh`: that is for the pieces of the stage
    places = {file.path: _find(file, raw, store) for file in manifest.files}
    if missing := [file for file in manifest.files if places[file.path] is None]:
        print(
            f"{raw}: {len(missing)} of {len(manifest.files)} files are neither here nor in the "
            "store; fetching them",
            flush=True,
        )
        for file in manifest.files:  # or they would be fetched as well
            if (place := places[file.path]) is not None and place.is_relative_to(raw):
                add_to_store(store, place, file.sha256, stored_name(file.path))
        _fetch_again(missing, manifest, raw, store, machine)
    paths = {
        file.path: places[file.path] or stored_path(store, file.path, file.sha256)
        for file in manifest.files
    }
    present = {path for path in raw.rglob("*") if not path.is_dir()}
    if present != {raw / NAME, *paths.values()}:
        publish({**paths, NAME: (raw / NAME).read_bytes()}, raw)


def _find(file: SourceFile, raw: Path, store: Store) -> Path | None:
    """Return the path of a file with the recorded bytes, in ``raw`` or in the store."""
    path, stored = raw / file.path, None
    if store.find("files", file.sha256) is not None:
        stored = stored_path(store, file.path, file.sha256)
    if path.is_file():
        # A hard link of the stored file, or a copy of it on another file system.
        if stored is not None and _stamp(path) == _stamp(stored):
            return path
        if path.stat().st_size == file.bytes and atomic.sha256_file(path) == file.sha256:
            return path
    return stored


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _fetch_again(
    missing: list[SourceFile], manifest: RawManifest, raw: Path, store: Store, machine: Machine
) -> None:
    """Fetch files that the store lacks, as they were when the manifest was written."""
    sources, fetched = load_sources(), {}
    folder = "{}/" if len(manifest.sources) > 1 else ""
    for name in sorted({file.source for file in missing}):
        params, origin = sources.get(name), manifest.sources[name]
        if (
            params is None
            or params.kind != origin.kind
            or (params.kind == "hub" and params.repo != origin.repo)
        ):
            raise UserError(
                f"params.yaml: sources.{name}: is not that of {raw / NAME}, whose files are "
                "missing; run `dvc repro download`"
            )
        if params.kind == "hub":
            params = params.model_copy(update={"revision": origin.revision})
        for file in fetch_source(name, params, store, raw, machine)[1]:
            fetched[folder.format(name) + file.path] = file.sha256
    for file in missing:
        if fetched.get(file.path) != file.sha256:
            raise UserError(
                f"{raw / file.path}: the source no longer has the bytes that {raw / NAME} records; "
                "to take the source as it is now, run `dvc repro --force download`"
            )
