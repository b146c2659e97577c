"""Of pipeline.encode: one chunk's piece, and the hashes by which data is known."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import tokenizer
from pipeline.chunks import Chunk
from pipeline.encode import (
    chunk_key,
    content_hash,
    encode_chunk,
    encode_text,
    length_bins,
    read_record,
    split_of,
)
from pipeline.manifest import SourceFile
from pipeline.params import TokenizeParams
from pipeline.shards import open_shard, read_docs
from pipeline.store import Store
from tests.pipeline.mini import hashes, some_texts, write_parquet


@pytest.mark.parametrize(
    ("text", "place"),  # xxh3_64 mod 10,000: never to change, or documents move between splits
    # The first is XXH3's published vector, 0x2D06800538D394C2.
    [("", 0x2D06800538D394C2 % 10_000), ("Hello world", 1076), ("é", 1795), ("x" * 1000, 2194)],
)
def test_the_split_of_a_text_is_for_ever(text: str, place: int) -> None:
    assert split_of(text.encode(), place) == "train"
    assert split_of(text.encode(), place + 1) == "val"


@given(st.binary(max_size=50))
def test_the_ends_of_the_split(text: bytes) -> None:
    assert split_of(text, 0) == "train"
    assert split_of(text, 10_000) == "val"


def test_the_split_has_its_size() -> None:
    count = sum(split_of(str(i).encode(), 500) == "val" for i in range(20_000))
    assert 900 < count < 1100


def test_content_hash_goldens() -> None:
    tokens = np.array([50256, 15496, 995], dtype=np.uint16)
    assert f"{content_hash(0, 0, tokens):032x}" == "b293035de6ded5c10dac580d5c3460b4"
    others = {
        content_hash(0, 0, tokens), content_hash(1, 0, tokens), content_hash(0, 1, tokens),
        content_hash(0, 0, tokens[:2]), content_hash(0, 0, tokens[::-1]),
    }  # fmt: skip
    assert len(others) == 5


@given(st.lists(st.integers(1, 2**40), max_size=20))
def test_length_bins(lengths: list[int]) -> None:
    expected = Counter(1 << (n.bit_length() - 1) for n in lengths)
    assert length_bins(np.array(lengths, dtype=np.int64)) == {
        str(k): n for k, n in expected.items()
    }


def test_a_document_is_eot_and_its_tokens() -> None:
    tokens = encode_text("a <|endoftext|> b")
    assert tokens.dtype == np.uint16
    assert tokens[0] == tokenizer.EOT
    assert tokenizer.EOT not in tokens[1:]
    assert tokenizer.decode(tokens[1:].tolist()) == "a <|endoftext|> b"


def chunk_of(file: SourceFile, start: int, stop: int, file_index: int = 0) -> Chunk:
    return Chunk(file_index, file, start, stop, 100)


def test_every_thing_that_decides_the_bytes_is_in_the_key(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", some_texts(9))
    other = file.model_copy(update={"sha256": "0" * 64})
    renamed = file.model_copy(update={"path": "b.parquet"})  # the record names it
    params, chunk = TokenizeParams(), chunk_of(file, 0, 5)
    keys = [
        chunk_key(chunk, "text", params, "code"),
        chunk_key(chunk_of(other, 0, 5), "text", params, "code"),
        chunk_key(chunk_of(renamed, 0, 5), "text", params, "code"),
        chunk_key(chunk_of(file, 1, 5), "text", params, "code"),
        chunk_key(chunk_of(file, 0, 6), "text", params, "code"),
        chunk_key(chunk_of(file, 0, 5, 1), "text", params, "code"),
        chunk_key(chunk, "url", params, "code"),
        chunk_key(chunk, "text", params.model_copy(update={"val_per_10k": 21}), "code"),
        chunk_key(chunk, "text", params, "other code"),
    ]
    assert len(set(keys)) == len(keys)
    # ... and what only cuts is not: chunks of equal rows are shared.
    recut = params.model_copy(update={"shard_tokens": 5000})
    assert chunk_key(chunk, "text", recut, "code") == keys[0]


def test_a_piece_holds_its_rows_and_says_so(tmp_path: Path) -> None:
    texts: list[str | None] = ["first", None, "", "second é", "third <|endoftext|>", "", "beyond"]
    file = write_parquet(tmp_path / "a.parquet", texts, group=2)
    store = Store(tmp_path / "work")
    params = TokenizeParams(val_per_10k=0)
    record = encode_chunk(chunk_of(file, 1, 6), "key", tmp_path, "text", params, store)
    folder = store.find("chunks", "key")
    assert folder is not None
    assert sorted(hashes(folder)) == [
        "engine.json",
        "piece.json",
        "record.json",
        "train.bin",
        "train.docs.npy",
    ]
    tokens, docs = open_shard(folder / "train.bin"), read_docs(folder / "train.bin")
    assert docs[:, 1].tolist() == [3, 4]
    expected = [encode_text("second é"), encode_text("third <|endoftext|>")]
    assert np.array_equal(tokens, np.concatenate(expected))
    assert docs[:, 0].tolist() == [0, len(expected[0])]
    assert record == read_record(folder)
    assert record["skipped"] == {"null": 1, "empty": 2}
    assert record["rows"] == [1, 6]
    assert record["source"]["sha256"] == file.sha256
    facts = record["splits"]["train"]
    assert (facts["tokens"], facts["docs"]) == (len(tokens), 2)
    assert facts["text_bytes"] == len("second é".encode()) + len("third <|endoftext|>")
    total = content_hash(0, 3, expected[0]) + content_hash(0, 4, expected[1])
    assert facts["content"] == f"{total % 2**128:032x}"
    assert sum(facts["lengths"].values()) == 2
    assert facts["sha256"] == hashes(folder)["train.bin"]
    assert facts["docs_sha256"] == hashes(folder)["train.docs.npy"]


def test_a_chunk_of_nothing_is_a_record_alone(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [None, "", None])
    store = Store(tmp_path / "work")
    record = encode_chunk(chunk_of(file, 0, 3), "key", tmp_path, "text", TokenizeParams(), store)
    assert record["splits"] == {}
    assert sorted(hashes(store.root / "chunks" / "key")) == [
        "engine.json",
        "piece.json",
        "record.json",
    ]


def test_a_piece_that_stands_is_not_made_again(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", some_texts(5))
    store = Store(tmp_path / "work")
    arguments = (chunk_of(file, 0, 5), "key", tmp_path, "text", TokenizeParams(), store)
    record = encode_chunk(*arguments)
    piece = store.root / "chunks" / "key" / "record.json"
    before = piece.stat()
    (tmp_path / "a.parquet").unlink()
    assert encode_chunk(*arguments) == record
    assert piece.stat() == before
    assert json.loads(piece.read_text())["chunk_key"] == "key"
