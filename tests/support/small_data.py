"""Small real data, and a project folder of its own in which the real commands run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format.manifest import NAME, Manifest, RawManifest, Source, SourceFile
from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize.chunk_plan import plan_chunks
from pipeline.tokenize.encode_chunk import chunk_key, encode_chunk
from pipeline.tokenize.stage import tokenize
from tests.support.repo import REPO

CODE = "code of a test"


def write_parquet(path: Path, texts: Sequence[str | None], group: int = 7) -> SourceFile:
    """A parquet file in FineWeb's schema."""
    rows = [
        {
            "text": text,
            "id": f"<urn:test:{i}>",
            "dump": "test",
            "url": f"https://example.org/{i}",
            "date": "2020-01-01T00:00:00Z",
            "file_path": "test",
            "language": "en",
            "language_score": 1.0,
            "token_count": 0,
        }
        for i, text in enumerate(texts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=FINEWEB_SCHEMA)
    pq.write_table(table, path, row_group_size=group, compression="zstd")
    return SourceFile(
        path=path.name,
        bytes=path.stat().st_size,
        rows=len(texts),
        sha256=atomic.sha256_file(path),
    )


def write_raw(
    folder: Path, files: Sequence[Sequence[str | None]], group: int = 7, name: str = "part"
) -> Path:
    """A `data/raw` of these texts."""
    described = [
        write_parquet(folder / f"{name}-{i}.parquet", texts, group) for i, texts in enumerate(files)
    ]
    source = Source(kind="test", repo="test", revision="1")
    manifest = RawManifest(source=source, files=described)
    atomic.write_json(folder / NAME, manifest.model_dump())
    return folder


def some_texts(count: int, salt: str = "") -> list[str | None]:
    """Different texts of a hundred to a thousand tokens."""
    return [
        f"{salt} Document {i} begins. " + f"The {i}th law of the land, {salt}é. " * (9 + 7 * i % 80)
        for i in range(count)
    ]


def tokenize_here(
    raw: Path, out: Path, params: TokenizeParams, machine: Machine, code: str = CODE
) -> Manifest:
    """The stage, its chunks encoded in this process first: nothing is left for Ray to do."""
    manifest = RawManifest.load(raw)
    column, store = manifest.text_column, Store.open(machine)
    for chunk in plan_chunks(raw, manifest.files, column, params.shard_tokens):
        key = chunk_key(chunk, column, params, code)
        how = machine.engine, machine.check_fraction
        encode_chunk(chunk, key, raw, column, params, store, *how)
    return tokenize(raw, out, params, machine, code)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file below ``folder``, by its relative name."""
    return {
        path.relative_to(folder).as_posix(): atomic.sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def split_bytes(out: Path, split: str) -> bytes:
    """The token bytes of a split's shards, one after another."""
    return b"".join(path.read_bytes()[1024:] for path in sorted(out.glob(f"{split}-*.bin")))


def flip(path: Path, offset: int, keep_mtime: bool = False) -> None:
    """Flip the bits of one byte in place, as a bad disk or a careless hand does."""
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
source:
  kind: sample
  files: null
tokenize:
  shard_tokens: {shard_tokens}
  val_per_10k: {val_per_10k}
verify:
  retokenize: 1
"""


class Project:
    """A folder with the package's code, `params.yaml`, `dvc.yaml` and `data/raw`."""

    def __init__(self, root: Path, raw: Path, shard_tokens: int = 2000, val: int = 1500) -> None:
        self.root = root
        self.chunks = root / ".work" / "chunks"
        self.tokens = root / "data" / "tokens"
        package = root / "pipeline"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / "pipeline", package, ignore=ignored)
        modules = "".join(f"      - pipeline/{p.name}\n" for p in sorted(package.glob("*.py")))
        (root / "dvc.yaml").write_text(f"stages:\n  tokenize:\n    deps:\n{modules}")
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
        """Run a stage as a user does, to its end."""
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
    """In place of `pipeline.cluster.join.cluster`, for tests whose tasks run in this process."""
    yield 1


def run_here(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *_: Any, **__: Any
) -> Iterator[tuple[int, Any]]:
    """In place of `pipeline.cluster.tasks.run_tasks`: each task in this process, in order."""
    for index, task in enumerate(tasks):
        yield index, function(*task)


MakeProject = Callable[[str], Project]
