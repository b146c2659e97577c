"""Ingestion of one source file into the store: fetch it, check it, convert it if necessary.

```
.work/partial/<identity>/      an unfinished download (see partial_file.py)
.work/files/<sha256>/          data.parquet, or data.bin or data.npy for tokens, as in `data/raw`
.work/origins/<identity>/      origin.json: the sha256 of the stored file, if it is not the
                               identity, and what was skipped of the original
```
"""

import contextlib
import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipeline.download import to_parquet
from pipeline.download.partial_file import DATA
from pipeline.download.row_groups import has_large_groups, rewrite
from pipeline.download.to_parquet import ReadOptions, SkippedRows
from pipeline.format.foreign_tokens import is_token_file, open_token_file
from pipeline.format.parquet import NoTextColumn, check_pages, check_text_column
from pipeline.runtime.errors import UserError, printable
from pipeline.store import atomic
from pipeline.store.store import Store

PARQUET_NAME = "data.parquet"
_ORIGIN = "origin.json"
_CHANGED = "the file changed while it was read; run the same command again"


class SourceItem(Protocol):
    """A file of a source, which can be fetched."""

    @property
    def path(self) -> str:
        """The path in the source, and in `data/raw`."""

    @property
    def size(self) -> int:
        """Bytes that `fetch` makes; an estimate will do: for progress, disk space, max_bytes."""

    @property
    def identity(self) -> str:
        """A name for the bytes, known before they are fetched: their sha256 or another key.

        It holds a version where `fetch` makes the bytes itself.
        """

    @property
    def local_path(self) -> Path | None:
        """The path of a local file, which all nodes must see; None for a remote file."""

    def fetch(self, folder: Path, patience: float) -> tuple[Path, str]:
        """Make the bytes available locally, and return their path and sha256.

        Args:
            folder: A folder for an unfinished download, which survives the process.
            patience: Seconds without a new byte after which to give up.
        """


@dataclass(frozen=True)
class StoredFile:
    """A source file in the store."""

    sha256: str
    origin: str | None = None
    """The sha256 of the original file, if the stored one was converted or rewritten from it."""
    skipped: dict[str, SkippedRows] = field(default_factory=dict)
    """Lines or rows of the original that are not in the stored file, by reason."""


class FaultyFile(UserError):
    """A fault of one source file, which says nothing about the others."""


def item_key(item: SourceItem, options: ReadOptions) -> str:
    """Return the store key of an item; for a file to be converted it covers the options."""
    if _is_used_as_is(item.path):
        return item.identity
    return atomic.sha256_json([item.identity, *options.key(item.path), to_parquet.VERSION])


def raw_path(item: SourceItem) -> str:
    """Return the path of the item's file in `data/raw`."""
    return item.path if _is_used_as_is(item.path) else f"{item.path}.parquet"


def _is_used_as_is(path: str) -> bool:
    return is_token_file(path) or to_parquet.suffix_of(path) in to_parquet.PARQUET


def stored_path(store: Store, file: str, sha256: str) -> Path:
    """Return the path in the store of a file of `data/raw`."""
    return store.path("files", sha256) / stored_name(file)


def stored_name(file: str) -> str:
    """Return the name in its piece of the store of a file of `data/raw`."""
    return f"data{PurePosixPath(file.lower()).suffix}" if is_token_file(file) else PARQUET_NAME


def partial_sizes(store: Store) -> dict[str, int]:
    """Return key -> bytes of the unfinished downloads, of this run and of earlier ones."""
    sizes = {}
    for path in (store.root / "partial").glob(f"*/{DATA}"):
        with contextlib.suppress(FileNotFoundError):  # finished in this moment
            sizes[path.parent.name] = path.stat().st_size
    return sizes


def remove_partial(item: SourceItem, options: ReadOptions, store: Store) -> None:
    """Remove what a process has left that was killed after it had stored the file."""
    shutil.rmtree(store.root / "partial" / item_key(item, options), ignore_errors=True)


def find_stored(item: SourceItem, options: ReadOptions, store: Store) -> StoredFile | None:
    """Return an item's file in the store; None if it must be fetched."""
    key = item_key(item, options)
    if (folder := store.find("origins", key)) is not None:
        origin = json.loads((folder / _ORIGIN).read_text())
        skipped = {
            reason: SkippedRows(**rows) for reason, rows in origin.pop("skipped", {}).items()
        }
        stored = StoredFile(**origin, skipped=skipped)
    else:
        stored = StoredFile(key)
    return stored if store.find("files", stored.sha256) is not None else None


