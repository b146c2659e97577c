"""Rewriting of parquet files whose row groups are too large to be read in chunks.

pyarrow cannot seek inside a row group: each chunk of `tokenize` would decode all rows of the group
before it. Such a file is rewritten once, with small row groups.
"""

from pathlib import Path

import pyarrow.parquet as pq

from pipeline.format.parquet import decoding, open_parquet, row_groups

# Two chunks of the default tokenize.shard_tokens (20M tokens), at 4.5 bytes per token. A constant,
# so that changing shard_tokens fetches and rewrites nothing.
MAX_GROUP_BYTES = 2 * 20_000_000 * 9 // 2
ROW_GROUP_ROWS = 1_000
_FIX = "write the file again with smaller row groups, or list it in source.exclude"


def has_large_groups(path: Path, column: str) -> bool:
    """Return whether a row group holds more than `MAX_GROUP_BYTES` of text."""
    groups = row_groups(path, column)
    return any(rows > ROW_GROUP_ROWS and size > MAX_GROUP_BYTES for rows, size in groups)


def rewrite(source: Path, name: str, target: Path) -> None:
    """Copy a parquet file with row groups of `ROW_GROUP_ROWS` rows, in bounded memory.

    Args:
        name: The file's name in the source.

    Raises:
        UserError: A column is damaged, or pyarrow cannot write its type.
    """
    with (
        decoding(f"{name}: its large row groups cannot be cut", _FIX),
        open_parquet(source, name, _FIX) as file,
        # Without the Arrow types of `open_parquet`: parquet itself has only one type of strings.
        pq.ParquetWriter(
            target, file.schema_arrow, compression="zstd", store_schema=False
        ) as writer,
    ):
        for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS, use_threads=False):
            writer.write_batch(batch, row_group_size=ROW_GROUP_ROWS)
