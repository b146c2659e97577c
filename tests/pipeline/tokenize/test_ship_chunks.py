"""Tests for pipeline.tokenize.ship_chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cluster.tasks import TaskError
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine, private_folder
from pipeline.store.store import Store
from pipeline.tokenize.ship_chunks import BLOCK_BYTES, block_limits, pack, receive, unpack
from pipeline.tokenize.stage import tokenize
from tests.support.small_data import CODE, hashes, tokenize_here

PARAMS = TokenizeParams(shard_tokens=2000, val_per_10k=1500)
MEGABYTE = 2**20


def test_shipped_and_shared_chunks_have_the_same_bytes(
    tmp_path: Path, small_raw: Path, one_ray: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BLOCK_BYTES", "_MIN_BLOCK_BYTES"):  # several blocks per chunk
        monkeypatch.setattr(f"pipeline.tokenize.ship_chunks.{name}", 3000)
    machine = Machine(workers=1, work_dir=tmp_path / "ship", data="ship")
    tokenize(small_raw, tmp_path / "shipped", PARAMS, machine, CODE)
    tokenize_here(small_raw, tmp_path / "local", PARAMS, Machine(work_dir=tmp_path / "here"))
    assert len(hashes(tmp_path / "local")) > 15
    assert hashes(tmp_path / "shipped") == hashes(tmp_path / "local")
    assert list((private_folder() / "shipped/tmp").iterdir()) == []


texts = st.lists(st.none() | st.text(max_size=60) | st.just("long " * 3000), max_size=30)


@given(st.lists(texts, max_size=5), st.integers(1, 5000))
@settings(max_examples=50)
def test_unpack_inverts_pack(runs: list[list[str | None]], size: int) -> None:
    batches, row = [], 7
    for run in runs:
        batches.append((row, pa.array(run, pa.string())))
        row += len(run)
    blocks = list(pack(iter(batches), size))
    assert all(0 < len(block) <= size for block in blocks)
    assert all(len(block) == size for block in blocks[:-1])
    found = list(unpack(iter(blocks), 7))
    assert [(first, texts.to_pylist()) for first, texts in found] == [
        (first, texts.to_pylist()) for first, texts in batches
    ]


def node(name: str, cpus: int, store: int, alive: bool = True) -> dict[str, Any]:
    resources = {"object_store_memory": float(store)} | ({"CPU": float(cpus)} if cpus else {})
    return {"NodeID": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "block", "in_flight"),
    [
        ([node("home", 0, 2048 * MEGABYTE), node("a", 8, 2048 * MEGABYTE)], BLOCK_BYTES, 64),
        ([node("home", 2, 80 * MEGABYTE)], BLOCK_BYTES, 2),  # a local Ray
        # A node with many CPUs and a small store shortens the blocks.
        ([node("home", 0, 1024 * MEGABYTE), node("a", 64, 640 * MEGABYTE)], MEGABYTE, 128),
        ([node("home", 0, 64 * MEGABYTE), node("a", 64, 1, alive=False)], BLOCK_BYTES, 2),
        ([node("home", 0, 1), node("a", 10**6, 1)], 2**16, 1),
    ],
)
def test_blocks_in_flight_take_at_most_half_of_any_store(
    nodes: list[dict[str, Any]], block: int, in_flight: int
) -> None:
    assert block_limits(nodes, "home") == (block, in_flight)


def blocks_of(files: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for name, data in files.items():
        for start in range(0, len(data), 1000):
            yield name, data[start : start + 1000]


def test_damaged_or_incomplete_piece_is_refused(tmp_path: Path, small_raw: Path) -> None:
    work = tmp_path / "work"
    manifest = tokenize_here(small_raw, tmp_path / "out", PARAMS, Machine(work_dir=work))
    key, store = manifest.shards[0].parts[0].chunk_key, Store(tmp_path / "mine")
    paths = [path for path in (work / "chunks" / key).iterdir() if path.name != "piece.json"]
    files = {path.name: np.fromfile(path, np.uint8) for path in paths}
    flipped = files["train.bin"].copy()
    flipped[2000] ^= 1
    for bad in (
        {**files, "train.bin": flipped},
        {**files, "train.bin": files["train.bin"][:-1000]},
        {name: data for name, data in files.items() if name != "train.docs.npy"},
        {**files, "more": flipped},
        {name: data for name, data in files.items() if name != "record.json"},
    ):
        with pytest.raises(TaskError):
            receive(blocks_of(bad), key, store)
        assert store.find("chunks", key) is None
    with pytest.raises(TaskError):
        receive(blocks_of(files), "0" * 64, store)
    assert receive(blocks_of(files), key, store)["chunk_key"] == key
    assert hashes(tmp_path / "mine/chunks" / key).keys() == {*files, "piece.json"}
    assert receive(iter(()), key, store)["chunk_key"] == key, "it is in the store already"
