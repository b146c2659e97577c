"""From tokens back to documents: which a span of the stream holds, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import TokenStream
from pipeline.format import tokenizer
from pipeline.format.manifest import RawManifest
from pipeline.format.parquet import open_parquet
from pipeline.format.shards import read_docs
from pipeline.runtime.errors import UserError

BATCH_ROWS = 256  # decoded at a time
FIELDS = ("id", "url", "dump", "date")  # of a raw row, beside its text


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A document, and the part of it that a span of the stream holds; positions in the stream.

    Attributes:
        shard: The file that holds it.
        number: Of the document in its shard, from 0; None before the shard's first.
        path: The source file, below `data/raw`; None where it is not known.
        row: Of that file; None where it has no rows.
        start: The document's first token, its `<|endoftext|>`.
        stop: After its last token.
        first: The first of its tokens in the span.
        end: After the last of its tokens in the span.
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
    """The documents of a stream, by the sidecars of its shards."""

    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream
        self._starts = lru_cache(maxsize=16)(self._read_starts)

    def between(self, first: int, end: int) -> list[Piece]:
        """The documents of the tokens [first, end), in order."""
        pieces = []
        while first < end:
            index = int(np.searchsorted(self._stream.starts, first, side="right")) - 1
            piece = self._at(index, first, end)
            pieces.append(piece)
            first = piece.end
        return pieces

    def tokens(self, piece: Piece) -> np.ndarray:
        """All tokens of a piece's document."""
        return self._stream[piece.start : piece.stop]

    def _at(self, index: int, first: int, end: int) -> Piece:
        """The piece that begins at ``first``, in shard ``index``."""
        begin, stop = (int(border) for border in self._stream.starts[index : index + 2])
        starts, rows = self._starts(index)
        number = int(np.searchsorted(starts, first - begin, side="right")) - 1
        if number + 1 < len(starts):
            stop = begin + int(starts[number + 1])
        row = int(rows[number]) if number >= 0 else -1
        return Piece(
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
        """The source file of a document: a shard's parts are runs of whole documents."""
        parts = self._stream.shards[index].parts
        borders = np.cumsum([part.docs for part in parts[:-1]])
        part = int(np.searchsorted(borders, max(0, number), side="right"))
        return parts[part].path if parts else None

    def _read_starts(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """First tokens and rows of a shard's documents, each (docs,) int64."""
        docs = read_docs(self._stream.folder / self._stream.shards[index].name)
        return docs[:, 0], docs[:, 1]


class RawRows:
    """Rows of `data/raw`, where it is here and is what the tokens were made from."""

    def __init__(self, folder: Path, made_from: RawManifest) -> None:
        self._folder = folder
        self._column = made_from.text_column
        try:
            here = {file.path: file.sha256 for file in RawManifest.load(folder).files}
        except UserError:
            here = {}
        self._files = {f.path for f in made_from.files if here.get(f.path) == f.sha256}

    def get(self, piece: Piece) -> dict[str, Any] | None:
        """The text and the `FIELDS` of a piece's document; None where they cannot be had."""
        if piece.path not in self._files or piece.row is None:
            return None
        if not piece.path.endswith(".parquet"):
            return None
        try:
            found = _read_row(self._folder / piece.path, piece.row, self._column)
        except UserError:
            return None
        return {"text": found.pop(self._column), **found}


def _read_row(path: Path, row: int, column: str) -> dict[str, Any]:
    """One row of a parquet file: its text column and `FIELDS`, in bounded memory."""
    with open_parquet(path) as file:
        group, metadata = 0, file.metadata
        while row >= metadata.row_group(group).num_rows:
            row -= metadata.row_group(group).num_rows
            group += 1
        columns = [n for n in (column, *FIELDS) if n in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
            if row < batch.num_rows:
                found: dict[str, Any] = batch.slice(row, 1).to_pylist()[0]
                return found
            row -= batch.num_rows
    raise UserError(f"{path}: has fewer rows than its footer says")


def decoded(tokens: np.ndarray) -> bytes:
    """The bytes of the text behind tokens; `<|endoftext|>` has none."""
    return tokenizer.decode_bytes([int(token) for token in tokens if token != tokenizer.EOT])
