"""Of pipeline.shards: the format on disk, and the stream across shards."""

from __future__ import annotations

import io
import json
import mmap
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
from pipeline.format.manifest import NAME, SPLITS
from pipeline.format.shards import ShardError, ShardWriter, docs_path, open_shard, read_docs
from pipeline.store import atomic
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
def test_round_trip_and_layout(documents: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train-00000.bin"
        tokens = write_shard(path, documents, first_row=5)
        data = path.read_bytes()
        # As llm.c reads it: 256 int32, then uint16, little-endian.
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


def test_an_empty_shard_is_not_left(tmp_path: Path) -> None:
    ShardWriter(tmp_path / "train.bin").close()
    assert list(tmp_path.iterdir()) == []


def write_folder(folder: Path, shards: list[tuple[str, list[list[int]]]]) -> dict[str, np.ndarray]:
    """Shards (split, documents) with a manifest; the concatenation of each split's tokens."""
    listed = []
    whole: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for i, (split, documents) in enumerate(shards):
        name = f"{split}-{i:05d}.bin"
        tokens = write_shard(folder / name, documents)
        whole[split].append(tokens)
        listed.append(
            {
                "name": name, "split": split, "tokens": len(tokens), "docs": len(documents),
                "text_bytes": 0, "sha256": "", "docs_sha256": "", "parts": [],
            }
        )  # fmt: skip
    source = {"source": {"kind": "x", "repo": "x", "revision": "x"}, "files": []}
    tokenizer = {"name": "gpt2", "ranks_sha256": "", "n_vocab": 50257, "eot": 50256}
    value = {
        "dataset_key": "k", "format": "llm.c", "dtype": "uint16", "tokenizer": tokenizer,
        "params": {}, "source": source, "shards": listed, "totals": {}, "skipped": {},
    }  # fmt: skip
    atomic.write_json(folder / NAME, value)
    empty = np.zeros(0, dtype=np.uint16)
    return {split: np.concatenate([empty, *parts]) for split, parts in whole.items()}


SHARD = st.tuples(
    st.sampled_from(["train", "train", "val"]), st.lists(DOCUMENT, min_size=1, max_size=4)
)


@given(
    shards=st.lists(SHARD, max_size=6),
    spans=st.lists(st.tuples(st.integers(-50, 200), st.integers(-50, 200)), max_size=8),
    drop=st.sampled_from([0, 41, 2**28]),
)
@settings(max_examples=60, deadline=None)
def test_stream_slices_equal_the_concatenation(
    shards: list[tuple[str, list[list[int]]]], spans: list[tuple[int, int]], drop: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = write_folder(Path(name), shards)
        for split in SPLITS:
            stream = TokenStream(name, split)
            # What is mapped in is given back, and maps are dropped and made again, between reads.
            stream._RESIDENT_BYTES, stream._MAPS = drop, 1 + drop % 2
            stream._scattered = drop == 0
            assert len(stream) == len(whole[split])
            assert np.array_equal(stream[:], whole[split])
            for a, b in spans:
                got = stream[a:b]
                assert got.dtype == np.uint16
                assert np.array_equal(got, whole[split][a:b]), (a, b)
            length = min(7, len(stream))
            if length == 0:
                continue
            starts = np.array([a % (len(stream) - length + 1) for a, _ in spans], dtype=np.int64)
            for row, start in zip(stream.gather(starts, length), starts, strict=True):
                assert np.array_equal(row, whole[split][start : start + length])


def test_every_slice_of_a_small_stream(tmp_path: Path) -> None:
    whole = write_folder(tmp_path, [("train", [[1, 2]]), ("train", [[3]]), ("train", [[4, 5, 6]])])
    stream = TokenStream(tmp_path, "train")
    for a in range(-7, 8):
        for b in range(-7, 8):
            assert np.array_equal(stream[a:b], whole["train"][a:b]), (a, b)


def test_gathering_outside_of_the_stream_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, [("train", [[1, 2]]), ("train", [[3]])])
    stream = TokenStream(tmp_path, "train")
    assert stream.gather(np.array([0, 1]), 2).tolist() == [[1, 2], [2, 3]]
    assert stream.gather(np.array([], dtype=np.int64), 2).shape == (0, 2)
    for start in (-1, 2):
        with pytest.raises(ValueError, match="outside of the stream's 3 tokens"):
            stream.gather(np.array([0, start]), 2)


def test_stream_refuses_a_step_and_a_shard_of_another_length(tmp_path: Path) -> None:
    write_folder(tmp_path, [("train", [[1, 2, 3]])])
    with pytest.raises(ValueError, match="step 1"):
        TokenStream(tmp_path, "train")[0:3:2]
    write_shard(tmp_path / "train-00000.bin", [[1, 2]])
    with pytest.raises(ShardError, match=r"train-00000.bin: 2 tokens, the manifest says 3"):
        TokenStream(tmp_path, "train")


@pytest.mark.parametrize("size", [0, 1, 11, 1022, 1023, 1024, 1025, 1029, 1032])
def test_a_cut_or_grown_shard_is_refused_by_name(tmp_path: Path, size: int) -> None:
    path = tmp_path / "train-00000.bin"
    write_shard(path, [[1, 2, 3]])  # 1030 bytes
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(ShardError, match=r"train-00000\.bin"):
        open_shard(path)


@pytest.mark.parametrize("offset", [0, 4, 8, 11])
def test_a_flipped_header_is_refused(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "train-00000.bin"
    write_shard(path, [[1, 2, 3]])
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"train-00000\.bin"):
        open_shard(path)


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[0, 3], [5, 9]], dtype="<i8"))
    return buffer.getvalue()


