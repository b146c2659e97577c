"""Tests for pipeline.download.stage and pipeline.download.sample, with source kind `sample`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.download import stage
from pipeline.download.source_paths import PathFile
from pipeline.download.stage import download
from pipeline.download.to_parquet import ReadOptions
from pipeline.format import tokenizer
from pipeline.format.manifest import RawManifest
from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.params import SourceParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from tests.support.small_data import flip, hashes


def test_the_sample_has_fineweb_columns_and_matches_its_manifest(sample_raw: Path) -> None:
    manifest = RawManifest.load(sample_raw)
    assert sorted(hashes(sample_raw)) == sorted(
        ["manifest.json", *(f.path for f in manifest.files)]
    )
    assert len(manifest.files) == 3
    tables = []
    for file in manifest.files:
        path = sample_raw / file.path
        assert atomic.sha256_file(path) == file.sha256
        assert path.stat().st_size == file.bytes
        tables.append(pq.read_table(path))
        assert tables[-1].schema.equals(FINEWEB_SCHEMA)
        assert tables[-1].num_rows == file.rows
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == len({row["id"] for row in rows}) >= 240
    assert len({row["text"] for row in rows}) >= 240
    first = min(rows, key=lambda row: row["date"])
    assert first["date"] == "1790-01-08T00:00:00Z"
    assert "Fellow" in first["text"][:200]
    assert first["url"].startswith("https://www.presidency.ucsb.edu/")
    assert first["token_count"] == len(tokenizer.encode(first["text"]))
    # Each file spans the centuries.
    for table in tables:
        dates = table.column("date").to_pylist()
        assert min(dates) < "1795"
        assert max(dates) > "2010"


def test_fewer_files_are_the_first_ones_and_a_damaged_one_is_replaced(
    sample_raw: Path, tmp_path: Path
) -> None:
    store, out = Store(tmp_path / "work"), tmp_path / "raw"
    manifest = download({"main": SourceParams(files=1)}, store, out, Machine())
    complete = RawManifest.load(sample_raw)
    assert manifest.files == complete.files[:1]
    assert manifest.sources == complete.sources
    path = out / manifest.files[0].path
    assert path.read_bytes() == (sample_raw / path.name).read_bytes()
    assert list((store.root / "tmp").iterdir()) == []
    # Damages the file in the store as well: it is the same inode.
    leftover = store.root / "tmp" / "source-sample" / "half.parquet"
    leftover.parent.mkdir()
    leftover.write_bytes(b"from a killed run")
    flip(path, 5000)
    os.utime(path, ns=(7, 7))
    assert download({"main": SourceParams(files=1)}, store, out, Machine()) == manifest
    assert atomic.sha256_file(path) == manifest.files[0].sha256
    assert list((store.root / "tmp").iterdir()) == []


def test_a_local_file_takes_a_cpu_and_one_on_a_server_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int | None, float]] = []

    def run_tasks(
        function: Any,
        tasks: Any,
        in_flight: int | None,
        name: str,
        num_cpus: float,
        *_: Any,
        **__: Any,
    ) -> Iterator[Any]:
        asked.append((in_flight, num_cpus))
        return iter(())

    monkeypatch.setattr(stage, "run_tasks", run_tasks)
    monkeypatch.setattr(stage, "cluster", lambda *_: contextlib.nullcontext(2))
    local, remote = (PathFile(f"{i}.jsonl", f"/{i}", 1, "", local=i == 0) for i in range(2))
    options, store = ReadOptions("text", "file", "utf-8"), Store(tmp_path)
    for items, machine in (
        ([local, local], Machine()),
        ([local, remote], Machine()),
        ([remote], Machine(parallel_downloads=100)),
        ([remote], Machine(parallel_downloads=10**6)),
    ):
        stage._fetch_items(items, options, store, machine)
    assert asked == [(None, 1.0), (4, 0.25), (100, 0.02), (10**6, 0.0001)]
