"""Tests for pipeline.tokenize.encode_chunk, encode_batch and chunk_record."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.format import tokenizer
from pipeline.format.manifest import SourceFile
from pipeline.format.parquet import read_batches
from pipeline.format.shards import open_shard, read_docs
from pipeline.params import TokenizeParams
from pipeline.store.store import Store
from pipeline.tokenize import engines, unicode_guard
from pipeline.tokenize.chunk_plan import Chunk
from pipeline.tokenize.chunk_record import (
    content_sum,
    length_bins,
    read_engine_report,
    read_record,
)
from pipeline.tokenize.encode_batch import EngineMismatch
from pipeline.tokenize.encode_chunk import chunk_key, encode_chunk, split_of, write_piece
from tests.support.repo import REPO
from tests.support.small_data import (
    encode_document,
    hashes,
    needs_gigatoken,
    some_texts,
    write_parquet,
)


@pytest.mark.parametrize(
    ("text", "bucket"),  # xxh3_64 mod 10,000; a change would move documents between splits
    # The first is XXH3's published vector, 0x2D06800538D394C2.
    [("", 0x2D06800538D394C2 % 10_000), ("Hello world", 1076), ("é", 1795), ("x" * 1000, 2194)],
)
def test_split_of_known_texts_never_changes(text: str, bucket: int) -> None:
    assert split_of(text.encode(), bucket) == "train"
    assert split_of(text.encode(), bucket + 1) == "val"
    assert split_of(text.encode(), 0) == "train"
    assert split_of(text.encode(), 10_000) == "val"


def test_split_has_the_requested_size() -> None:
    count = sum(split_of(str(i).encode(), 500) == "val" for i in range(20_000))
    assert 900 < count < 1100


def content(file_index: int, row: int, document: np.ndarray) -> int:
    return content_sum(file_index, [row], document, [0, len(document)])


def test_content_sum_goldens() -> None:
    tokens = np.array([50256, 15496, 995], dtype=np.uint16)
    assert f"{content(0, 0, tokens):032x}" == "b293035de6ded5c10dac580d5c3460b4"
    others = {
        content(0, 0, tokens), content(1, 0, tokens), content(0, 1, tokens),
        content(0, 0, tokens[:2]), content(0, 0, tokens[::-1].copy()),
    }  # fmt: skip
    assert len(others) == 5
    both = content_sum(3, [5, 9], np.append(tokens, tokens[:2]), [0, 3, 5])
    assert both == content(3, 5, tokens) + content(3, 9, tokens[:2])


@given(st.lists(st.integers(1, 2**31 - 1)))
def test_length_bins(lengths: list[int]) -> None:
    expected = np.zeros(32, int)
    for length in lengths:
        expected[length.bit_length() - 1] += 1
    assert length_bins(np.array(lengths, np.int64)).tolist() == expected.tolist()


def chunk_of(file: SourceFile, start: int, stop: int, file_index: int = 0) -> Chunk:
    return Chunk(file_index, file, start, stop, 100)


def test_chunk_key_covers_all_that_decides_the_bytes(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", some_texts(9))
    other = file.model_copy(update={"sha256": "0" * 64})
    renamed = file.model_copy(update={"path": "b.parquet"})
    of_other_source = file.model_copy(update={"source": "b"})  # the record names it
    params, chunk = TokenizeParams(), chunk_of(file, 0, 5)
    others = [chunk_of(other, 0, 5), chunk_of(of_other_source, 0, 5), chunk_of(file, 0, 5, 1)]
    others += [chunk_of(file, 1, 5), chunk_of(file, 0, 6)]
    keys = [
        *(chunk_key(one, "text", params, "code") for one in (chunk, *others)),
        chunk_key(chunk, "url", params, "code"),
        chunk_key(chunk, "text", params.model_copy(update={"val_per_10k": 21}), "code"),
        chunk_key(chunk, "text", params, "other code"),
    ]
    assert len(set(keys)) == len(keys)
    # But not the path, to which a second source adds a folder.
    assert chunk_key(chunk_of(renamed, 0, 5), "text", params, "code") == keys[0]
    # Nor shard_tokens, which only cuts: chunks of equal rows are shared.
    recut = params.model_copy(update={"shard_tokens": 5000})
    assert chunk_key(chunk, "text", recut, "code") == keys[0]


def test_piece_and_record_of_a_chunk(tmp_path: Path) -> None:
    texts: list[str | None] = ["first", None, "", "second é", "third <|endoftext|>", "", "beyond"]
    file = write_parquet(tmp_path / "a.parquet", texts, group=2)
    store = Store(tmp_path / "work")
    params = TokenizeParams(val_per_10k=0)
    record = encode_chunk(chunk_of(file, 1, 6), "key", tmp_path, "text", params, store)
    folder = store.find("chunks", "key")
    assert folder is not None
    names = {"engine.json", "piece.json", "record.json", "train.bin", "train.docs.npy"}
    assert hashes(folder).keys() == names
    tokens, docs = open_shard(folder / "train.bin"), read_docs(folder / "train.bin")
    assert docs[:, 1].tolist() == [3, 4]
    expected = [encode_document("second é"), encode_document("third <|endoftext|>")]
    assert np.array_equal(tokens, np.concatenate(expected))
    assert np.flatnonzero(tokens == tokenizer.EOT).tolist() == docs[:, 0].tolist()
    assert docs[:, 0].tolist() == [0, len(expected[0])]
    assert record == read_record(folder)
    assert record["skipped"] == {"null": 1, "empty": 2}
    assert record["rows"] == [1, 6]
    assert record["source"]["sha256"] == file.sha256
    facts = record["splits"]["train"]
    assert (facts["tokens"], facts["docs"]) == (len(tokens), 2)
    assert facts["text_bytes"] == len("second é".encode()) + len("third <|endoftext|>")
    total = content(0, 3, expected[0]) + content(0, 4, expected[1])
    assert facts["content"] == f"{total % 2**128:032x}"
    powers = Counter(1 << (len(document).bit_length() - 1) for document in expected)
    assert facts["lengths"] == {str(power): count for power, count in powers.items()}
    assert facts["sha256"] == hashes(folder)["train.bin"]
    assert facts["docs_sha256"] == hashes(folder)["train.docs.npy"]


HOSTILE: list[bytes | None] = [
    b"the first", b"", None, b" " * 1000, b"\x00", b"a\x00b\x00", b"<|endoftext|>",
    b"<|endoftext|>" * 3 + b" <|endoftext|>", b"\xff", b"cut \xe2\x82", b"\x80 begins",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", "é".encode(),
    "\ufeff\ufffe\uffff".encode(), "\U00033000 is unassigned".encode(), "\U0010ffff".encode(),
    b"\r\n\t\n\n  \x0b\x0c\x1c", "\u0085\u2028\u00a0\u3000".encode(), "😀".encode() * 1_000_000,
    b"a" * 50_000_000, b" " * 2_000_000 + b"x", b"\n" * 600_000 + b"x", b"x" * 600_000,
    b"word " * 200_000, b"the last",
]  # fmt: skip
REASONS = {"empty": 1, "null": 1, "not UTF-8": 6, "unbroken": 1, "panic": 1}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[int]]]:
    """Hostile documents in a column of bytes, and tiktoken's tokens of each row that has any."""
    path = tmp_path_factory.mktemp("hostile") / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(HOSTILE, pa.binary())}), path, row_group_size=6)
    tokens = {}
    for row, text in enumerate(HOSTILE):
        # tiktoken takes a minute and 2.5 GB for 50 MB of one letter, and panics on the spaces.
        if text and len(text) < 50_000_000 and row != HOSTILE.index(b" " * 2_000_000 + b"x"):
            with contextlib.suppress(UnicodeDecodeError):
                tokens[row] = [tokenizer.EOT, *tokenizer.encode(text.decode())]
    return path, tokens