@given(offset=st.integers(0, 127), value=st.integers(0, 255), cut=st.integers(0, 160))
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_sidecar_is_read_or_refused_and_never_a_crash(
    offset: int, value: int, cut: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train-00000.bin"
        for data in (npy()[:offset] + bytes([value]) + npy()[offset + 1 :], npy()[:cut]):
            docs_path(path).write_bytes(data)
            try:
                docs = read_docs(path)
            except ShardError as error:
                assert "train-00000.docs.npy" in str(error)  # noqa: PT017
            else:
                assert docs.ndim == 2
                assert docs.shape[1] == 2


def test_missing_files_are_named(tmp_path: Path) -> None:
    for call in (open_shard, read_docs):
        with pytest.raises(ShardError, match="no such file"):
            call(tmp_path / "train-00000.bin")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc (Linux)")
@pytest.mark.parametrize(("memory", "random"), [(0, True), (2**40, False)])
def test_a_split_that_memory_cannot_hold_is_read_without_its_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, random: bool
) -> None:
    monkeypatch.setattr(shards, "_memory", lambda: memory)
    whole = write_folder(tmp_path, [("train", [[1, 2, 3, 4]])])
    stream = TokenStream(tmp_path, "train")
    assert np.array_equal(stream[:], whole["train"])
    _, _, mapped = Path("/proc/self/smaps").read_text().partition(f"{tmp_path}/train-00000.bin")
    flags = mapped.partition("VmFlags:")[2].partition("\n")[0].split()
    assert ("rr" in flags) == random  # "random read advise provided" (man proc_pid_smaps)


def test_long_spans_of_such_a_split_are_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_memory", lambda: 0)
    two = [[[i % 50_000 for i in range(n)]] for n in (900_000, 700_000)]
    whole = write_folder(tmp_path, [("train", docs) for docs in two])["train"]
    asked: list[int] = []
    advise = shards._advise

    def noted(tokens: np.ndarray, advice: int, *where: int) -> None:
        asked.append(advice)
        advise(tokens, advice, *where)

    monkeypatch.setattr(shards, "_advise", noted)
    stream = TokenStream(tmp_path, "train")
    for start, stop in ((0, len(whole)), (13, len(whole) - 7), (899_990, 900_010)):
        asked.clear()
        assert np.array_equal(stream[start:stop], whole[start:stop])
        assert (mmap.MADV_WILLNEED in asked) == (stop - start > 2**19)


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc (Linux)")
def test_a_trillion_tokens_in_50_000_shards(tmp_path: Path) -> None:
    """Sparse files: their sizes are real, their bytes are holes but the first two tokens."""
    n_shards, n_tokens = 50_000, 20_000_000
    write_shard(tmp_path / "model.bin", [[0]])
    header = np.frombuffer((tmp_path / "model.bin").read_bytes()[:1024], "<i4").copy()
    header[2] = n_tokens
    for i in range(n_shards):
        with open(tmp_path / f"train-{i:05d}.bin", "wb") as file:
            file.write(header.tobytes() + np.array([i % 50_000, i // 50_000 + 7], "<u2").tobytes())
            file.truncate(1024 + 2 * n_tokens)
    part = {"chunk_key": "c" * 64, "path": "sample/10BT/000_00000.parquet", "rows": [0, 28_800]}
    shards = [
        {
            "name": f"train-{i:05d}.bin", "split": "train", "tokens": n_tokens, "docs": 28_800,
            "text_bytes": 90_000_000, "sha256": f"{i:064x}", "docs_sha256": f"{i:064x}",
            "parts": [{**part, "tokens": n_tokens, "docs": 28_800}],
        }
        for i in range(n_shards)
    ]  # fmt: skip
    write_folder(tmp_path, [])
    manifest = json.loads((tmp_path / NAME).read_text())
    chunks = [
        {"name": f"chunks/{i:05d}.json", "chunk_key": "c" * 64, "sha256": "d" * 64}
        for i in range(n_shards)
    ]
    atomic.write_json(tmp_path / NAME, {**manifest, "shards": shards, "chunks": chunks})
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
        f"process, {files} files open, {peak:.2f} GB at the peak"
    )
    for i in (0, 1, 49_998, 49_999):  # the right bytes, also across a border
        start = i * n_tokens
        assert stream[start : start + 2].tolist() == [i % 50_000, i // 50_000 + 7]
        (row,) = stream.gather(np.array([max(0, start - 1)]), 3)
        assert row.tolist()[-2 if i else 0 :][:2] == [i % 50_000, i // 50_000 + 7]
    assert files <= 520
    assert rate > 1e6  # a GPU takes 0.2M
