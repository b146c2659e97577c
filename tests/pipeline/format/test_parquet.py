"""Tests for pipeline.format.parquet."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.format.parquet import (
    check_pages,
    check_text_column,
    read_batches,
    read_texts,
    row_groups,
)
from pipeline.runtime.errors import UserError
from tests.support.small_data import some_texts, write_parquet

# Arrow's layouts of text, as polars, pandas, DataFusion and Spark write them.
LAYOUTS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "string": lambda texts: texts,
    "large_string": lambda texts: texts.cast(pa.large_string()),
    "string_view": lambda texts: texts.cast(pa.string_view()),
    "binary": lambda texts: texts.cast(pa.binary()),
    "large_binary": lambda texts: texts.cast(pa.large_binary()),
    "binary_view": lambda texts: texts.cast(pa.binary()).cast(pa.binary_view()),
    "categories": lambda texts: texts.dictionary_encode(),
    "categories of bytes": lambda texts: texts.cast(pa.binary()).dictionary_encode(),
    "small categories": lambda texts: texts.dictionary_encode().cast(
        pa.dictionary(pa.int8(), pa.string(), ordered=True)
    ),
    "json": lambda texts: pa.ExtensionArray.from_storage(pa.json_(), texts),
    "json view": lambda texts: pa.ExtensionArray.from_storage(
        pa.json_(pa.string_view()), texts.cast(pa.string_view())
    ),
    "unknown extension": lambda texts: pa.ExtensionArray.from_storage(
        pa.opaque(pa.string(), "x", "y"), texts
    ),
}
ENCODINGS = ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", None]

texts_lists = st.lists(st.none() | st.text(max_size=40), min_size=1, max_size=60)
writer_options = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(sorted(LAYOUTS)),
        "encoding": st.sampled_from(ENCODINGS),
        "compression": st.sampled_from(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
        "row_group_size": st.sampled_from([1, 7, 1000]),
        "data_page_size": st.sampled_from([1, 100, 1 << 20]),
        "data_page_version": st.sampled_from(["1.0", "2.0"]),
        "write_page_checksum": st.booleans(),
        "store_schema": st.booleans(),
    }
)


def write(path: Path, texts: list[str | None], layout: str, **options: Any) -> None:
    """Write a column `text` between two others; encoding None: a dictionary."""
    column = LAYOUTS[layout](pa.array(texts, pa.string()))
    encoding = options.pop("encoding", None)
    if encoding is not None:
        options |= {"use_dictionary": False, "column_encoding": {"text": encoding}}
    table = pa.table({"text.raw": texts, "text": column, "url": texts})
    pq.write_table(table, path, write_batch_size=3, **options)


def read_all(path: Path) -> list[str | None]:
    """Check a file as `download` does, and read it as `tokenize` does."""
    rows = check_text_column(path, path.name, "text")
    check_pages(path, path.name, "text")
    batches = read_batches(path, "text", 0, rows, batch_bytes=100)
    return [text for _, batch in batches for text in batch.cast(pa.string()).to_pylist()]


@settings(max_examples=60)
@given(texts=texts_lists, options=writer_options)
def test_every_layout_of_text_is_read_unchanged(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], options: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("a") / "a.parquet"
    write(path, texts, **options)
    assert check_text_column(path, "a", "text") == len(texts)
    assert read_all(path) == texts
    assert sum(rows for rows, _ in row_groups(path, "text")) == len(texts)


@settings(max_examples=60)
@given(options=writer_options, at=st.floats(0, 1, exclude_max=True), how=st.integers(0, 9))
def test_a_damaged_file_with_checksums_is_refused_or_read_unchanged(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], at: float, how: int
) -> None:
    path = tmp_path_factory.mktemp("a") / "a.parquet"
    texts: list[str | None] = [f"{i} ä " * (i % 9) if i % 7 else None for i in range(50)]
    write(path, texts, **options | {"write_page_checksum": True})
    data = bytearray(path.read_bytes())
    offset = int(at * len(data))
    if how < 8:
        data[offset] ^= 1 << how
    elif how == 8:
        data[offset : offset + 50] = bytes(len(data[offset : offset + 50]))
    else:
        del data[offset:]
    path.write_bytes(data)
    message = path.name
    try:
        assert read_all(path) == texts
    except UserError as error:
        message = str(error)
    assert re.fullmatch(rf".*{path.name}.*", message)


def test_damage_is_named_with_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts: list[str | None] = [f"document {i} " + "0123456789"[i % 10] * 99 for i in range(90)]
    write(path, texts, "string", row_group_size=30, compression="none", write_page_checksum=True)
    data = path.read_bytes()
    for word, column in ((b"document 40 ", "text"), (b"document 75 ", "url")):
        # Each text is in three columns; the damage keeps its length and UTF-8.
        places = [m.start() for m in re.finditer(word, data)]
        place = places[{"text": 1, "url": 2}[column]]
        path.write_bytes(data[:place] + b"D" + data[place + 1 :])
        group = 1 if column == "text" else 2
        with pytest.raises(UserError, match=rf"^in/a: row group {group}, column '{column}'"):
            check_pages(path, "in/a", "text")
        found = read_batches(path, "text", 0, 30)
        assert sum(len(batch) for _, batch in found) == 30
        if column == "text":
            with pytest.raises(UserError, match=re.escape(f"{path}: row group 1, ")):
                list(read_batches(path, "text", 0, 90))


def test_rows_that_do_not_add_up_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, ["text"] * 77, "string")
    data = path.read_bytes()
    number, other = (b"\x16" + bytes([2 * n % 256, 1]) for n in (77, 78))  # Thrift's field 3
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:footer] + data[footer:].replace(number, other, 1))
    assert pq.read_metadata(path).num_rows == 78
    with pytest.raises(UserError, match=r"^in/a: .*77"):
        check_text_column(path, "in/a", "text")


def test_an_error_of_the_file_system_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one"])

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(OSError, match="Input/output error"):
        check_pages(path, "a", "text")


@pytest.mark.parametrize("group", [1, 4, 100])
@pytest.mark.parametrize("batch", [1, 3000, 1 << 20])
def test_read_batches_yields_exactly_the_rows(tmp_path: Path, group: int, batch: int) -> None:
    texts = [*some_texts(7), None, "", *some_texts(4, "é")]
    path = tmp_path / "a.parquet"
    write_parquet(path, texts, group)
    for start in range(0, len(texts) + 1, 3):
        for stop in range(start, len(texts) + 1):
            rows: dict[int, str | None] = {}
            for first, block in read_batches(path, "text", start, stop, batch):
                assert rows.keys().isdisjoint(range(first, first + len(block)))
                rows |= dict(enumerate(block.cast(pa.string()).to_pylist(), first))
            assert rows == dict(enumerate(texts[start:stop], start)), (start, stop)


def test_many_categories_are_read_in_row_order(tmp_path: Path) -> None:
    """More than one read of the dictionary's rows, and more categories than int8 holds."""
    path = tmp_path / "a.parquet"
    texts = [f"category {i % 777}" for i in range(9000)]
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), path)
    found = [text for _, block in read_texts(path, "text", 100, 8900) for text in block]
    assert found == texts[100:8900]