@pytest.mark.parametrize("kind", ["bytes", "large strings"])
@pytest.mark.parametrize("engine", ["gigatoken", "tiktoken"])
def test_hostile_documents_get_the_reference_tokens_or_are_skipped(
    tmp_path: Path, hostile: tuple[Path, dict[int, list[int]]], engine: engines.Name, kind: str
) -> None:
    path, expected = hostile
    batches = read_batches(path, "text", 0, len(HOSTILE))
    if kind == "large strings":  # invalid UTF-8 in a string column: Arrow does not check
        batches = (
            (row, pa.Array.from_buffers(pa.large_string(), len(b), b.buffers(), offset=b.offset))
            for row, b in ((row, b.cast(pa.large_binary())) for row, b in batches)
        )
    chunk = chunk_of(
        SourceFile(source="main", path="a", bytes=1, rows=1, sha256=""), 0, len(HOSTILE)
    )
    write_piece(batches, chunk, "key", TokenizeParams(val_per_10k=0), tmp_path, engine)
    assert read_record(tmp_path)["skipped"] == REASONS
    tokens, docs = open_shard(tmp_path / "train.bin"), read_docs(tmp_path / "train.bin")
    assert docs[:, 1].tolist() == list(expected)
    ends = [*docs[1:, 0].tolist(), len(tokens)]
    for (start, row), end in zip(docs.tolist(), ends, strict=True):
        assert tokens[start:end].tolist() == expected[row], row
    made = read_engine_report(tmp_path)
    assert sum(made["documents"].values()) == len(expected)
    if engine == "gigatoken" and engines.fast() is not None:
        assert made["documents"]["tiktoken"] == 5


