"""Tests for the conversion of text formats: what is read is exact, and nothing else is."""

from __future__ import annotations

import bz2
import contextlib
import datetime
import gzip
import json
import lzma
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.download import to_parquet as module
from pipeline.download.to_parquet import ReadOptions, SkippedRows, to_parquet
from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.runtime.errors import UserError

Read = Callable[..., tuple[list[dict[str, Any]], dict[str, SkippedRows]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return a function that converts a file, and returns its rows and what was skipped."""

    def run(
        name: str,
        data: bytes,
        column: str = "text",
        text_documents: str = "file",
        encoding: str = "utf-8",
    ) -> tuple[list[dict[str, Any]], dict[str, SkippedRows]]:
        source, target = tmp_path / "source", tmp_path / "made.parquet"
        source.write_bytes(data)
        options = ReadOptions(column, text_documents, encoding)
        skipped = to_parquet(source, name, options, target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["made.parquet", "source"]
        return pq.read_table(target).to_pylist(), skipped

    return run


def texts(read: Read, name: str, data: bytes, **options: Any) -> list[str | None]:
    rows, skipped = read(name, data, **options)
    assert not skipped
    return [row[options.get("column", "text")] for row in rows]


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def arrow(table: pa.Table, is_file: bool = False, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


GOOD = b'{"text": "good"}\n' * 200

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
SAME = b'{"text": "one"}\n{"text": "two"}\n'


# --- compression


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_a_compressed_file_may_have_many_streams_and_none_may_be_cut_short(
    read: Read, suffix: str
) -> None:
    compress = COMPRESS[suffix]
    name = f"a.jsonl{suffix.upper()}"
    parts = [compress(SAME[:20]), compress(b""), compress(SAME[20:])]
    assert texts(read, name, b"".join(parts)) == ["one", "two"]
    assert texts(read, name, compress(b"")) == []
    if suffix:
        whole = compress(GOOD)
        for size in (0, 1, 5, len(whole) // 2, len(whole) - 1):
            with pytest.raises(UserError, match=r"a\.jsonl"):
                read(name, whole[:size])
        with pytest.raises(UserError, match=rf"a\.txt: .*\{suffix}"):
            read("a.txt", whole, encoding="latin-1")
        for bad in (whole + b"more", GOOD, b"PAR1", whole + whole[:-3]):
            with pytest.raises(UserError, match=r"a\.jsonl"):
                read(name, bad)


def test_zst_of_any_window_with_skippable_frames_and_padding(read: Read) -> None:
    window = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    long = zstandard.ZstdCompressor(compression_params=window).compressobj()
    data = long.compress(SAME) + long.flush()
    assert zstandard.get_frame_parameters(data).window_size == 1 << 31
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert texts(read, "a.jsonl.zst", skippable + data + skippable) == ["one", "two"]
    assert texts(read, "a.jsonl.gz", gzip.compress(SAME) + bytes(512)) == ["one", "two"]


def test_any_flipped_bit_of_a_checked_stream_is_found(read: Read) -> None:
    for suffix, compress in COMPRESS.items():
        whole = compress(SAME)
        for index in range(len(whole) if suffix else 0):
            flipped = bytearray(whole)
            flipped[index] ^= 1 << index % 8
            with contextlib.suppress(UserError):
                assert texts(read, f"a.jsonl{suffix}", bytes(flipped)) == ["one", "two"]


# --- encodings and line ends


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "UTF32", "cp1252", "latin-1"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", '{"text": "é"}\n{"text": "naïve"}\n'),
        ("a.json", '[{"text": "é"},\n {"text": "naïve"}]'),
        ("a.csv", "text,id\né,1\nnaïve,2\n"),
        ("a.tsv", "text\tid\né\t1\nnaïve\t2\n"),
        ("a.txt", "é\nnaïve"),
    ],
)
def test_every_encoding_with_its_mark(read: Read, name: str, data: str, encoding: str) -> None:
    options = {"encoding": encoding, "text_documents": "line"}
    assert texts(read, name, data.encode(encoding), **options) == ["é", "naïve"]


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("text".encode("utf-16"), "utf-8"),
        ("text".encode("utf-32"), "utf-8"),
        ("text".encode("utf-16"), "cp1252"),
        ("text".encode("utf-8-sig"), "cp1252"),
        ("text".encode("utf-16-be"), "utf-16"),
        *(
            (text.encode(codec), encoding)
            for text in (
                "text",
                '"Hi" he said.',
                "\n\nhello",
                "Привет мир",
                "中文 and Latin. " * 20,
            )
            for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
            for encoding in ("utf-8", "cp1252")
        ),
        ("\ufefftext".encode("utf-16-le"), "utf-16-be"),
        ("\ufefftext".encode("utf-16-be"), "utf-16-le"),
        ("\ufefftext".encode("utf-32-le"), "utf-32-be"),
        ("\ufefftext".encode("utf-32-be"), "utf-32-le"),
        ("text".encode("utf-16") + b"x", "utf-16"),
        (b"caf\xe9", "utf-8"),
        (b"\x81", "shift_jis"),
    ],
)
def test_another_encoding_than_the_files_is_refused(read: Read, data: bytes, encoding: str) -> None:
    with pytest.raises(UserError, match=r"a\.txt.*source\.encoding"):
        read("a.txt", data, encoding=encoding)


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_mark_of_the_same_byte_order_is_removed(read: Read, codec: str) -> None:
    data = "\ufeffПривет\0".encode(codec)
    for encoding in (codec, codec[:6]):
        assert texts(read, "a.txt", data, encoding=encoding) == ["Привет\0"]


@pytest.mark.parametrize("text", ["a\0b", "\0 and words", "one\0word\0" * 9, "x" * 999 + "\0"])
def test_some_nuls_are_text(read: Read, text: str) -> None:
    assert texts(read, "a.txt", text.encode()) == [text]


@pytest.mark.parametrize("encoding", ["nonsense", "hex", "", "a\0b", "rot13"])
def test_an_unknown_encoding_is_named(encoding: str) -> None:
    with pytest.raises(UserError, match=r"source\.encoding"):
        ReadOptions("text", "file", encoding)


def test_what_is_not_in_the_encoding_costs_its_document(read: Read) -> None:
    half = "x" * 300 + "\n"
    for encoding, bad in (
        ("utf-8", b"caf\xe9\n"),
        ("shift_jis", b"\x81\xff\n"),
        ("ascii", b"\xe9\n"),
    ):
        data = half.encode() * 100 + bad + half.encode() * 100
        rows, skipped = read("a.txt", data, text_documents="line", encoding=encoding)
        assert len(rows) == 200
        assert list(skipped.values()) == [SkippedRows(1, 101)]
    odd = (half * 100).encode("utf-16") + b"\0\xd8\n\0" + (half * 100).encode("utf-16-le")
    rows, skipped = read("a.txt", odd, text_documents="line", encoding="utf-16")
    assert (len(rows), list(skipped.values())) == (200, [SkippedRows(1, 101)])


ODD = "a\u2028b\u0085c\x0bd\x0c\x1ce"


@pytest.mark.parametrize(
    ("documents", "data", "expected"),
    [
        ("file", "one\r\n\ntwo\n", ["one\r\n\ntwo\n"]),
        ("file", "", []),
        ("line", "one\r\n\ntwo\rthree\n \nlast", ["one", "", "two\rthree", " ", "last"]),
        ("line", ODD + "\n\n", [ODD, ""]),
        ("paragraph", "\n\none\r\ntwo\r\n\r\n \t\nthree\n\n\n", ["one\r\ntwo", "three"]),
        ("paragraph", f"{ODD}\nend", [f"{ODD}\nend"]),
        ("paragraph", "\n \n", []),
    ],
)
def test_documents_of_a_txt_file(
    read: Read, documents: str, data: str, expected: list[str]
) -> None:
    assert texts(read, "a.txt", data.encode(), text_documents=documents) == expected


# --- JSON


OTHERS: list[Any] = [1, 1.5, "x", None, [1, "a"], {"a": {"b": []}}, True, 1 << 70, [], {}]


def test_other_fields_may_change_type_appear_and_vanish(read: Read) -> None:
    rows = [{"text": f"{i}", "score": value, f"only{i}": 1} for i, value in enumerate(OTHERS)]
    rows.append({"text": "last"})
    assert texts(read, "a.ndjson", jsonl(rows)) == [row["text"] for row in rows]
    lines = [
        r'{"text": "a", "x": NaN, "y": -Infinity, "z": 1e999}',
        r'{"text": "b", "x": "\ud83d"}',
        r'{"text": "not this", "text": "c"}',
        '{"text": "d", "x": ' + "[" * 500 + "]" * 500 + "}",
        '{"text": "e", "x": ' + "1" * 5000 + "}",
        "  \r",
        '\t{"text": "\\u0000\\ud83d\\ude00"} \r',
        '{"text": null}',
    ]
    expected = ["a", "b", "c", "d", "e", "\0😀", None]
    assert texts(read, "a.jsonl", "\n".join(lines).encode()) == expected


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "an emoji cut in two: \\ud83d"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "cut',
        b'{"text": "two"} {"text": "objects"}',
        b'["text"]',
        b'"text"',
        b"7",
        b'{"text": ["a", "list"]}',
        b'{"text": {"an": "object"}}',
        b'{"text": 7}',
        b'{"text": 1.50, "id": 0.10}',
        b'{"text": true}',
        b'{"text": "deep", "x": ' + b"[" * 100_000 + b"}",
        b"\0",
    ],
)
def test_a_bad_line_costs_that_line_and_many_cost_the_file(read: Read, line: bytes) -> None:
    rows, skipped = read("a.jsonl", b"\n" + GOOD + line + b"\n" + GOOD)
    assert [row["text"] for row in rows] == ["good"] * 400
    assert list(skipped.values()) == [SkippedRows(1, 202)]
    with pytest.raises(UserError, match=r"a\.jsonl") as error:
        read("a.jsonl", GOOD + (line + b"\n") * 3)
    assert "\n" not in str(error.value)
    assert "201" in str(error.value)


def test_one_percent_of_bad_lines_is_allowed(read: Read) -> None:
    rows, skipped = read("a.jsonl", GOOD[: 198 * 17] + b"x\n" * 2)
    assert (len(rows), skipped) == (198, {"not valid JSON": SkippedRows(2, 199)})
    with pytest.raises(UserError):
        read("a.jsonl", GOOD[: 197 * 17] + b"x\n" * 2)


@pytest.mark.parametrize(
    "data",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '\n [\n {"text": "a"},\n {"text": "b"}\n]\n',
        '{"text": "a"}\n{"text": "b"}',
        '\n{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
    ],
)
def test_json_files_hold_a_list_or_lines(read: Read, data: str) -> None:
    assert texts(read, "a.json", data.encode()) == ["a", "b"]
    assert texts(read, "a.json", b'{\n"text":\n"a"}') == ["a"]
    assert texts(read, "a.json", b"[]") == []
    rows, skipped = read("a.json", json.dumps([{"text": "a"}] * 150 + [7]).encode())
    assert (len(rows), skipped) == (150, {"not a JSON object": SkippedRows(1, 151)})


def test_a_json_list_is_held_in_memory_up_to_a_limit(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.download.readers.read_json._MAX_VALUE_BYTES", 100)
    for data in (b'[{"text": "a"}]' + b" " * 100, b"[" + b" " * 200 + b"]"):
        with pytest.raises(UserError, match=r"a\.json: .*JSON Lines"):
            read("a.json", data)
    lines = b'{"text": "cut\n' + GOOD
    assert len(read("a.json", lines)[0]) == 200


def test_a_row_without_the_key_is_null_if_another_row_has_it(read: Read) -> None:
    rows = [{"id": "1"}] * 3 + [{}, {"id": "2", "text": "a"}, {"id": "3"}]
    for name, data in (("a.jsonl", jsonl(rows)), ("a.json", json.dumps(rows).encode())):
        assert texts(read, name, data) == [None] * 4 + ["a", None]
        assert [row["id"] for row in read(name, data)[0]] == ["1", "1", "1", None, "2", "3"]
    with pytest.raises(UserError, match=r"a\.jsonl: .*source\.text_column.*: id"):
        read("a.jsonl", jsonl([{}, {"id": "1"}] * 2) + b"no json\n")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "a.JSON.gz", "a.jsonl"])
def test_one_object_around_the_rows_is_no_document(
    read: Read, name: str, indent: int | None
) -> None:
    compress = gzip.compress if name.endswith("gz") else bytes
    data = json.dumps({"text": "title", "rows": [{"text": "a"}]}, indent=indent).encode()
    if name == "a.jsonl" and not indent:
        assert texts(read, name, data) == ["title"]
    else:
        with pytest.raises(UserError, match=r"'rows'"):
            read(name, compress(data + b"\n"))
    data = json.dumps({"text": "title", "tags": ["a"], "x": {"y": [{}]}}, indent=indent).encode()
    assert texts(read, name, compress(data)) == ["title"]
    lines = jsonl([{"text": "a", "rows": [{"text": "b"}]}] * 2)
    assert texts(read, name, compress(lines)) == ["a", "a"]


# --- CSV and TSV


def test_csv_values_are_strings_and_no_column_is_an_index(read: Read) -> None:
    data = b'text,id\n007,1,\nNA,2,\n"two\nlines, ""quoted""\r\n",3,,\n\nin "the" middle,4\n"",5\n'
    rows, skipped = read("a.csv", data)
    expected = ["007", "NA", 'two\nlines, "quoted"\r\n', 'in "the" middle', ""]
    assert [row["text"] for row in rows] == expected
    assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert not skipped
    assert texts(read, "a.csv", b"id,text,\n1,a\n2,b,\n") == ["a", "b"]
    assert texts(read, "a.csv", b"id,text\r1,a\r2,b\r") == ["a", "b"]  # an old Mac
    big = "x" * 1_000_000
    assert texts(read, "a.csv", f'id,text\n1,"{big}\n{big}"\n'.encode()) == [f"{big}\n{big}"]


@pytest.mark.parametrize(("name", "sep"), [("a.csv", b","), ("a.tsv", b"\t")])
def test_in_one_column_a_delimiter_at_the_end_is_not_lost(
    read: Read, name: str, sep: bytes
) -> None:
    good = b"good\n" * 150
    rows, skipped = read(name, b"text\n" + good + b"Hello" + sep + b"\n")
    assert (len(rows), list(skipped.values())) == (150, [SkippedRows(1, 152)])
    assert texts(read, name, b"text" + sep + b"\nHello" + sep + b"\n") == ["Hello"]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_another_delimiter_of_a_csv_file_is_named(read: Read, delimiter: str) -> None:
    data = f"id{delimiter}text\n1{delimiter}one, two\n".encode()
    with pytest.raises(UserError, match=re.escape(repr(delimiter))) as error:
        read("a.csv", data)
    assert "text_column" not in str(error.value)


def test_tsv_has_no_quotes(read: Read) -> None:
    data = b'text\tid\r\n"Hello there, he said\t1\r\nplain\t2\t\n\nand the end"\t3\n\t4'
    assert texts(read, "a.tsv", data) == ['"Hello there, he said', "plain", 'and the end"', ""]


@pytest.mark.parametrize(("name", "sep"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("bad", ["one", "one,2,3", "one,2,,3", "\udce9,2"])
def test_a_bad_row_costs_that_row(read: Read, name: str, sep: str, bad: str) -> None:
    rows = ["text,id", *["good,1"] * 150, bad, *["good,1"] * 50]
    data = "\n".join(rows).replace(",", sep).encode("utf-8", "surrogateescape") + b"\n"
    bad_line = bad.replace(",", sep).encode("utf-8", "surrogateescape") + b"\n"
    found, skipped = read(name, data)
    assert ([row["text"] for row in found], len(skipped)) == (["good"] * 200, 1)
    assert next(iter(skipped.values())) == SkippedRows(1, 152)
    with pytest.raises(UserError, match=name):
        read(name, data + bad_line * 2)


@pytest.mark.parametrize(
    "data",
    [
        'text,id\n"never closed,1\n' + "good,2\n" * 500,
        'text,id\n"never closed,1\n' + '"good",2\n' * 500,
        'text,id\n"closed" too early,1\n' + "good,2\n" * 500,
    ],
)
def test_a_fault_in_the_quotes_is_refused_with_its_line(read: Read, data: str) -> None:
    with pytest.raises(UserError, match=r"a\.csv: .*line 2"):
        read("a.csv", data.encode())


# --- Arrow


TEXTS = ["one\nline", "naïve", None, "", "naïve"]
INDICES = pa.array([0, 1, None, 2, 1], pa.int8())


@pytest.mark.parametrize(
    "values",
    [
        *(
            pa.array(TEXTS, kind)
            for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary())
        ),
        pa.array(TEXTS, pa.large_binary()),
        pa.array(TEXTS, pa.binary_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.DictionaryArray.from_arrays(
            INDICES, pa.array(["one\nline", "naïve", ""]).cast("binary")
        ),
        pa.ExtensionArray.from_storage(pa.json_(), pa.array(TEXTS)),
    ],
    ids=lambda values: str(values.type)[:20],
)
def test_arrow_text_in_every_layout(read: Read, values: pa.Array) -> None:
    for is_file in (False, True):
        table = pa.table({"x": [[1]] * 5, "text": values, "id": pa.array([1, 2, 3, 4, 5])})
        data = arrow(table, is_file)
        rows, skipped = read("a.arrow", data)
        assert ([row["text"] for row in rows], skipped) == (TEXTS, {})
        assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5"]
        assert texts(read, "a.arrow.zst", zstandard.compress(data)) == TEXTS


def test_arrow_without_rows_many_streams_and_compressed_buffers(read: Read) -> None:
    table = pa.table({"text": ["a", "b"] * 100})
    assert texts(read, "a.arrow", arrow(table[:0])) == []
    for kind in (pa.float64(), pa.null(), pa.list_(pa.string())):
        for is_file in (False, True):
            empty = arrow(
                pa.table({"text": pa.array([], kind), "id": pa.array([], "string")}), is_file
            )
            assert texts(read, "a.arrow", empty) == []
            assert texts(read, "a.arrow", empty, column="body") == []
    with pytest.raises(UserError, match=r"a\.arrow"):
        read("a.arrow", b"")
    assert texts(read, "a.arrow", arrow(table[:1]) + arrow(table[1:2])) == ["a", "b"]
    for is_file in (False, True):
        assert texts(read, "a.arrow", arrow(table, is_file, compression="zstd")) == ["a", "b"] * 100


def test_arrow_bytes_that_are_not_utf8_cost_their_row(read: Read) -> None:
    values = [b"good"] * 150 + [b"caf\xe9"] + [b"good"] * 50
    binary = pa.array(values, pa.binary())
    for column in (binary, binary.view(pa.string()), binary.cast(pa.binary_view())):
        rows, skipped = read("a.arrow", arrow(pa.table({"text": column, "url": column})))
        assert (len(rows), skipped) == (200, {"not UTF-8": SkippedRows(1, 151)})


@pytest.mark.parametrize("is_file", [False, True])
def test_arrow_that_is_cut_short_anywhere_is_refused(read: Read, is_file: bool) -> None:
    data = arrow(pa.table({"text": ["some", "text"], "id": ["a", "b"]}), is_file)
    for size in (1, *range(8, len(data), 8), len(data) - 1):  # messages are aligned to 8 bytes
        with pytest.raises(UserError, match=r"a\.arrow"):
            read("a.arrow", data[:size])


@pytest.mark.parametrize("is_file", [False, True])
def test_a_flipped_bit_of_arrow_is_no_crash(read: Read, is_file: bool) -> None:
    """Arrow has no checksums: damage in the text may go unnoticed."""
    table = pa.table({"text": pa.array(["some", "text"]).dictionary_encode(), "id": ["a", "b"]})
    table = table.append_column("url", pa.array(["x" * 20, None], pa.string_view()))
    data = arrow(table, is_file)
    for index in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[index] ^= 1 << index % 8
        with contextlib.suppress(UserError):
            read("a.arrow", bytes(flipped))


# --- all formats


METADATA: dict[str, Any] = {
    "id": 7,
    "dump": ["a list"],
    "url": "http://example.org/ü",
    "date": "2013-05-18T10:42:00Z",
    "file_path": "",
    "language": True,
    "language_score": 1,
    "token_count": "12",
}
EXPECTED = {**METADATA, "id": "7", "dump": None, "language": None, "token_count": 12}


def test_metadata_keep_their_spelling_and_are_null_if_they_do_not_fit(read: Read) -> None:
    rows, _ = read("a.jsonl", jsonl([{**METADATA, "text": "x"}]))
    assert rows == [{"text": "x", **EXPECTED}]
    rows, _ = read("a.json", json.dumps([{**METADATA, "body": "x", "text": 5}]).encode(), "body")
    assert rows == [{"body": "x", **EXPECTED}]
    spelled = b'{"text": "x", "id": 0.10, "dump": 1e5, "url": 1%s, "date": "\\ud83d"}' % (b"0" * 99)
    rows, _ = read("a.jsonl", spelled)
    assert [rows[0][key] for key in ("id", "dump", "url", "date")] == [
        "0.10",
        "1e5",
        "1" + "0" * 99,
        None,
    ]
    rows, _ = read("a.csv", b"id,date,text,id,token_count\n1,2013-05-18,x,2,\n")
    assert [rows[0][key] for key in ("id", "date", "token_count")] == [None, "2013-05-18", None]
    when = datetime.datetime(2013, 5, 18, 10, 42)
    interval = pa.array([pa.MonthDayNano([1, 2, 3])])
    columns = {"text": ["x"], "date": [when], "id": [[1]], "url": interval, "dump": [b"\xe9"]}
    rows, _ = read("a.arrow", arrow(pa.table(columns)))
    assert rows[0]["date"][:16] == "2013-05-18 10:42"
    unknown = pa.array([when], pa.timestamp("us", "Mars/X"))
    assert read("a.arrow", arrow(pa.table({"text": ["x"], "date": unknown})))[0][0]["date"] is None
    assert [rows[0][key] for key in ("id", "url", "dump")] == [None] * 3


@pytest.mark.parametrize(
    ("value", "count", "score"),
    [
        (1 << 63, None, 2.0**63),
        (-(1 << 63), -(1 << 63), -(2.0**63)),
        (18446744073709551615, None, 2.0**64),
        (3.0, 3, 3.0),
        (2.5, None, 2.5),
        (float("nan"), None, None),
        (float("inf"), None, None),
        ("1e999", None, None),
        ("nan", None, None),
        ("1_000", None, None),
        (" 7", None, None),
        ("", None, None),
        ("9" * 5000, None, None),
        (True, None, None),
        ([1], None, None),
    ],
)
def test_numbers_that_do_not_fit_are_null(
    read: Read, value: Any, count: int | None, score: float | None
) -> None:
    row = {"text": "x", "token_count": value, "language_score": value}
    rows, skipped = read("a.jsonl", jsonl([row]))
    assert (rows[0]["token_count"], rows[0]["language_score"], skipped) == (count, score, {})


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"a": 1, "b": 2}\n'),
        ("a.json", b'[{"a": 1, "b": 2}]'),
        ("a.csv", b"a,b\n1,2\n"),
        ("a.tsv", b"a\tb\n1\t2\n"),
        ("a.arrow", arrow(pa.table({"a": ["x"], "b": ["x"]}))),
    ],
)
def test_a_missing_text_column_is_named_with_those_there(
    read: Read, name: str, data: bytes
) -> None:
    with pytest.raises(UserError, match=rf"{name}: .*'text'.*source\.text_column.*: a, b"):
        read(name, data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"text,id,text\na,1,b\n"),
        ("a.tsv", b"text\ttext\na\tb\n"),
        ("a.arrow", arrow(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]))),
        ("a.arrow", arrow(pa.table({"text": [["a"]]}))),
        ("a.arrow", arrow(pa.table({"text": [1]}))),
        ("a.jsonl", jsonl([{"text": ["a"]}])),
        ("a.jsonl", b"no json"),
        ("a.arrow", b"no arrow"),
        ("a.txt", b"caf\xe9"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(read: Read, name: str, data: bytes) -> None:
    with pytest.raises(UserError, match=name) as error:
        read(name, data)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"source\.text_column"):
        read(name, data, column="url")


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.jsonl", b"\n\n"), ("a.csv", b"text,id\n"), ("a.csv", b""), ("a.tsv", b"text\n")],
)
def test_a_file_without_rows_is_no_error(read: Read, name: str, data: bytes) -> None:
    assert texts(read, name, data) == []


def test_a_document_beyond_the_limit_is_not_held_in_memory(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("readers.text_stream", "readers.read_txt", "readers.read_csv", "to_parquet"):
        monkeypatch.setattr(f"pipeline.download.{place}.MAX_BYTES", 1000)
    long = b"x" * 3000
    for name, first, line in (("a.jsonl", b"", GOOD[:17]), ("a.tsv", b"text\n", b"good\n")):
        rows, skipped = read(name, first + line * 150 + long + b"\n" + line * 50)
        assert (len(rows), [s.count for s in skipped.values()]) == (200, [1])
    data = (b"good\n\n" * 100 + long + b"\nmore\n\n" + b"y" * 990 + b"\n" + b"z" * 20 + b"\n\n") * 3
    rows, skipped = read("a.txt", data + b"good\n\n" * 400, text_documents="paragraph")
    assert (len(rows), [*skipped.values()]) == (700, [SkippedRows(6, 201)])
    with pytest.raises(UserError, match=r"a\.txt: .*source\.text_documents"):
        read("a.txt", long)
    for csv in (b"text\n" + long, b'text\n"' + b"x\n" * 3000 + b'"\n'):
        with pytest.raises(UserError, match=r"a\.csv"):
            read("a.csv", csv)


def test_row_groups_are_bounded_and_the_bytes_are_the_same_each_time(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GROUP_CHARS", 100)
    last = [{"text": "y" * 1000}, {"text": "z", "url": "u" * 99}, {"text": "z"}]
    data = jsonl([*[{"text": "x" * 40}] * 7, *last])
    read("a.jsonl", data)
    made = (tmp_path / "made.parquet").read_bytes()
    metadata = pq.read_metadata(tmp_path / "made.parquet")
    assert pq.read_schema(tmp_path / "made.parquet").equals(FINEWEB_SCHEMA)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [3, 3, 2, 1, 1]
    read("a.jsonl", data)
    assert (tmp_path / "made.parquet").read_bytes() == made


def test_the_key_of_a_file_covers_what_its_format_uses() -> None:
    default, other = ReadOptions("text", "file", "utf8"), ReadOptions("text", "line", "utf-16")
    assert default == ReadOptions("text", "file", "UTF-8")
    assert default.key("a.arrow.gz") == other.key("b.arrow.gz")
    names = ("a.jsonl", "a.csv", "a.tsv", "a.txt", "a.arrow", "a.csv.gz", "a.csv.zst")
    assert len({tuple(default.key(name)) for name in names}) == len(names)
    assert default.key("a.jsonl") == ReadOptions("text", "line", "utf-8").key("a.jsonl")
    assert default.key("a.jsonl") != other.key("a.jsonl")
    assert default.key("a.txt") != ReadOptions("text", "line", "utf-8").key("a.txt")
    assert default.key("a.arrow") != ReadOptions("body", "file", "utf-8").key("a.arrow")


def test_the_format_suffix_ignores_case_and_compression() -> None:
    assert module.suffix_of("a/b.v1.JSONL.gz") == ".jsonl"
    assert module.suffix_of("a/b.parquet") == ".parquet"
    assert module.suffix_of("a/b.tar.gz") == ".tar"
    assert module.suffix_of("a/b") == ""
