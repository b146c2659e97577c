"""Property tests of the conversion: random corpora in each format, whole and damaged."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.download.to_parquet import ReadOptions, SkippedRows, to_parquet
from pipeline.runtime.errors import UserError
from tests.pipeline.download.test_to_parquet import COMPRESS, arrow

Texts = list["str | None"]


def convert(
    name: str, data: bytes, text_documents: str = "file", encoding: str = "utf-8"
) -> tuple[Texts, dict[str, SkippedRows]]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "made.parquet")
        source.write_bytes(data)
        options = ReadOptions("text", text_documents, encoding)
        skipped = to_parquet(source, name, options, target)
        return pq.read_table(target).column("text").to_pylist(), skipped


# Characters that some reader takes for an end of line or field, or cannot write.
TEXTS = st.lists(
    st.text(st.one_of(st.sampled_from('\0\r\n\t",\\ \u0085\u2028\ufeff😀'), st.characters()))
    .filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)),
    max_size=6,
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)
CODECS = st.sampled_from(list(COMPRESS))
UNICODE = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "gb18030"])
LINE_ENDS = st.sampled_from(["\n", "\r\n"])


def without_nul(texts: list[str], encoding: str) -> list[str]:
    """Return texts that are not taken for UTF-16, nor their mark and a NUL for one of UTF-32."""
    return texts if encoding == "utf-16-le" else [text.replace("\0", "") for text in texts]


@settings(max_examples=15)
@given(st.data(), TEXTS, CODECS, UNICODE, LINE_ENDS)
def test_json_of_any_kind(
    data: st.DataObject, texts: list[str], codec: str, encoding: str, end: str
) -> None:
    nulls: Texts = [text or data.draw(st.sampled_from(["", None])) for text in texts]
    others = st.dictionaries(st.text(max_size=3).filter(lambda key: key != "text"), VALUES)
    rows = [{**data.draw(others), "text": text, **data.draw(others)} for text in nulls]
    ascii_only = data.draw(st.booleans())
    if data.draw(st.booleans()):
        content, name = json.dumps(rows, ensure_ascii=ascii_only, indent=1), "a.json"
    else:
        lines = [json.dumps(row, ensure_ascii=ascii_only) + end for row in rows]
        content = "".join(itertools.chain.from_iterable((end, line) for line in lines))
        names = ["a.jsonl", "a.NDJSON"] if len(rows) == 1 else ["a.jsonl", "a.json", "a.NDJSON"]
        name = data.draw(st.sampled_from(names))
    # A lone surrogate in another field cannot be written in an encoding.
    encoded = COMPRESS[codec](content.encode(encoding, "replace"))
    assert convert(name + codec, encoded, encoding=encoding) == (nulls, {})


@settings(max_examples=40)
@given(st.data(), TEXTS, CODECS, UNICODE, LINE_ENDS)
def test_csv_and_tsv_of_any_kind(
    data: st.DataObject, texts: list[str], codec: str, encoding: str, end: str
) -> None:
    sep = data.draw(st.sampled_from(["", ","]))
    texts = without_nul(texts, encoding)
    if data.draw(st.booleans()):
        texts = [text.replace("\0", "") for text in texts]  # Python 3.10 cannot read NUL
        out = io.StringIO()
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator=sep + end)
        writer.writerows([["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
        name, content = "a.csv", out.getvalue()
    else:
        texts = [text.translate({9: " ", 10: " "}) for text in texts]
        rows = [["text", "id"], *([text, "1"] for text in texts)]
        sep = sep.replace(",", "\t")
        name, content = "a.tsv", "".join("\t".join(row) + sep + end for row in rows)
    encoded = COMPRESS[codec](content.encode(encoding))
    assert convert(name + codec, encoded, encoding=encoding) == (texts, {})


@settings(max_examples=40)
@given(TEXTS, CODECS, UNICODE, LINE_ENDS, st.booleans(), st.sampled_from(["line", "paragraph"]))
def test_txt_of_any_kind(
    texts: list[str], codec: str, encoding: str, end: str, is_ended: bool, documents: str
) -> None:
    texts = [text.replace("\ufeff", "") for text in texts]  # the first one is a mark
    texts = without_nul(texts, encoding)
    if documents == "line":
        texts = [text.replace("\n", " ").rstrip("\r") for text in texts]
        content = "".join(text + end for text in texts)
        if not is_ended and texts and texts[-1]:
            content = content.removesuffix(end)
    else:
        texts = [f"{text}." for text in texts]
        texts = ["\n".join(filter(str.strip, text.split("\n"))) for text in texts]
        content = (end + " " + end).join(texts) + end * is_ended
        texts = [text for text in texts if text.encode().strip()]
    encoded = COMPRESS[codec](content.encode(encoding))
    assert convert(f"a.txt{codec}", encoded, documents, encoding) == (texts, {})
    whole = [content] if content else []
    assert convert(f"a.txt{codec}", encoded, "file", encoding) == (whole, {})


@settings(max_examples=30)
@given(
    TEXTS,
    CODECS,
    st.booleans(),
    st.sampled_from(["string", "binary", "large_string", "string_view", "binary_view", "category"]),
)
def test_arrow_of_any_kind(texts: list[str], codec: str, is_file: bool, kind: str) -> None:
    array = pa.array(texts, pa.string())
    array = array.dictionary_encode() if kind == "category" else array.cast(kind)
    table = pa.table({"other": [[{"a": 1}]] * len(texts), "text": array})
    encoded = COMPRESS[codec](arrow(table, is_file))
    assert convert(f"a.arrow{codec}", encoded) == (texts, {})


LARGE: Texts = [f"{i} " + "some words of a text, " * (i % 50) for i in range(20_000)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.txt", "a.arrow"])
def test_files_over_10_mb(name: str) -> None:
    """The other fields change their types after 10 MB."""
    out = io.StringIO()
    if name.startswith("a.jsonl"):
        for i, text in enumerate(LARGE):
            more: dict[str, Any] = {"score": i} if i < 19_000 else {"score": [1.5], "new": None}
            out.write(json.dumps({"text": text, **more}) + "\n")
    elif name == "a.csv":
        csv.writer(out).writerows([["text", "n"], *([t, i] for i, t in enumerate(LARGE))])
    else:
        out.write("text\n" * (name == "a.tsv") + "".join(f"{text}\n" for text in LARGE))
    data = arrow(pa.table({"text": LARGE})) if name == "a.arrow" else out.getvalue().encode()
    assert len(data) > 10_000_000
    data = gzip.compress(data, 1) if name.endswith(".gz") else data
    assert convert(name, data, "line") == (LARGE, {})


RANDOM = random.Random(0)
CORPUS = [f"{i} " + "".join(RANDOM.choices("abcdefghij \n", k=60)) for i in range(150)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in CORPUS).encode()
WHOLE = {codec: COMPRESS[codec](LINES) for codec in COMPRESS}
PLACE = st.integers(0, 1 << 20)


@settings(max_examples=100)
@given(st.sampled_from([codec for codec in COMPRESS if codec]), PLACE, PLACE, PLACE, PLACE)
def test_damage_to_a_compressed_file_is_an_error_or_none(
    codec: str, kind: int, a: int, b: int, size: int
) -> None:
    data = bytearray(WHOLE[codec])
    a, b, size = a % len(data), b % len(data), 1 + size % 64
    if kind % 3 == 0:
        del data[a:]
        with pytest.raises(UserError, match=r"a\.jsonl"):
            convert(f"a.jsonl{codec}", bytes(data))
        return
    if kind % 3 == 1:
        data[a] ^= 1 << b % 8
    else:
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    with contextlib.suppress(UserError):
        assert convert(f"a.jsonl{codec}", bytes(data)) == (CORPUS, {})


@settings(max_examples=50)
@given(PLACE)
def test_json_lines_that_are_cut_short_have_the_first_documents(size: int) -> None:
    """A cut between two lines leaves no trace; one within a line costs that line."""
    data = LINES[: size % len(LINES)]
    whole = data.count(b"\n") + data.endswith(b"}")
    with contextlib.suppress(UserError):
        texts, skipped = convert("a.jsonl", data)
        assert texts == CORPUS[:whole]
        assert sum(rows.count for rows in skipped.values()) == (data[-1:] not in b"}\n")
        return
    assert whole < 100