def piece(
    path: Path, rows: int, out: Path, engine: engines.Name, **options: object
) -> dict[str, str]:
    """Write a piece to ``out``; return its hashes, without engine.json."""
    out.mkdir()
    chunk = chunk_of(SourceFile(source="main", path="a", bytes=1, rows=rows, sha256=""), 0, rows)
    size = options.pop("batch_bytes", 1 << 22)
    batches = read_batches(path, "text", 0, rows, size)  # type: ignore[arg-type]
    write_piece(batches, chunk, "key", TokenizeParams(val_per_10k=2000), out, engine, **options)  # type: ignore[arg-type]
    return {name: sha256 for name, sha256 in hashes(out).items() if name != "engine.json"}


def mixed_texts() -> list[str | None]:
    """Texts for the fast engine, and some in between that need the reference."""
    texts = some_texts(40)
    for row in (0, 7, 8, 30):
        texts[row] = f"{texts[row]} \U00033000"
    return [*texts[:20], None, "", *texts[20:]]


@needs_gigatoken
def test_engines_and_batch_sizes_give_the_same_piece(tmp_path: Path) -> None:
    texts = mixed_texts()
    write_parquet(tmp_path / "a.parquet", texts)
    pieces = []
    for engine in ("gigatoken", "tiktoken"):
        for size in (1, 700, 5000, 1 << 22):
            out = tmp_path / f"{engine}-{size}"
            pieces.append(piece(tmp_path / "a.parquet", len(texts), out, engine, batch_bytes=size))
            made = read_engine_report(out)
            assert made["documents"].get("tiktoken") == (4 if engine == "gigatoken" else 40)
            assert sum(made["bytes"].values()) == sum(len((t or "").encode()) for t in texts)
    assert all(one == pieces[0] for one in pieces)
    assert len(pieces[0]) == 5


REAL_TEXT = REPO.parent / "shared" / "data"


@pytest.mark.soak
@needs_gigatoken
def test_engines_agree_on_all_real_text(tmp_path: Path, sample_raw: Path) -> None:
    """The sample, and the texts in shared/data beside the project."""
    encoded: Counter[str] = Counter()
    paths = [*sorted(sample_raw.rglob("*.parquet")), *sorted(REAL_TEXT.rglob("*.parquet"))]
    for nth, path in enumerate(paths):
        rows = pq.read_metadata(path).num_rows
        fast, slow = tmp_path / f"{nth}-fast", tmp_path / f"{nth}-slow"
        by_fast = piece(path, rows, fast, "gigatoken", check_fraction=0.0)
        assert by_fast == piece(path, rows, slow, "tiktoken"), path
        assert not read_engine_report(slow)["bytes"]["gigatoken"]
        encoded.update(read_engine_report(fast)["bytes"])
    assert encoded["tiktoken"] < 0.01 * encoded.total()
    share = encoded["tiktoken"] / encoded.total()
    print(f"{len(paths)} files, {encoded.total() / 1e6:.1f} MB, {share:.3%} by tiktoken")


@needs_gigatoken
@pytest.mark.parametrize(("fraction", "checked"), [(0.0, 0), (1e-9, 1), (1.0, 36)])
def test_number_of_checked_documents(tmp_path: Path, fraction: float, checked: int) -> None:
    texts = mixed_texts()
    write_parquet(tmp_path / "a.parquet", texts)
    piece(
        tmp_path / "a.parquet", len(texts), tmp_path / "out", "gigatoken", check_fraction=fraction
    )
    assert read_engine_report(tmp_path / "out")["checked"] == checked


