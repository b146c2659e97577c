"""Write `data/selection`: bitmaps and ledgers as pieces of the store, then the manifest."""

import hashlib
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curate.decisions import Decisions, split_ledger
from pipeline.curate.examples import examples
from pipeline.format.manifest import NAME, RawManifest, SelectedFile, SelectionManifest
from pipeline.format.selection import PIECES, pack, selection_key
from pipeline.params import CurateParams
from pipeline.store import atomic
from pipeline.store.store import Store, publish

_MEASURED = "measured"  # lists the pieces that a selection was decided from, for `--prune`


def write_all_kept(out: Path, source: RawManifest) -> SelectionManifest:
    """Publish a selection that keeps every row."""
    files = [_all_kept(source, index) for index in range(len(source.files))]
    manifest = SelectionManifest(
        selection_key=selection_key((file.rows, None) for file in files),
        params={},
        files=files,
    )
    return _publish(out, manifest, {})


def write_selection(
    raw: Path,
    out: Path,
    source: RawManifest,
    params: CurateParams,
    decisions: Decisions,
    found: dict[str, Any],
    unclean_tasks: dict[str, int | None],
    task_files: dict[str, str],
    pieces: Sequence[tuple[str, str]],
    store: Store,
) -> SelectionManifest:
    """Publish the decisions on the rows of ``raw`` in ``out``.

    Args:
        found: What was only counted.
        unclean_tasks, task_files: See `SelectionManifest`.
        pieces: Kind and key of the pieces that the decisions were made from. They depend on the
            code, so they are not listed in the selection, which would change without its rows.
    """
    sizes = [file.rows for file in source.files]
    starts = np.cumsum([0, *sizes]).tolist()
    masks = [decisions.kept[a:b] for a, b in pairwise(starts)]
    files, links, made = [], {}, []
    ledger = decisions.ledger()
    for index, part in enumerate(split_ledger(ledger, [*decisions.counts], sizes)):
        file = _all_kept(source, index)
        if len(part):
            key, hashes = _store(index, masks[index], part, store)
            made.append((PIECES, key))
            links.update({name: store.path(PIECES, key) / name for name in hashes})
            (bits, bits_sha256), (table, table_sha256) = hashes.items()
            file = file.model_copy(
                update={
                    "kept": file.rows - len(part),
                    "bits": bits,
                    "bits_sha256": bits_sha256,
                    "ledger": table,
                    "ledger_sha256": table_sha256,
                }
            )
        files.append(file)
    manifest = SelectionManifest(
        selection_key=selection_key(zip(sizes, masks, strict=True)),
        params=params.applied,
        files=files,
        dropped=decisions.counts,
        found=found,
        unclean_tasks=unclean_tasks,
        task_files=task_files,
        examples=examples(ledger, [*decisions.counts], source, raw),
        pieces=made,
    )
    key = manifest.selection_key
    with store.lock(_MEASURED, key), store.make(_MEASURED, key) as folder:
        (folder / "pieces.json").write_bytes(atomic.json_bytes({"pieces": [*map(list, pieces)]}))
    return _publish(out, manifest, links)


def _all_kept(source: RawManifest, index: int) -> SelectedFile:
    file = source.files[index]
    return SelectedFile(
        source=file.source, path=file.path, sha256=file.sha256, rows=file.rows, kept=file.rows
    )


def _store(
    index: int, kept: np.ndarray, ledger: pa.Table, store: Store
) -> tuple[str, dict[str, str]]:
    """Put a file's bits and ledger into the store; return the piece's key, and sha256 by name."""
    bits, table = io.BytesIO(), io.BytesIO()
    np.save(bits, pack(kept))
    pq.write_table(ledger, table, compression="zstd", write_page_checksum=True)
    contents = {
        f"{index:05d}.kept.npy": bits.getvalue(),
        f"{index:05d}.ledger.parquet": table.getvalue(),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    key = atomic.sha256_json(hashes)
    with store.lock(PIECES, key):
        if store.fresh or store.find(PIECES, key) is None:
            with store.make(PIECES, key, hashes) as folder:
                for name, data in contents.items():
                    (folder / name).write_bytes(data)
    return key, hashes


def _publish(out: Path, manifest: SelectionManifest, links: dict[str, Path]) -> SelectionManifest:
    sealed = atomic.sealed(manifest.model_dump(mode="json"))
    publish({**links, NAME: atomic.json_bytes(sealed)}, out)
    return manifest
