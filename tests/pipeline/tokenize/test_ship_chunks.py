"""Of pipeline.ship: text that is sent, pieces that come, and how many bytes are on their way."""

from __future__ import annotations

import tempfile
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
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store
from pipeline.tokenize.ship_chunks import BLOCK_BYTES, budget, pack, receive, unpack
from pipeline.tokenize.stage import tokenize
from tests.support.small_data import CODE, hashes, tokenize_here

PARAMS = TokenizeParams(shard_tokens=2000, val_per_10k=1500)
MEGABYTE = 2**20


def test_shipped_and_shared_chunks_are_the_same_bytes(
    tmp_path: Path, small_raw: Path, one_ray: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.tokenize.ship_chunks.BLOCK_BYTES", 70_000
    )  # of which a chunk takes some
    machine = Machine(workers=1, work_dir=tmp_path / "ship", data="ship")
    tokenize(small_raw, tmp_path / "shipped", PARAMS, machine, CODE)
    here = Machine(work_dir=tmp_path / "here")
    tokenize_here(small_raw, tmp_path / "local", PARAMS, here)
    assert len(hashes(tmp_path / "local")) > 15
    assert hashes(tmp_path / "shipped") == hashes(tmp_path / "local")
    assert list((Path(tempfile.gettempdir()) / "gpt2-shipped/tmp").iterdir()) == []


texts = st.lists(st.none() | st.text(max_size=60) | st.just("long " * 3000), max_size=30)


@given(st.lists(texts, max_size=5), st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_what_is_unpacked_is_what_was_packed(runs: list[list[str | None]], size: int) -> None:
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
    resources = {"CPU": float(cpus), "object_store_memory": float(store)}
    if not cpus:
        del resources["CPU"]
    return {"NodeID": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "block", "in_flight"),
    [
        ([node("home", 0, 2048 * MEGABYTE), node("a", 8, 2048 * MEGABYTE)], BLOCK_BYTES, 64),
        ([node("home", 2, 80 * MEGABYTE)], BLOCK_BYTES, 2),  # a local Ray
        # A node of many CPUs and a small store makes the blocks short.
        ([node("home", 0, 1024 * MEGABYTE), node("a", 64, 640 * MEGABYTE)], MEGABYTE, 128),
        ([node("home", 0, 64 * MEGABYTE), node("a", 64, 1, alive=False)], BLOCK_BYTES, 2),
        ([node("home", 0, 1), node("a", 10**6, 1)], 2**16, 1),
    ],
)
def test_what_is_on_its_way_fills_no_store_more_than_half(
    nodes: list[dict[str, Any]], block: int, in_flight: int
) -> None:
    assert budget(nodes, "home") == (block, in_flight)


def stored(root: Path, small_raw: Path) -> tuple[str, dict[str, np.ndarray]]:
    """A piece that a store holds: its key, and its files."""
    manifest = tokenize_here(small_raw, root / "out", PARAMS, Machine(work_dir=root / "work"))
    key = manifest.shards[0].parts[0].chunk_key
    folder = root / "work" / "chunks" / key
    files = {p.name: np.fromfile(p, np.uint8) for p in folder.iterdir() if p.name != "piece.json"}
    return key, files


def blocks_of(files: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for name, data in files.items():
        for start in range(0, len(data), 1000):
            yield name, data[start : start + 1000]


def test_a_piece_that_comes_damaged_or_cut_is_not_taken(tmp_path: Path, small_raw: Path) -> None:
    key, files = stored(tmp_path, small_raw)
    store = Store(tmp_path / "mine")
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
    assert receive(iter(()), key, store)["chunk_key"] == key, "it stands there"