@pytest.fixture
def permissive_guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A guard that passes U+A7CE, a letter of Unicode 17 that gigatoken cuts differently."""
    monkeypatch.setattr(unicode_guard, "PROVEN", ((0, 0xFFFF),))
    unicode_guard._tables.cache_clear()
    yield
    unicode_guard._tables.cache_clear()


@needs_gigatoken
@pytest.mark.usefixtures("permissive_guard")
def test_mismatch_makes_tiktoken_encode_the_chunk(tmp_path: Path) -> None:
    texts = some_texts(20)
    texts[13] = "\ua7ce's"
    file = write_parquet(tmp_path / "a.parquet", texts)
    store, chunk = Store(tmp_path / "work"), chunk_of(file, 3, 18)
    (tmp_path / "out").mkdir()
    batches = read_batches(tmp_path / "a.parquet", "text", 3, 18)
    with pytest.raises(EngineMismatch) as caught:
        write_piece(batches, chunk, "key", TokenizeParams(), tmp_path / "out", "gigatoken", 1.0)
    assert caught.value.row == 13
    record = encode_chunk(chunk, "key", tmp_path, "text", TokenizeParams(), store, "gigatoken", 1.0)
    folder = store.find("chunks", "key")
    assert folder is not None
    made = read_engine_report(folder)
    assert made["differences"] == [13]
    assert made["documents"] == {"gigatoken": 0, "tiktoken": 15}
    encode_chunk(chunk, "other", tmp_path, "text", TokenizeParams(), store, "tiktoken")
    assert {**record, "chunk_key": "other"} == read_record(store.root / "chunks" / "other")


def test_tiktoken_is_used_without_gigatoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = mixed_texts()
    write_parquet(tmp_path / "a.parquet", texts)
    with_it = piece(tmp_path / "a.parquet", len(texts), tmp_path / "with", "gigatoken")
    monkeypatch.setattr(engines, "VERSION", "another")
    engines.fast.cache_clear()
    try:
        without = piece(tmp_path / "a.parquet", len(texts), tmp_path / "without", "gigatoken")
    finally:
        engines.fast.cache_clear()
    assert without == with_it
    assert read_engine_report(tmp_path / "without")["documents"]["gigatoken"] == 0


def ten_megabytes_each(generator: np.random.Generator) -> Iterator[bytes]:
    words = [b"The", b" law", b" of", b" the", b" land", b",", b" 1789", b".\n"]
    for i in range(60):
        picks = generator.integers(0, len(words), 2_700_000)
        yield b"%d " % i + b"".join(words[pick] for pick in picks)


def a_million_rows(generator: np.random.Generator) -> Iterator[bytes]:
    """All in one row group, 70 consecutive large ones among them."""
    large = list(ten_megabytes_each(generator))[:7]
    for i in range(1_000_000):
        yield large[i % 7] if 500_000 <= i < 500_070 else b"row %d of a million, and no more" % i


def no_word_twice(generator: np.random.Generator) -> Iterator[bytes]:
    for _ in range(6000):
        text = generator.integers(97, 123, 10_000).astype(np.uint8)
        text[::8] = 32
        yield text.tobytes()


# Not getrusage: its ru_maxrss includes the process before exec, and so pytest's own peak.
MEASURE = """
import sys
from pathlib import Path
from tests.pipeline.tokenize.test_encode_chunk import piece
piece(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), "gigatoken")
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.soak
@pytest.mark.parametrize("kind", [ten_megabytes_each, a_million_rows, no_word_twice])
def test_worker_memory_is_bounded(
    tmp_path: Path, kind: Callable[[np.random.Generator], Iterator[bytes]]
) -> None:
    texts = kind(np.random.default_rng(1))
    path, rows = tmp_path / "a.parquet", 0
    with pq.ParquetWriter(path, pa.schema([("text", pa.binary())])) as writer:
        if kind is a_million_rows:
            table = pa.table({"text": pa.array(texts, pa.large_binary()).cast(pa.binary())})
            writer.write_table(table, row_group_size=1_000_000)
            rows = 1_000_000
            del table
        else:
            while part := list(islice(texts, 100)):
                rows += len(part)
                writer.write_table(pa.table({"text": pa.array(part, pa.binary())}))
    command = [sys.executable, "-c", MEASURE, str(path), str(rows), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    peak = 1024 * int(result.stdout) / 1e6  # MB
    print(f"{kind.__name__}: {peak:.0f} MB")
    assert peak < 1_500 + 75  # 75 MB are the test's own imports
