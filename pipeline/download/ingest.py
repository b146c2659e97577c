"""A source file, wherever it lies, as a piece of the store.

```
.work/partial/<identity>/      a file that arrives (see partial.py)
.work/files/<sha256>/          data.parquet (tokens: data.bin, data.npy), as `data/raw` has it
.work/origins/<identity>/      origin.json: the sha256 of the file that came of it, where the
                               identity is not that sha256 itself
```
"""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipeline.download import to_parquet
from pipeline.download.partial_file import DATA
from pipeline.download.row_groups import inspect, is_coarse, recut
from pipeline.format.foreign_tokens import is_token_file, open_token_file
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from pipeline.store.store import Store

PIECE = "data.parquet"
_NOTE = "origin.json"


class Item(Protocol):
    """A file of a source."""

    @property
    def path(self) -> str:
        """Its path in the source, below which it lies in `data/raw`."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def identity(self) -> str:
        """What its bytes are known by before they are had: a sha256, or a name of our own."""

    @property
    def here(self) -> Path | None:
        """The file itself, where it lies on a disk of this machine."""

    def space(self, folder: Path) -> int:
        """Bytes that it takes up on the disk of ``folder`` when it is had there."""

    def fetch(self, folder: Path, patience: float) -> tuple[Path, str]:
        """Have its bytes here: their path and sha256; ``folder`` survives the process."""


@dataclass(frozen=True)
class Kept:
    """A file in the store."""

    sha256: str
    origin: str | None = None
    """The sha256 of what it was made from, where it was not taken as it was."""


def key_of(item: Item, column: str) -> str:
    """The key of what comes of an item; that of a converted file also names the column."""
    if _is_taken(item.path):
        return item.identity
    return atomic.sha256_json([item.identity, column, to_parquet.VERSION])


def published_path(item: Item) -> str:
    """Where the item's file lies in `data/raw`."""
    return item.path if _is_taken(item.path) else f"{item.path}.parquet"


def _is_taken(path: str) -> bool:
    """Whether a file is taken as it is; else it becomes parquet."""
    return is_token_file(path) or to_parquet.suffix_of(path) in to_parquet.PARQUET


def piece_path(store: Store, file: str, sha256: str) -> Path:
    """Where the bytes of a file of `data/raw` lie in the store."""
    return store.root / "files" / sha256 / _name_in_piece(file)


def _name_in_piece(file: str) -> str:
    return f"data{PurePosixPath(file.lower()).suffix}" if is_token_file(file) else PIECE


def arrived(item: Item, column: str, store: Store) -> int:
    """How many bytes of an item have been fetched, by this run or one before."""
    try:
        return (store.root / "partial" / key_of(item, column) / DATA).stat().st_size
    except FileNotFoundError:
        return 0


def find(item: Item, column: str, store: Store) -> Kept | None:
    """What the store has of an item; None where it is to be fetched."""
    key = key_of(item, column)
    if (folder := store.find("origins", key)) is not None:
        kept = Kept(**json.loads((folder / _NOTE).read_text()))
    else:
        kept = Kept(key)
    return kept if store.find("files", kept.sha256) is not None else None


def bring(item: Item, column: str, store: Store, patience: float) -> Kept:
    """Fetch a file and make it a piece of the store, whole and checked.

    Raises:
        UserError: naming the file, where it cannot be had or holds no text.
    """
    key = key_of(item, column)
    with store.lock("partial", key):
        if not store.fresh and (kept := find(item, column, store)) is not None:
            return kept  # made by another run in the meantime
        folder = store.folder("partial", key)
        try:
            kept = _settle(item, column, store, folder, patience)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{item.path}: the disk of {store.root} is full; make room, and run it again"
            ) from None
        if kept.sha256 != key:
            _note(store, key, kept)
        shutil.rmtree(folder)
    return kept


def _settle(item: Item, column: str, store: Store, folder: Path, patience: float) -> Kept:
    path, sha256 = item.fetch(folder, patience)
    made = folder / "made.parquet"
    if is_token_file(item.path):
        open_token_file(path, item.path)
        keep(store, path, sha256, _name_in_piece(item.path))
        return Kept(sha256)
    if to_parquet.suffix_of(item.path) not in to_parquet.PARQUET:
        to_parquet.to_parquet(path, item.path, column, made)
        inspect(made, item.path, column)
    else:
        inspect(path, item.path, column)
        if not is_coarse(path):
            keep(store, path, sha256)
            return Kept(sha256)
        recut(path, made)
    kept = Kept(atomic.sha256_file(made), origin=sha256)
    keep(store, made, kept.sha256)
    return kept


def keep(store: Store, path: Path, sha256: str, name: str = PIECE) -> None:
    """Make a file of known sha256 a piece; one that is not the store's own stays where it is.

    Args:
        name: what it is called within the piece.
    """
    with store.lock("files", sha256):
        if not store.fresh and store.find("files", sha256) is not None:
            return
        # Of 2 GB this takes seconds, and a kill in the midst of `make` costs the whole file.
        atomic.fsync_file(path)
        with store.make("files", sha256, {name: sha256}) as piece:
            if path.is_relative_to(store.root):
                try:
                    os.link(path, piece / name)  # not moved: a kill before the end would lose it
                except OSError:
                    os.rename(path, piece / name)
                return
            # The user's own file is copied: DVC would make a link of it read-only, and a change in
            # it would be one in the store.
            shutil.copyfile(path, piece / name)
            if atomic.sha256_file(piece / name) != sha256:
                raise UserError(f"{path}: it changed while it was copied; run again")


def _note(store: Store, key: str, kept: Kept) -> None:
    with store.lock("origins", key), store.make("origins", key) as piece:
        atomic.write_json(piece / _NOTE, {"sha256": kept.sha256, "origin": kept.origin})
