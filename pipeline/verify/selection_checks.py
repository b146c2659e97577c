"""Checks of `data/selection`: bitmaps, ledgers, the twins that the ledgers name, and the counts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.format.manifest import NAME, SelectedFile, SelectionManifest
from pipeline.format.selection import Selection, read_bits, read_ledger, selection_key
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from pipeline.verify.checks import Fault, Findings

# Validation rows are decided first, so a training row can be dropped for a later one. Then all rows
# of the same text have this twin.
_MAY_BE_LATER = ["validation_copies", "exact_duplicates"]


def check_selection(folder: Path, selection: Selection) -> list[Fault]:
    """Check what needs no ledger: file names, the number of rows kept, and the selection's key."""
    manifest, faults = selection.manifest, []
    known = {NAME, *(name for file in manifest.files for name in _names(file))}
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).as_posix() not in known:
            faults.append(Fault(path, "not in the manifest"))
    if sum(manifest.dropped.values()) != sum(f.rows - f.kept for f in manifest.files):
        faults.append(Fault(folder / NAME, "dropped does not add up to the rows that are not kept"))
    try:
        masks = [(file.rows, selection.kept(i)) for i, file in enumerate(manifest.files)]
    except UserError:
        return faults  # `check_selected_file` names the bitmap
    if selection_key(masks) != manifest.selection_key:
        faults.append(Fault(folder / NAME, "its selection_key does not match the bitmaps"))
    return faults


def _names(file: SelectedFile) -> list[str]:
    return [name for name in (file.bits, file.ledger) if name is not None]


def check_selected_file(folder: Path, index: int) -> Findings:
    """Check the bitmap and the ledger of one source file: a task.

    The rows of the ledger are those that are not kept. A twin is a kept row, and comes before,
    except under the rules of `_MAY_BE_LATER`.
    """
    manifest = SelectionManifest.load(folder)
    file = manifest.files[index]
    faults = []
    for name, expected in ((file.bits, file.bits_sha256), (file.ledger, file.ledger_sha256)):
        path = folder / str(name)
        try:
            found = atomic.sha256_file(path)
        except OSError as error:
            faults.append(Fault(path, f"cannot be read ({error.strerror})"))
            continue
        if found != expected:
            faults.append(Fault(path, f"sha256 is {found}, expected {expected}"))
    if faults:
        return Findings(faults)
    try:
        kept, ledger = read_bits(folder, file), read_ledger(folder, file)
        problem = _check_ledger(folder, manifest.files, index, kept, ledger)
    except UserError as error:  # a bitmap, perhaps of another file
        problem = str(error)
    if problem is not None:
        return Findings([Fault(folder / str(file.ledger), problem)])
    counts = pc.value_counts(ledger["rule"].combine_chunks()).to_pylist()
    return Findings(dropped=Counter({entry["values"]: entry["counts"] for entry in counts}))


def _check_ledger(
    folder: Path, files: Sequence[SelectedFile], index: int, kept: np.ndarray, ledger: pa.Table
) -> str | None:
    """Return what is wrong with the ledger of a file, or None."""
    rows = ledger["row"].to_numpy()
    if not np.array_equal(rows, np.flatnonzero(~kept)):
        return "its rows are not those that the bitmap drops"
    twins = ledger.filter(pc.is_valid(ledger["twin_file"]))
    twin_files, twin_rows = twins["twin_file"].to_numpy(), twins["twin_row"].to_numpy()
    is_earlier = (twin_files < index) | (
        (twin_files == index) & (twin_rows < twins["row"].to_numpy())
    )
    may_be_later = pc.is_in(twins["rule"], pa.array(_MAY_BE_LATER)).to_numpy()
    if not (is_earlier | may_be_later).all():
        return "names a twin that is not an earlier row"
    for number in np.unique(twin_files).tolist():
        named = twin_rows[twin_files == number]
        if not 0 <= number < len(files) or named.min() < 0 or named.max() >= files[number].rows:
            return f"names a twin in file {number} that does not exist"
        if files[number].bits is not None and not read_bits(folder, files[number])[named].all():
            return f"names a twin in {files[number].path} that is not kept"
    return None