def test_row_groups_returns_rows_and_bytes_from_the_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"{i:050d}" for i in range(100)], group=40)
    groups = row_groups(path, "text")
    assert [rows for rows, _ in groups] == [40, 40, 20]
    # 50 bytes and a length of 4 per row, with a margin for pages and dictionaries.
    assert all(50 * rows < size < 70 * rows + 500 for rows, size in groups)


def test_a_column_is_read_by_its_whole_name(tmp_path: Path) -> None:
    """Parquet's path of field b of a struct a is that of a column named `a.b`."""
    path = tmp_path / "a.parquet"
    structs = pa.array([{"b": "wrong" * 1000}, {"b": "wrong"}])
    pq.write_table(pa.table({"a": structs, "a.b": ["one", "two"]}), path)
    assert check_text_column(path, "a", "a.b") == 2
    assert row_groups(path, "a.b")[0][1] < 500
    assert list(read_texts(path, "a.b", 0, 2)) == [(0, ["one", "two"])]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["a"]]),
        pa.array([{"a": "b"}]),
        pa.array([1]),
        pa.array([1.5]),
        pa.array([0], pa.timestamp("us")),
        pa.array([b"0" * 16], pa.binary(16)),
        pa.array([1]).dictionary_encode(),
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16))),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_of_no_text_is_refused_by_its_type(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column, "url": ["x"]}), path)
    with pytest.raises(UserError, match=r"^in/a: column 'text' .*source\.text_column.*url$"):
        check_text_column(path, "in/a", "text")


@pytest.mark.parametrize("valid", [0, 1])
def test_a_column_of_bytes_is_refused_if_none_is_utf8(tmp_path: Path, valid: int) -> None:
    path = tmp_path / "a.parquet"
    texts = [None, *[b"\xff\xd8"] * 40, *[b"text"] * valid]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=30)
    if valid:
        check_pages(path, "in/a", "text")
    else:
        with pytest.raises(UserError, match=r"^in/a: column 'text'.*UTF-8"):
            check_pages(path, "in/a", "text")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "text"]), path)
    with pytest.raises(UserError, match=r"^in/a: 2 columns .*'text'"):
        check_text_column(path, "in/a", "text")


@pytest.mark.parametrize("column", [pa.nulls(3), pa.array([None] * 3, pa.string())], ids=str)
def test_a_column_of_nulls_has_rows(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    assert read_all(path) == [None] * 3


@pytest.mark.parametrize("column", [pa.array([], pa.string()), pa.array([], pa.float64()), None])
@pytest.mark.parametrize("has_group", [True, False])
def test_a_file_without_rows_has_no_row_groups(
    tmp_path: Path, column: pa.Array | None, has_group: bool
) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({} if column is None else {"text": column})
    with pq.ParquetWriter(path, table.schema) as writer:
        if has_group:
            writer.write_table(table)
    assert check_text_column(path, "a", "text") == 0
    assert row_groups(path, "text") == []
    assert list(read_batches(path, "text", 0, 0)) == []


@pytest.mark.parametrize(
    "data", [b"", b"text\none\ntwo\nthree\n", b"PAR1" + bytes(8) + b"PAR1"], ids=len
)
def test_a_file_that_is_no_parquet_is_named_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"\Ain/a: [^\n]*\Z"):
        check_text_column(path, "in/a", "text")


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_an_encrypted_file_is_named_in_one_line(tmp_path: Path, plaintext_footer: bool) -> None:
    """pyarrow aborts the process if asked for the size of an encrypted column."""
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):  # type: ignore[name-defined,misc]
        def wrap_key(self, key: bytes, _: str) -> bytes:
            return key.hex().encode()

    config = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=plaintext_footer
    )
    factory = encryption.CryptoFactory(lambda _: Keys())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    path, table = tmp_path / "a.parquet", pa.table({"text": ["secret"], "n": [1]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"\Aa\.parquet: [^\n]*\Z"):
        read_all(path)
