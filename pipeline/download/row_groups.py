"""Rewriting of parquet files whose row groups are too large to be read in chunks.

pyarrow cannot seek inside a row group: each chunk of `tokenize` would decode all rows of the group
before it. Such a file is rewritten once, with small row groups.
"""

from pathlib import Path

import pyarrow.parquet as pq

from pipeline.format.parquet import open_parquet

# Two chunks of the default tokenize.shard_tokens (20M tokens), at 4.5 bytes per token. A constant,
# so that changing shard_tokens fetches and rewrites nothing.
MAX_GROUP_BYTES = 2 * 20_000_000 * 9 // 2
ROW_GROUP_ROWS = 1_000


def has_large_groups(path: Path) -> bool:
    """Return whether a row group holds more than `MAX_GROUP_BYTES` in one column."""
    metadata = pq.read_metadata(path)
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(i).total_uncompressed_size for i in range(group.num_columns))
        if group.num_rows > ROW_GROUP_ROWS and max(columns, default=0) > MAX_GROUP_BYTES:
            return True
    return False


def rewrite(source: Path, target: Path) -> None:
    """Copy a parquet file with row groups of `ROW_GROUP_ROWS` rows, in bounded memory."""
    with (
        open_parquet(source) as file,
        pq.ParquetWriter(target, file.schema_arrow, compression="zstd") as writer,
    ):
        for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS, use_threads=False):
            writer.write_batch(batch, row_group_size=ROW_GROUP_ROWS)
