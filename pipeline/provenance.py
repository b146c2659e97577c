"""Find the documents in a span of a token stream, and their rows in the source files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import TokenStream
from pipeline.format import tokenizer
from pipeline.format.foreign_tokens import is_token_file
from pipeline.format.manifest import RawManifest
from pipeline.format.parquet import as_binary, is_text, open_parquet
from pipeline.format.shards import read_docs
from pipeline.runtime.errors import UserError

BATCH_ROWS = 256  # rows decoded at a time
FIELDS = ("id", "url", "dump", "date")  # columns of a raw row other than its text


@dataclass(frozen=True, kw_only=True)
class DocumentSpan:
    """A document and its part within a span of the stream; all positions are in the stream.

    Attributes:
        shard: The shard's file name.
        number: Number of the document in its shard, from 0; None before the shard's first.
        path: The source file, relative to `data/raw`; None if unknown.
        row: The row in the source file; None if it has no rows.
        start: The document's first token, its `<|endoftext|>`.
        stop: The token after its last.
        first: Its first token within the span.
        end: The token after its last within the span.
    """

    shard: str
    number: int | None
    path: str | None
    row: int | None
    start: int
    stop: int
    first: int
    end: int


class Documents:
    """The documents of a stream, found in the document indexes of its shards."""

    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream
        self._docs = lru_cache(maxsize=16)(self._read_docs)

    def between(self, first: int, end: int) -> list[DocumentSpan]:
        """Return the documents of the tokens [first, end), in order."""
        spans = []
        while first < end:
            index = int(np.searchsorted(self._stream.starts, first, side="right")) - 1
            span = self._at(index, first, end)
            spans.append(span)
            first = span.end
        return spans

    def tokens(self, span: DocumentSpan) -> np.ndarray:
        """Return all tokens of a span's document."""
        return self._stream[span.start : span.stop]

    def may_be_cut(self, span: DocumentSpan) -> bool:
        """Return whether a split by position may have left only a part of the row's text."""
        if self._stream.manifest.params.get("val_split") != "position":
            return False
        is_train = self._stream.split == "train"
        return span.stop == len(self._stream) if is_train else span.start == 0

    def _at(self, index: int, first: int, end: int) -> DocumentSpan:
        """Return the part, at most to ``end``, of the document at ``first`` in shard ``index``."""
        begin, stop = (int(border) for border in self._stream.starts[index : index + 2])
        starts, rows = self._docs(index).T
        number = int(np.searchsorted(starts, first - begin, side="right")) - 1
        if number + 1 < len(starts):
            stop = begin + int(starts[number + 1])
        row = int(rows[number]) if number >= 0 else -1
        return DocumentSpan(
            shard=self._stream.shards[index].name,
            number=number if number >= 0 else None,
            path=self._path(index, number),
            row=row if row >= 0 else None,
            start=begin + (int(starts[number]) if number >= 0 else 0),
            stop=stop,
            first=first,
            end=min(stop, end),
        )

    def _path(self, index: int, number: int) -> str | None:
        """Return the source file of a document; a shard's parts are runs of documents."""
        parts = self._stream.shards[index].parts
        borders = np.cumsum([part.docs for part in parts[:-1]])
        part = int(np.searchsorted(borders, max(0, number), side="right"))
        return parts[part].path if parts else None

    def _read_docs(self, index: int) -> np.ndarray:
        return read_docs(self._stream.folder / self._stream.shards[index].name)


class RawRows:
    """Rows of `data/raw`, as far as its files are those that the tokens were made from."""

    def __init__(self, folder: Path, source: RawManifest) -> None:
        self._folder = folder
        self._columns = {file.path: source.column(file) for file in source.files}
        try:
            present = {file.path: file.sha256 for file in RawManifest.load(folder).files}
        except UserError:
            present = {}
        self._files = {f.path for f in source.files if present.get(f.path) == f.sha256}

    def get(self, span: DocumentSpan) -> dict[str, Any] | None:
        """Return the text and the `FIELDS` of a span's document; None if unavailable."""
        path, row = span.path, span.row
        if path not in self._files or row is None or is_token_file(path):
            return None
        try:
            column = self._columns[path]
            found = _read_row(self._folder / path, row, column)
        except (UserError, OSError, pa.ArrowException):
            return None
        return {"text": found.pop(column), **found}


def _read_row(path: Path, row: int, column: str) -> dict[str, Any]:
    """Read one row of a parquet file, its text column and `FIELDS`, in bounded memory."""
    with open_parquet(path) as file:
        group, metadata = 0, file.metadata
        while row >= metadata.row_group(group).num_rows:
            row -= metadata.row_group(group).num_rows
            group += 1
        names = file.schema_arrow.names
        columns = [name for name in (column, *FIELDS) if names.count(name) == 1]
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
            if row < batch.num_rows:
                return {name: _as_text(batch.column(name).slice(row, 1)) for name in columns}
            row -= batch.num_rows
    raise UserError(f"{path}: has fewer rows than its footer gives; run `dvc repro` to rebuild it")


def _as_text(value: pa.Array) -> str | None:
    """Return the only value of an array as text; None if it is none and cannot be cast."""
    try:
        value = as_binary(value) if is_text(value.type) else value
        text: str | None = value.cast(pa.large_string())[0].as_py()
        return text
    except pa.ArrowException:
        return None


def decoded(tokens: np.ndarray) -> bytes:
    """Decode tokens to UTF-8 bytes, leaving out `<|endoftext|>`."""
    return tokenizer.decode_bytes([int(token) for token in tokens if token != tokenizer.EOT])
