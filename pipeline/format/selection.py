"""`data/selection`: which rows of `data/raw` are kept, and why each other row was dropped.

```
data/selection/manifest.json           per source file its rows and the rows kept; counts per rule
data/selection/00000.kept.npy          of file 0: a bit per row, least significant first; 1: kept
data/selection/00000.ledger.parquet    of file 0: a row per dropped row, see `LEDGER_SCHEMA`
```

A file of which all rows are kept has neither bits nor a ledger.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format.manifest import NAME, RawManifest, SelectedFile, SelectionManifest
from pipeline.runtime.errors import UserError
from pipeline.store import atomic

SELECTION = Path("data/selection")
PIECES = "selections"
"""The kind of piece in the store that holds the bits and the ledger of a source file."""
LEDGER_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # in the source file, ascending
        ("rule", pa.string()),  # the first rule that dropped the row
        ("value", pa.float64()),  # what decided: a column's value, a measure, a similarity
        ("reason", pa.string()),  # the string that decided: of a column, the name of a task
        ("twin_file", pa.int32()),  # of a duplicate: the number of the kept row's file
        ("twin_row", pa.int64()),
    ]
)

_REBUILD = "run `GPT2_FRESH=1 dvc repro --force curate` to rebuild it"


class Selection:
    """The rows to keep of each source file."""

    def __init__(self, folder: Path, manifest: SelectionManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.kept = lru_cache(maxsize=1)(self._read_kept)

    @classmethod
    def load(cls, folder: Path, source: RawManifest) -> "Selection":
        """Read the selection of a source.

        Raises:
            UserError: It is missing or damaged, or was made for other files.
        """
        manifest = SelectionManifest.load(folder)
        keys = ("source", "path", "sha256", "rows")
        made_for, found = (
            [[getattr(file, key) for key in keys] for file in of.files] for of in (manifest, source)
        )
        if made_for != found:
            raise UserError(
                f"{folder / NAME}: made for other files than data/raw has; run `dvc repro curate`"
            )
        return cls(folder, manifest)

    @property
    def key(self) -> str | None:
        """The selection's key; None if all rows are kept."""
        is_cut = any(file.bits is not None for file in self.manifest.files)
        return self.manifest.selection_key if is_cut else None

    def _read_kept(self, file_index: int) -> np.ndarray | None:
        """Return which rows of a file are kept: (rows,) bool; None: all.

        Raises:
            UserError: The bitmap is missing or damaged.
        """
        file = self.manifest.files[file_index]
        return None if file.bits is None else read_bits(self.folder, file)

    def bits_between(self, file_index: int, start: int, stop: int) -> bytes | None:
        """Return `pack` of the rows [start, stop) of a file; None if all of them are kept."""
        kept = self.kept(file_index)
        if kept is None or kept[start:stop].all():
            return None
        return pack(kept[start:stop]).tobytes()


def selection_key(masks: Iterable[tuple[int, np.ndarray | None]]) -> str:
    """Return a hash of the dropped rows, which does not depend on how rows are cut into files.

    Args:
        masks: Per file its number of rows, and which of them are kept; None: all.
    """
    digest, first = hashlib.sha256(), 0
    for rows, kept in masks:
        if kept is not None:
            digest.update((np.flatnonzero(~kept) + first).astype("<i8").data)
        first += rows
    digest.update(str(first).encode())
    return digest.hexdigest()


def pack(kept: np.ndarray) -> np.ndarray:
    """Pack (n,) bool into bits: (n / 8, rounded up) uint8."""
    return np.packbits(kept, bitorder="little")


def unpack(bits: bytes | np.ndarray, rows: int) -> np.ndarray:
    """Return the (rows,) bool of `pack`."""
    packed = np.frombuffer(bits, np.uint8) if isinstance(bits, bytes) else bits
    return np.unpackbits(packed, count=rows, bitorder="little").view(bool)


def read_bits(folder: Path, file: SelectedFile) -> np.ndarray:
    """Read which rows of a file are kept: (rows,) bool.

    Raises:
        UserError: The bitmap is missing, or does not match the manifest.
    """
    path = folder / str(file.bits)
    try:
        data = atomic.read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_REBUILD}") from None
    try:
        is_same = hashlib.sha256(data).hexdigest() == file.bits_sha256
        bits = np.load(io.BytesIO(data), allow_pickle=False) if is_same else None
    except Exception:  # NumPy's parser raises many types on a damaged header
        bits = None
    if (
        isinstance(bits, np.ndarray)
        and bits.dtype == np.uint8
        and bits.shape == (-(-file.rows // 8),)
    ):
        kept = unpack(bits, file.rows)
        if np.count_nonzero(kept) == file.kept:
            return kept
    raise UserError(f"{path}: damaged; {_REBUILD}")


def read_ledger(folder: Path, file: SelectedFile) -> pa.Table:
    """Read the dropped rows of a file, in `LEDGER_SCHEMA`.

    Raises:
        UserError: The ledger is missing, or does not match the manifest.
    """
    if file.ledger is None:
        return LEDGER_SCHEMA.empty_table()
    path = folder / file.ledger
    try:
        data = atomic.read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_REBUILD}") from None
    if hashlib.sha256(data).hexdigest() == file.ledger_sha256:
        with contextlib.suppress(pa.ArrowException, OSError):
            ledger = pq.read_table(pa.BufferReader(data), schema=LEDGER_SCHEMA)
            twins = [ledger[name].is_valid() for name in ("twin_file", "twin_row")]
            if not ledger["row"].null_count + ledger["rule"].null_count and twins[0] == twins[1]:
                return ledger
    raise UserError(f"{path}: damaged; {_REBUILD}")
