"""What the readers of the text formats share: rows, and the reasons why a row is unusable.

A reader yields, for each row, its number from 1 in the file and either its fields or the reason,
a string, why it is unusable. Other columns than the wanted ones do no harm, whatever they hold.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.format.parquet import FINEWEB_SCHEMA

Rows = Iterator[tuple[int, dict[str, Any] | str]]

METADATA = tuple(name for name in FINEWEB_SCHEMA.names if name != "text")
"""The columns that are kept beside the text."""

LABELS = tuple(name for name in METADATA if FINEWEB_SCHEMA.field(name).type == pa.string())
"""Those of strings."""


def is_encodable(text: str) -> bool:
    """Return whether a text is valid Unicode: it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
