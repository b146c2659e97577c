"""A parquet file as it came: is there text in it, and can it be cut into chunks?

pyarrow cannot seek inside a row group. A file whose row groups hold much more text than a chunk is
therefore written anew in small ones, once: else each of its chunks would decode all before it.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime.errors import UserError

# Two chunks of `tokenize.shard_tokens` as the real run has it, 20M tokens, at 4.5 bytes a token.
# A constant, so that another shard size fetches and rewrites nothing.
MAX_GROUP_BYTES = 2 * 20_000_000 * 9 // 2
ROW_GROUP_ROWS = 1_000

_BUFFER_BYTES = 1 << 20


def inspect(path: Path, name: str, column: str) -> int:
    """The rows of a file, from its footer, once it is certain that they can be tokenized.

    Args:
        name: what the file is called in messages.
        column: the text column.

    Raises:
        UserError: the footer is not readable, there are no rows, or no such column of text.
    """
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: not readable as parquet ({reason}); leave it out, or name another source"
        ) from None
    if column not in schema.names:
        raise UserError(
            f"{name}: no column {column!r}; set source.text_column to one of its columns: "
            f"{', '.join(schema.names)}"
        )
    kind = schema.field(column).type
    # Bytes are taken for UTF-8; documents that are not are counted by tokenize.
    if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        raise UserError(
            f"{name}: column {column!r} holds {kind}, not strings; set source.text_column to one "
            f"of its columns: {', '.join(schema.names)}"
        )
    if not metadata.num_rows:
        raise UserError(f"{name}: no rows in it; leave it out, or name another source")
    return int(metadata.num_rows)


def is_coarse(path: Path) -> bool:
    """Whether a row group holds more than `MAX_GROUP_BYTES` in a column."""
    metadata = pq.read_metadata(path)
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(i).total_uncompressed_size for i in range(group.num_columns))
        if group.num_rows > ROW_GROUP_ROWS and max(columns, default=0) > MAX_GROUP_BYTES:
            return True
    return False


def recut(source: Path, target: Path) -> None:
    """Write a parquet file anew in row groups of `ROW_GROUP_ROWS`, in memory that they bound."""
    with (
        pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file,
        pq.ParquetWriter(target, file.schema_arrow, compression="zstd") as writer,
    ):
        for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS, use_threads=False):
            writer.write_batch(batch, row_group_size=ROW_GROUP_ROWS)
