"""Cut parquet files into chunks of rows, reading only their footers.

One chunk becomes one train shard. The plan depends only on the footers and on ``shard_tokens``, so
the number of workers, their order, retries and nodes cannot change it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.format.manifest import RawManifest, SourceFile
from pipeline.format.parquet import row_groups
from pipeline.format.selection import Selection, unpack
from pipeline.params import errors_of_source

# English web text has about 4.5 bytes per GPT-2 token; this only sets the size of a chunk.
_BYTES_PER_100_TOKENS = 450


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of one source file; tokens [start, stop) of a token file."""

    file_index: int
    """Number of the file among those of its source."""
    file: SourceFile
    start: int
    stop: int
    estimated_tokens: int
    bits: bytes | None = None
    """Which of the rows are kept, packed as in `data/selection`; None: all."""

    def kept(self) -> np.ndarray | None:
        """Return which of the rows are kept: (stop - start,) bool; None: all."""
        return None if self.bits is None else unpack(self.bits, self.stop - self.start)

    @property
    def label(self) -> str:
        """The chunk's name in messages and on Ray's dashboard."""
        return f"{self.file.path}[{self.start}:{self.stop}]"


def cut_rows(groups: Sequence[tuple[int, int]], target_bytes: int) -> list[tuple[int, int]]:
    """Cut a file's rows into ranges of about ``target_bytes`` of text each.

    Args:
        groups: Rows and bytes of each row group; rows of a group are assumed to be equally long.
        target_bytes: Bytes per range, at least 1.

    Returns:
        Consecutive, non-empty ranges (start, stop) of rows that cover the file.
    """
    total = sum(size for _, size in groups)
    count = max(1, (2 * total + target_bytes) // (2 * target_bytes))  # rounded to the nearest
    borders, row, size, nth = [0], 0, 0, 1
    for group_rows, group_size in groups:
        while nth < count and (target := nth * total // count) <= size + group_size:
            borders.append(row + (target - size) * group_rows // max(1, group_size))
            nth += 1
        row, size = row + group_rows, size + group_size
    borders.append(row)
    return [(a, b) for a, b in pairwise(borders) if a < b]


def plan_chunks(
    folder: Path,
    source: RawManifest,
    shard_tokens: int,
    selection: Selection | None = None,
) -> list[Chunk]:
    """Cut every file of text into chunks of about ``shard_tokens`` tokens, in file order.

    Where chunks begin and end does not depend on the rows that are kept: so a row more or less
    changes one chunk.

    Args:
        selection: The rows to keep; None: all.

    Raises:
        UserError: A file is missing or unreadable, or has no text column.
    """
    chunks, numbers = [], source.numbers()
    for index, file in enumerate(source.files):
        if not source.sources[file.source].has_text:
            continue
        with errors_of_source(file.source):
            groups = row_groups(folder / file.path, source.column(file))
        rows, size = sum(rows for rows, _ in groups), sum(size for _, size in groups)
        for start, stop in cut_rows(groups, shard_tokens * _BYTES_PER_100_TOKENS // 100):
            tokens = size * (stop - start) // max(1, rows) * 100 // _BYTES_PER_100_TOKENS
            bits = selection.bits_between(index, start, stop) if selection else None
            chunks.append(Chunk(numbers[file.path], file, start, stop, tokens, bits))
    return chunks
