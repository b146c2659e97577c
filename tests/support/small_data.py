"""Small data sets, and project folders in which the real commands run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.format import tokenizer
from pipeline.format.manifest import NAME, Manifest, RawManifest, Source, SourceFile
from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize import engines
from pipeline.tokenize.chunk_plan import plan_chunks
from pipeline.tokenize.encode_chunk import chunk_key, encode_chunk
from pipeline.tokenize.stage import tokenize
from tests.support.repo import REPO

CODE = "code of a test"

needs_gigatoken = pytest.mark.skipif(
    engines.unavailable_reason() is not None, reason=str(engines.unavailable_reason())
)


def write_parquet(path: Path, texts: Sequence[str | None], group: int = 7) -> SourceFile:
    """Write a parquet file in FineWeb's schema."""
    rows = [
        {"text": text, "id": f"<urn:test:{i}>", "dump": "test", "url": f"https://example.org/{i}"}
        for i, text in enumerate(texts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=FINEWEB_SCHEMA)
    pq.write_table(table, path, row_group_size=group, compression="zstd")
    return describe(path, len(rows))


def describe(path: Path, rows: int) -> SourceFile:
    """Return the manifest's entry for a file of `data/raw`."""
    size, digest = path.stat().st_size, atomic.sha256_file(path)
    return SourceFile(source="main", path=path.name, bytes=size, rows=rows, sha256=digest)


def write_manifest(folder: Path, files: Sequence[SourceFile]) -> None:
    """Write the manifest of a `data/raw`."""
    source = Source(kind="test", repo="test", revision="1")
    names = sorted({file.source for file in files}) or ["main"]
    manifest = RawManifest(sources=dict.fromkeys(names, source), files=list(files))
    atomic.write_json(folder / NAME, manifest.model_dump())


def write_raw(
    folder: Path, files: Sequence[Sequence[str | None]], group: int = 7, name: str = "part"
) -> Path:
    """Write a `data/raw` with one parquet file per list of texts."""
    described = [
        write_parquet(folder / f"{name}-{i}.parquet", texts, group) for i, texts in enumerate(files)
    ]
    write_manifest(folder, described)
    return folder


def write_sources(folder: Path, sources: Mapping[str, Sequence[str | None]]) -> Path:
    """Write a `data/raw` with several sources, of one parquet file each."""
    files = []
    for name, texts in sorted(sources.items()):
        file = write_parquet(folder / name / "part.parquet", texts)
        files.append(file.model_copy(update={"source": name, "path": f"{name}/part.parquet"}))
    write_manifest(folder, files)
    return folder


def some_texts(count: int, salt: str = "") -> list[str | None]:
    """Return distinct texts of a hundred to a thousand tokens."""
    return [
        f"{salt} Document {i} begins. " + f"The {i}th law of the land, {salt}é. " * (9 + 7 * i % 80)
        for i in range(count)
    ]


def encode_document(text: str) -> np.ndarray:
    """Encode a document with tiktoken: (n + 1,) uint16, `<|endoftext|>` and n tokens."""
    return np.array([tokenizer.EOT, *tokenizer.encode(text)], dtype=np.uint16)


def tokenize_here(
    raw: Path, out: Path, params: TokenizeParams, machine: Machine, code: str = CODE
) -> Manifest:
    """Run the stage without Ray, by encoding its chunks in this process first."""
    manifest = RawManifest.load(raw)
    store = Store.open(machine)
    for chunk in plan_chunks(raw, manifest, params.shard_tokens):
        column = manifest.column(chunk.file)
        key = chunk_key(chunk, column, params, code)
        engine = machine.engine, machine.check_fraction
        encode_chunk(chunk, key, raw, column, params, store, *engine)
    return tokenize(raw, out, params, machine, code)


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file below ``folder``, by relative path."""
    return {
        path.relative_to(folder).as_posix(): atomic.sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def piece_times(store: Path = Path(".work")) -> dict[str, int]:
    """Return the modification time of each chunk's record in the store."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (store / "chunks").glob("*/record.json")}


def split_bytes(out: Path, split: str) -> bytes:
    """Return the concatenated token bytes of a split's shards."""
    return b"".join(path.read_bytes()[1024:] for path in sorted(out.glob(f"{split}-*.bin")))


def flip(path: Path, offset: int, keep_mtime: bool = False) -> None:
    """Invert one byte in place; with ``keep_mtime``, as a bad disk does."""
    status = path.stat()
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
    if keep_mtime:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


PARAMS = """\
sources: {{main: {{kind: sample, files: null}}}}
curate: {{}}
tokenize: {{shard_tokens: {shard_tokens}, val_per_10k: {val_per_10k}}}
verify: {{retokenize: 1}}
"""


class Project:
    """A folder with a copy of `pipeline/`, `params.yaml`, `dvc.yaml` and `data/raw`."""

    def __init__(self, root: Path, raw: Path, shard_tokens: int = 2000, val: int = 1500) -> None:
        self.root = root
        self.tokens = root / "data" / "tokens"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / "pipeline", root / "pipeline", ignore=ignored)
        shutil.copy(REPO / "dvc.yaml", root)
        (root / "params.yaml").write_text(
            PARAMS.format(shard_tokens=shard_tokens, val_per_10k=val), encoding="utf-8"
        )
        (root / "data").mkdir()
        shutil.copytree(raw, root / "data" / "raw")

    def command(self, stage: str, *flags: str) -> list[str]:
        return [sys.executable, "-m", f"pipeline.{stage}", *flags]

    def environment(self, **variables: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.root), "GPT2_WORKERS": "1", **variables}

    def run(self, stage: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a stage to its end, as a user does."""
        return subprocess.run(
            self.command(stage, *flags),
            cwd=self.root,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=300,
        )


@contextlib.contextmanager
def no_cluster(*_: Any, **__: Any) -> Iterator[int]:
    """Replacement of `pipeline.cluster.join.cluster` that starts no Ray."""
    yield 1


def run_here(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *_: Any,
    shared: Sequence[Any] = (),
    **__: Any,
) -> Iterator[tuple[int, Any]]:
    """Replacement of `pipeline.cluster.tasks.run_tasks` that runs tasks in this process."""
    for index, task in enumerate(tasks):
        yield index, function(*task, *shared)