def ingest_or_fault(
    item: SourceItem, options: ReadOptions, store: Store, patience: float
) -> StoredFile | FaultyFile:
    """Call `ingest` as a task that returns a file's fault: if raised, it would end the run."""
    try:
        return ingest(item, options, store, patience)
    except FaultyFile as fault:
        return fault


def ingest(item: SourceItem, options: ReadOptions, store: Store, patience: float) -> StoredFile:
    """Fetch a file, check it, and add it to the store.

    Raises:
        FaultyFile: The file, which is named, is damaged or has no text.
        UserError: A fault that others may have as well: the file cannot be fetched, a remote one
            has no text column; or the disk is full.
    """
    key = item_key(item, options)
    with store.lock("partial", key):
        if not store.fresh and (stored := find_stored(item, options, store)) is not None:
            return stored  # added by another process in the meantime
        folder = store.folder("partial", key)
        try:
            stored = _fetch_and_convert(item, options, store, folder, patience)
            if stored.sha256 != key:
                with store.lock("origins", key), store.make("origins", key) as piece:
                    atomic.write_json(piece / _ORIGIN, asdict(stored))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{item.path}: the disk of {store.root} is full; free some space and run the same "
                "command to resume"
            ) from None
        shutil.rmtree(folder)
    return stored


def _fetch_and_convert(
    item: SourceItem, options: ReadOptions, store: Store, folder: Path, patience: float
) -> StoredFile:
    before = _version(item)
    try:
        path, sha256 = item.fetch(folder, patience)
    except UserError as error:
        if item.local_path is None:
            raise  # the network or the server
        raise FaultyFile(str(error)) from None
    converted = folder / "made.parquet"
    try:
        if is_token_file(item.path):
            open_token_file(path, item.path)
            skipped = None
        else:
            skipped = _to_usable_parquet(path, item.path, options, converted)
    except UserError as error:
        if isinstance(error, NoTextColumn) and item.local_path is None:
            raise  # probably true of all files, which cost much to fetch
        raise FaultyFile(str(error)) from None
    if _version(item) != before:
        raise FaultyFile(f"{item.path}: {_CHANGED}")
    if skipped is None:
        add_to_store(store, path, sha256, stored_name(item.path))
        return StoredFile(sha256)
    stored = StoredFile(atomic.sha256_file(converted), sha256, skipped)
    add_to_store(store, converted, stored.sha256)
    return stored


def _version(item: SourceItem) -> tuple[int, int] | None:
    """Return what changes with a local file."""
    if item.local_path is None or not item.local_path.exists():
        return None
    status = item.local_path.stat()
    return status.st_size, status.st_mtime_ns


def _to_usable_parquet(
    path: Path, name: str, options: ReadOptions, converted: Path
) -> dict[str, SkippedRows] | None:
    """Check a file of text; write ``converted`` from it and return what was skipped, if needed.

    Returns:
        None if the file is used as it is.
    """
    if to_parquet.suffix_of(name) not in to_parquet.PARQUET:
        return to_parquet.to_parquet(path, name, options, converted)
    if not check_text_column(path, name, options.column):
        return None
    check_pages(path, name, options.column)
    if not has_large_groups(path, options.column):
        return None
    rewrite(path, name, converted)
    return {}


def add_to_store(store: Store, path: Path, sha256: str, name: str = PARQUET_NAME) -> None:
    """Add a file of known sha256 to the store as ``name``; a file outside the store is copied."""
    with store.lock("files", sha256):
        if not store.fresh and store.find("files", sha256) is not None:
            return
        # Takes seconds for 2 GB: if done within `make`, a kill would cost the complete file.
        atomic.fsync_file(path)
        with store.make("files", sha256, {name: sha256}) as piece:
            if path.is_relative_to(store.root):
                try:
                    os.link(path, piece / name)  # not renamed: a kill would lose the file
                except OSError:
                    os.rename(path, piece / name)
                return
            # Not linked: DVC would make the user's own file read-only, and the user's changes to it
            # would change the store.
            shutil.copyfile(path, piece / name)
            if atomic.sha256_file(piece / name) != sha256:
                raise FaultyFile(f"{printable(str(path))}: {_CHANGED}")
