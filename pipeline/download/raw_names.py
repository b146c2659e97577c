"""Check of the names that a source's files get in `data/raw`, before anything is fetched."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from pipeline.download.ingest import SourceItem, raw_path
from pipeline.download.to_parquet import PARQUET, compression_of, suffix_of
from pipeline.format.foreign_tokens import SUFFIXES
from pipeline.format.manifest import NAME, check_relative
from pipeline.runtime.errors import UserError, printable

_MAX_NAME_BYTES = 255  # of Linux and macOS
_MAX_LINES = 20
_MAX_PATH_BYTES = 2000  # half of what Linux allows: `data/raw` has a path, too


def check_names(items: Sequence[SourceItem]) -> None:
    """Check that all files can be in one folder, also on a file system that ignores case.

    Raises:
        UserError: With one line per file whose name, or whose compression, is impossible.
    """
    owners = {_folded(NAME): NAME}
    for item in items:
        owners.setdefault(_folded(raw_path(item)), item.path)
    lines = [
        f"{printable(item.path)[:300]}: {reason}; rename the file or list it in source.exclude"
        for item in items
        if (reason := next(_faults(item.path, raw_path(item), owners), None)) is not None
    ]
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"and {len(lines) - _MAX_LINES} more files"]
    if lines:
        raise UserError("\n".join(lines))


def _folded(path: str) -> str:
    """Return the path as macOS and Windows compare it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _faults(name: str, path: str, owners: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with a file that is ``path`` in `data/raw`.

    Args:
        owners: Folded path in `data/raw` -> the first file of that path.
    """
    if name != printable(name):
        yield "the name holds control characters, or bytes that are not UTF-8"
    try:
        check_relative(path)
    except ValueError:
        yield "the name is not portable"
    encoded = path.encode(errors="replace")
    if any(len(part) > _MAX_NAME_BYTES for part in encoded.split(b"/")):
        yield f"the name is longer than {_MAX_NAME_BYTES} bytes in data/raw"
    if len(encoded) > _MAX_PATH_BYTES:
        yield f"the path is longer than {_MAX_PATH_BYTES} bytes"
    if compression_of(name) and suffix_of(name) in (*PARQUET, *SUFFIXES):
        yield f"{suffix_of(name)} is not read compressed: decompress it first"
    folded = _folded(path)
    if (other := owners[folded]) != name:
        yield f"{printable(other)} has the same name in data/raw, here or where case is ignored"
    for parent in map(str, PurePosixPath(folded).parents):
        if parent in owners:
            yield f"{printable(owners[parent])} has the name of its folder in data/raw"
