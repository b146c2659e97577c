"""Tests for pipeline.format.shards: the format on disk, and `TokenStream`."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import TokenStream
from pipeline.format import shards
from pipeline.format.manifest import NAME, SPLITS, Part
from pipeline.format.shards import ShardError, ShardWriter, docs_path, open_shard, read_docs
from pipeline.store import atomic
from tests.support.damage import FEW, damaged
from tests.support.training import shard_entry, shard_header, write_manifest, write_tokens
from train import DataOrder

TOKEN = st.integers(0, 50256)
DOCUMENT = st.lists(TOKEN, min_size=1, max_size=20)


def write_shard(path: Path, documents: list[list[int]], first_row: int = 0) -> np.ndarray:
    writer = ShardWriter(path)
    for row, document in enumerate(documents, start=first_row):
        writer.append(np.array(document, dtype=np.uint16), np.array([[0, row]]))
    writer.close()
    return np.array([token for document in documents for token in document], dtype=np.uint16)


@given(st.lists(DOCUMENT, min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_shard_has_llm_c_layout_and_is_read_back(documents: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train-00000.bin"
        tokens = write_shard(path, documents, first_row=5)
        data = path.read_bytes()
        # As llm.c reads it: 256 int32, then uint16, all little-endian.
        header = np.frombuffer(data[:1024], "<i4")
        assert header.tolist() == [20240520, 1, len(tokens)] + [0] * 253
        assert data[1024:] == tokens.astype("<u2").tobytes()
        assert len(data) == 1024 + 2 * len(tokens)
        assert np.array_equal(open_shard(path), tokens)
        docs = read_docs(path)
        starts = np.cumsum([0, *(len(d) for d in documents[:-1])])
        assert docs.tolist() == [[start, 5 + i] for i, start in enumerate(starts)]


def test_a_mapped_shard_is_read_only(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.bin", [[1, 2, 3]])
    with pytest.raises(ValueError, match="read-only"):
        open_shard(tmp_path / "x.bin")[0] = 5


def test_an_empty_shard_is_deleted(tmp_path: Path) -> None:
    ShardWriter(tmp_path / "train.bin").close()
    assert list(tmp_path.iterdir()) == []


SHARDS = st.lists(st.lists(TOKEN, min_size=1, max_size=40), max_size=5)


@given(
    splits=st.fixed_dictionaries({"train": SHARDS, "val": SHARDS}),
    spans=st.lists(st.tuples(st.integers(-50, 200), st.integers(-50, 200)), max_size=8),
    drop=st.sampled_from([0, 41, 2**28]),
)
@settings(max_examples=60, deadline=None)
def test_stream_slices_equal_the_concatenation(
    splits: dict[str, list[list[int]]], spans: list[tuple[int, int]], drop: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_tokens(Path(name), {k: [np.array(s) for s in v] for k, v in splits.items()})
        for split in SPLITS:
            expected = np.array([token for shard in splits[split] for token in shard], np.uint16)
            stream = TokenStream(name, split)
            # Between reads pages are released, and maps are dropped and made again.
            stream._MAX_RESIDENT_BYTES, stream._MAX_MAPS = drop, 1 + drop % 2
            stream._no_readahead = drop == 0
            assert len(stream) == len(expected)
            assert np.array_equal(stream[:], expected)
            for a, b in spans:
                got = stream[a:b]
                assert got.dtype == np.uint16
                assert np.array_equal(got, expected[a:b]), (a, b)
            length = min(7, len(stream))
            if length == 0:
                continue
            starts = np.array([a % (len(stream) - length + 1) for a, _ in spans], dtype=np.int64)
            for row, start in zip(stream.gather(starts, length), starts, strict=True):
                assert np.array_equal(row, expected[start : start + length])


def test_gathering_outside_the_stream_is_an_error(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [np.array([1, 2]), np.array([3])]})
    stream = TokenStream(tmp_path, "train")
    assert stream.gather(np.array([0, 1]), 2).tolist() == [[1, 2], [2, 3]]
    assert stream.gather(np.array([], dtype=np.int64), 2).shape == (0, 2)
    for start in (-1, 2):
        with pytest.raises(ValueError, match="3 tokens"):
            stream.gather(np.array([0, start]), 2)


def test_stream_has_integer_indexes_a_repr_and_only_known_splits(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [np.array([1, 2]), np.array([3])]})
    stream = TokenStream(tmp_path, "train")
    assert [stream[i] for i in (0, 2, -1, -3, np.int64(1))] == [1, 3, 3, 1, 2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            stream[index]
    with pytest.raises(IndexError):
        TokenStream(tmp_path, "val")[0]
    for part in (str(tmp_path), "train", "3 tokens", "2 shards"):
        assert part in repr(stream)
    with pytest.raises(ValueError, match=r"'test'.*train.*val"):
        TokenStream(tmp_path, "test")  # type: ignore[arg-type]


def test_a_step_is_an_error_and_so_is_a_shard_of_another_length(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [np.array([1, 2, 3])]})
    with pytest.raises(ValueError, match="step"):
        TokenStream(tmp_path, "train")[0:3:2]
    write_shard(tmp_path / "train-00000.bin", [[1, 2]])
    with pytest.raises(ShardError, match=r"train-00000\.bin.* 2 .* 3"):
        TokenStream(tmp_path, "train")


@pytest.mark.parametrize(
    ("size", "flipped"),
    [(size, None) for size in (0, 1, 11, 1022, 1023, 1024, 1025, 1029, 1032)]
    + [(1030, offset) for offset in (0, 4, 8, 11)],
)
def test_a_damaged_shard_is_named(tmp_path: Path, size: int, flipped: int | None) -> None:
    path = tmp_path / "train-00000.bin"
    write_shard(path, [[1, 2, 3]])  # 1030 bytes
    data = bytearray(path.read_bytes().ljust(size, b"\0")[:size])
    if flipped is not None:
        data[flipped] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-00000\.bin"):
        open_shard(path)


def index_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[0, 3], [5, 9]], dtype="<i8"))
    return buffer.getvalue()


@given(offset=st.integers(0, 127), value=st.integers(0, 255), cut=st.integers(0, 160))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_document_index_is_read_or_raises_shard_error(
    offset: int, value: int, cut: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train-00000.bin"
        for data in (
            index_bytes()[:offset] + bytes([value]) + index_bytes()[offset + 1 :],
            index_bytes()[:cut],
        ):
            docs_path(path).write_bytes(data)
            try:
                docs = read_docs(path)
            except ShardError as error:
                assert "train-00000.docs.npy" in str(error)  # noqa: PT017
            else:
                assert docs.ndim == 2
                assert docs.shape[1] == 2


@FEW
@given(data=st.data())
def test_any_bytes_are_a_shard_or_a_shard_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    write_shard(path, [[50256, 2, 3], [50256]])
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with contextlib.suppress(ShardError):
        assert len(open_shard(path)) == (path.stat().st_size - 1024) // 2
    index = docs_path(path)
    index.write_bytes(data.draw(damaged(index.read_bytes())))
    with contextlib.suppress(ShardError):
        assert read_docs(path).shape[1] == 2


def test_folder_link_loop_or_pipe_in_place_of_a_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for file, read in ((path, open_shard), (docs_path(path), read_docs)):
        for make in (Path.mkdir, lambda path: path.symlink_to(path)):
            make(file)
            with pytest.raises(ShardError, match=file.name):
                read(path)
            file.unlink() if file.is_symlink() else file.rmdir()
    os.mkfifo(path)  # it would block
    with pytest.raises(ShardError, match=path.name):
        open_shard(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for call in (open_shard, read_docs):
        with pytest.raises(ShardError, match=r"train-00000\."):
            call(tmp_path / "train-00000.bin")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc (Linux)")
@pytest.mark.parametrize(("memory", "random"), [(0, True), (2**40, False)])
def test_a_split_larger_than_memory_is_read_without_readahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, random: bool
) -> None:
    monkeypatch.setattr(shards, "_memory_bytes", lambda: memory)
    write_tokens(tmp_path, {"train": [np.array([1, 2, 3, 4])]})
    stream = TokenStream(tmp_path, "train")
    assert stream[:].tolist() == [1, 2, 3, 4]
    _, _, mapped = Path("/proc/self/smaps").read_text().partition(f"{tmp_path}/train-00000.bin")
    flags = mapped.partition("VmFlags:")[2].partition("\n")[0].split()
    assert ("rr" in flags) == random  # "random read advise provided" (man proc_pid_smaps)


def test_without_readahead_long_spans_are_prefetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_memory_bytes", lambda: 0)
    parts = [np.arange(n) % 50_000 for n in (900_000, 700_000)]
    write_tokens(tmp_path, {"train": parts})
    expected = np.concatenate(parts)
    advised: list[int] = []
    advise = shards._advise

    def record(tokens: np.ndarray, advice: int, *span: int) -> None:
        advised.append(advice)
        advise(tokens, advice, *span)

    monkeypatch.setattr(shards, "_advise", record)
    stream = TokenStream(tmp_path, "train")
    for start, stop in ((0, len(expected)), (13, len(expected) - 7), (899_990, 900_010)):
        advised.clear()
        assert np.array_equal(stream[start:stop], expected[start:stop])
        assert (mmap.MADV_WILLNEED in advised) == (stop - start > 2**19)


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc (Linux)")
def test_a_trillion_tokens_in_50_000_shards(tmp_path: Path) -> None:
    """Sparse files of full size, in which only the first two tokens are written."""
    n_shards, n_tokens = 50_000, 20_000_000
    for i in range(n_shards):
        with open(tmp_path / f"train-{i:05d}.bin", "wb") as file:
            first = np.array([i % 50_000, i // 50_000 + 7], "<u2")
            file.write(shard_header(n_tokens) + first.tobytes())
            file.truncate(1024 + 2 * n_tokens)
    part = Part(
        chunk_key="c" * 64,
        path="sample/10BT/000_00000.parquet",
        rows=(0, 28_800),
        tokens=n_tokens,
        docs=28_800,
    )
    filled = {"parts": [part], "docs_sha256": "d" * 64}
    shards = [shard_entry(f"train-{i:05d}.bin", n_tokens, sha256="d" * 64) for i in range(n_shards)]
    write_manifest(tmp_path, [shard.model_copy(update=filled) for shard in shards])
    manifest = json.loads((tmp_path / NAME).read_text())
    chunk = {"name": "chunks/00000.json", "chunk_key": "c" * 64, "sha256": "d" * 64}
    atomic.write_json(tmp_path / NAME, {**manifest, "chunks": [chunk] * n_shards})
    began, before = time.perf_counter(), len(list(Path("/proc/self/fd").iterdir()))
    stream = TokenStream(tmp_path, "train")
    opened = time.perf_counter() - began
    assert len(stream) == 10**12
    order, block = DataOrder(n_tokens=len(stream), block_size=1024, seed=3), 1024
    windows = order.samples(order.n_windows - 10_000, 20_000)
    began = time.perf_counter()
    for i in range(0, len(windows), 16):
        stream.gather(windows[i : i + 16] * block, block + 1)
    rate = len(windows) * block / (time.perf_counter() - began)
    files = len(list(Path("/proc/self/fd").iterdir())) - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = (tmp_path / NAME).stat().st_size / 1e6
    print(
        f"manifest {size:.0f} MB, opened in {opened:.1f} s; {rate / 1e6:.1f}M tokens/s by one "
        f"process, {files} files open, {peak:.2f} GB peak memory"
    )
    for i in (0, 1, 49_998, 49_999):  # the right tokens, also across a shard boundary
        start = i * n_tokens
        assert stream[start : start + 2].tolist() == [i % 50_000, i // 50_000 + 7]
        (row,) = stream.gather(np.array([max(0, start - 1)]), 3)
        assert row.tolist()[-2 if i else 0 :][:2] == [i % 50_000, i // 50_000 + 7]
    assert files <= 520
    assert rate > 1e6  # tokens per second; a GPU consumes 0.2M
