"""Stage `download`: the source's text, as parquet in FineWeb's schema, into `data/raw`."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from pipeline import atomic, stage
from pipeline.machine import Machine
from pipeline.manifest import NAME, RawManifest, SourceFile
from pipeline.params import SourceParams, load_section
from pipeline.sources import sample_source, write_sample
from pipeline.store import Store, publish

OUT = Path("data/raw")


def download(params: SourceParams, store: Store, out: Path) -> RawManifest:
    """Bring the source's files into the store, by their sha256, and publish them in ``out``."""
    scratch = store.root / "tmp" / "source-sample"
    with store.lock("source", "sample"):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        files, links = [], {}
        for path in write_sample(scratch, params.files):
            sha256 = atomic.sha256_file(path)
            with store.lock("files", sha256):
                if store.find("files", sha256) is None:
                    with store.make("files", sha256) as piece:
                        path.rename(piece / "data.parquet")
            stored = store.root / "files" / sha256 / "data.parquet"
            rows = pq.read_metadata(stored).num_rows
            size = stored.stat().st_size
            files.append(SourceFile(path=path.name, bytes=size, rows=rows, sha256=sha256))
            links[path.name] = stored
        shutil.rmtree(scratch)
    manifest = RawManifest(source=sample_source(), files=files)
    publish({**links, NAME: atomic.json_bytes(manifest.model_dump())}, out)
    return manifest


def main() -> None:
    """Read the parameters, download, print one summary."""
    params = load_section("source", SourceParams)
    manifest = download(params, Store.open(Machine.load()), OUT)
    files = manifest.files
    print(
        f"download: {manifest.source.repo} at {manifest.source.revision}: {len(files)} files, "
        f"{sum(f.rows for f in files):,} documents, {sum(f.bytes for f in files) / 1e6:.1f} MB "
        f"in {OUT}"
    )


if __name__ == "__main__":
    stage.run(main)
