"""The store `.work/`: finished pieces addressed by content, and the folders of unfinished runs.

```
.work/<kind>/<key>/            a piece: its files, and piece.json, which makes it complete
.work/tmp/<kind>-<key>/        a piece being made, renamed into place when it is whole
.work/locks/<kind>-<key>       one flock a key: two experiments never make a piece twice
```

`piece.json` keeps size, mtime and sha256 of each file. A file whose size or mtime differs is
hashed again; a bad piece is discarded and made anew. Outs of DVC stages are hard links to these
files, so a bad file is made writable before it is unlinked: so DVC also replaces its cached object.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, project_root
from pipeline.store import atomic

INDEX = "piece.json"


class Store:
    """Pieces of finished work under one folder."""

    def __init__(self, root: Path, fresh: bool = False) -> None:
        self.root = root
        self.fresh = fresh

    @classmethod
    def open(cls, machine: Machine) -> "Store":
        """The store of this project: `machine.work_dir`, else `.work` beside `dvc.yaml`."""
        root = project_root() / (machine.work_dir or Path(".work")).expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"work_dir: cannot use {root}: {error.strerror}") from None
        store = cls(root.absolute(), machine.fresh)
        store.sweep()
        return store

    def folder(self, kind: str, key: str) -> Path:
        """A working folder that grows under its key, such as a training run's."""
        folder = self.root / kind / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, wait: bool = True) -> Iterator[None]:
        """Hold the key's lock; it is released by the kernel when the process dies.

        Raises:
            UserError: ``wait`` is false and another process holds it.
        """
        path = self.root / "locks" / f"{kind}-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(
                    f"another process works on {kind}/{key[:12]}; wait until it ends"
                ) from None
            yield

    def find(self, kind: str, key: str) -> Path | None:
        """The folder of a complete piece; None where there is none, or its bytes have changed."""
        folder = self.root / kind / key
        index_path = folder / INDEX
        try:
            index = json.loads(index_path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            index = None
        if not _is_index(index):
            _warn_damaged(kind, key, INDEX)
            return None
        touched = False
        for name, entry in index.items():
            try:
                status = (folder / name).stat()
            except FileNotFoundError:
                _warn_damaged(kind, key, name)
                return None
            if (status.st_size, status.st_mtime_ns) == (entry["size"], entry["mtime_ns"]):
                continue
            if atomic.sha256_file(folder / name) != entry["sha256"]:
                _warn_damaged(kind, key, name)
                return None
            entry["mtime_ns"], touched = status.st_mtime_ns, True
        if touched:
            atomic.write_json(index_path, index)
        else:
            os.utime(index_path)  # used now: `--prune --older-than` goes by it
        return folder

    def sha256(self, kind: str, key: str) -> dict[str, str]:
        """The sha256 of each file of a piece that was found, by name, as its index has them."""
        index = json.loads((self.root / kind / key / INDEX).read_text())
        return {name: entry["sha256"] for name, entry in index.items()}

    @contextlib.contextmanager
    def make(self, kind: str, key: str, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Yield an empty folder; what is in it when the block ends well becomes the piece.

        The caller holds the key's lock. A piece that is there already is replaced.

        Args:
            hashes: the sha256 of files, by name, that are known when the block ends.
        """
        temporary = self.root / "tmp" / f"{kind}-{key}"
        shutil.rmtree(temporary, ignore_errors=True)  # a dead process's
        temporary.mkdir(parents=True)
        try:
            yield temporary
            index = {}
            for path in sorted(temporary.iterdir()):
                atomic.fsync_file(path)
                status = path.stat()
                index[path.name] = {
                    "size": status.st_size,
                    "mtime_ns": status.st_mtime_ns,
                    "sha256": (hashes or {}).get(path.name) or atomic.sha256_file(path),
                }
            atomic.write_json(temporary / INDEX, index)
            final = self.root / kind / key
            final.parent.mkdir(parents=True, exist_ok=True)
            self.discard(kind, key)
            os.rename(temporary, final)
            atomic.fsync_folder(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def discard(self, kind: str, key: str) -> None:
        """Remove a piece, if it is there; its files are made writable first (see the module)."""
        folder = self.root / kind / key
        if not folder.exists():
            return
        (folder / INDEX).unlink(missing_ok=True)
        for path in folder.iterdir():
            unlink_bad(path)
        folder.rmdir()

    def sweep(self) -> None:
        """Remove what dead processes left half-made: whatever nobody holds the lock of."""
        for path in (self.root / "tmp").glob("*-*"):
            kind, key = path.name.split("-", 1)
            with contextlib.suppress(UserError), self.lock(kind, key, wait=False):
                shutil.rmtree(path, ignore_errors=True)


def _warn_damaged(kind: str, key: str, name: str) -> None:
    # Left as it is: whoever makes the piece anew, under its lock, replaces it.
    print(f"warning: {kind}/{key[:12]}/{name} in the store is damaged; making it anew")


def _is_index(index: object) -> bool:
    return isinstance(index, dict) and all(
        isinstance(entry, dict) and entry.keys() >= {"size", "mtime_ns", "sha256"}
        for entry in index.values()
    )


def merged_key(chunk_keys: Sequence[str]) -> str:
    """The key of the shard that the validation documents of these chunks are merged into."""
    return atomic.sha256_json(list(chunk_keys))


def unlink_bad(path: Path) -> None:
    """Unlink a damaged file, its inode made writable first.

    DVC trusts a cached object that is read-only; the cache holds the same inode by hard link, and
    mode 0644 makes DVC hash it, find it changed, and replace it.
    """
    path.chmod(0o644)
    path.unlink()


def publish(files: Mapping[str, Path | bytes], out: Path) -> None:
    """Make ``out`` a folder of exactly ``files``: name within it -> file to hard-link, or bytes.

    Where links do not work (another file system) the files are copied. The folder is built under
    a temporary name and put in place by rename.
    """
    temporary, old = (out.with_name(f".{out.name}.{word}") for word in ("new", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    for name, source in files.items():
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            atomic.write_bytes(target, source)
            continue
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
    temporary.mkdir(parents=True, exist_ok=True)
    if out.is_dir() and not out.is_symlink():
        os.rename(out, old)
    else:
        out.unlink(missing_ok=True)
    os.rename(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse work that the disk cannot hold, before it starts.

    Args:
        needed: bytes that the work will write.

    Raises:
        UserError: naming the folder, the bytes needed and the bytes free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "make room, or set work_dir in machine.yaml to a bigger disk"
        )
