"""The store `.work/`: finished pieces addressed by content, and folders of unfinished runs.

```
.work/<kind>/<key>/            a piece: its files, and piece.json, written last
.work/tmp/<kind>-<key>/        a piece being made, renamed into place when complete
.work/locks/<kind>-<key>       one flock per key, so that no piece is made twice at a time
```

`piece.json` records size, mtime and sha256 of each file, and its own hash. A file that is small, or
whose size or mtime differs, is hashed again; a damaged piece is discarded and rebuilt. Outs of DVC
stages are hard links to these files, so a damaged file is marked before it is unlinked, see
`mark_damaged`. Removing and changing modes never follows a link.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import Machine, project_root
from pipeline.store import atomic

INDEX = "piece.json"
_SMALL_BYTES = 1 << 13  # records and the like: cheap to hash at each use
_NOT_WRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)
_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


class Busy(UserError):
    """Another process holds a lock."""


class Store:
    """Finished pieces of work in one folder; ``fresh``: stages rebuild existing pieces."""

    def __init__(self, root: Path, fresh: bool = False) -> None:
        self.root = root
        self.fresh = fresh

    @classmethod
    def open(cls, machine: Machine) -> "Store":
        """Open this project's store: `machine.work_dir`, else `.work` beside `dvc.yaml`.

        Raises:
            UserError: The folder cannot be created.
        """
        folder = machine.work_dir or Path(".work")
        try:
            root = project_root() / folder.expanduser()
            root.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"work_dir: cannot create {folder} ({reason}); set it to a writable folder in "
                "machine.yaml or GPT2_WORK_DIR"
            ) from None
        store = cls(root.absolute(), machine.fresh)
        store.sweep()
        return store

    def path(self, kind: str, key: str) -> Path:
        """Return the folder of a piece, or of unfinished work, whether it exists or not.

        Raises:
            UserError: The key is not one plain name: it may be a path out of the store.
        """
        if not _PLAIN_NAME.fullmatch(key):
            raise UserError(
                f"{kind}: {key[:80]!r} cannot be a key of the store; the file that holds it is "
                "damaged or forged: get it again from where you trust it"
            )
        return self.root / kind / key

    def folder(self, kind: str, key: str) -> Path:
        """Create the folder of unfinished work, such as a training run; return its path."""
        folder = self.path(kind, key)
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error that the store cannot be written into one line."""
        try:
            yield
        except OSError as error:
            name = error.filename  # of a failed `write` there is none
            is_ours = name is None or Path(os.fsdecode(name)).is_relative_to(self.root)
            if error.errno not in _NOT_WRITABLE or not is_ours:
                raise
            raise UserError(
                f"{name or self.root}: the store cannot be written ({error.strerror}); make it "
                "writable for you and free some space, or set work_dir (machine.yaml, "
                "GPT2_WORK_DIR) to another folder"
            ) from None

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, wait: bool = True) -> Iterator[None]:
        """Hold the key's lock. The kernel releases it when the process dies.

        Raises:
            Busy: ``wait`` is false and another process holds the lock.
            UserError: The store cannot be written.
        """
        path = self._lock_file(kind, self.path(kind, key).name)
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                atomic.check_regular(path)
            file = open(path, "a")
        with file:
            for tries_left in reversed(range(5)):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                    break
                except BlockingIOError:
                    if not tries_left:
                        raise Busy(
                            f"another process is working on {kind}/{key[:12]}; wait until it ends"
                        ) from None
                time.sleep(0.02)  # `is_locked` of another process may hold it for an instant
            yield

    @contextlib.contextmanager
    def lock_within(
        self, kind: str, key: str, seconds: float, before_waiting: Callable[[], object]
    ) -> Iterator[None]:
        """Hold the key's lock, and wait for it at most so long.

        Args:
            before_waiting: Called once, if another process holds it.

        Raises:
            Busy: Another process still holds it.
            UserError: The store cannot be written.
        """
        end, waits = time.monotonic() + seconds, False
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self.lock(kind, key, wait=False))
                    break
                except Busy:
                    if time.monotonic() > end:
                        raise
                    if not waits:
                        before_waiting()
                        waits = True
                    time.sleep(0.5)
            yield

    def is_locked(self, kind: str, key: str) -> bool:
        """Return whether a process holds the key's lock; a shared lock for an instant shows it."""
        path = self._lock_file(kind, key)
        try:
            atomic.check_regular(path)
            with open(path) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # none, or no regular file
            return False
        return False

    def _lock_file(self, kind: str, key: str) -> Path:
        return self.root / "locks" / f"{kind}-{key}"

    def find(self, kind: str, key: str) -> Path | None:
        """Return the folder of a complete piece, or None if it is missing or damaged."""
        folder = self.path(kind, key)
        try:
            index, is_sealed = _read_index(folder)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            _warn_damaged(kind, key, INDEX)
            return None
        changed = not is_sealed
        for name, entry in index.items():
            path = folder / name
            try:
                status = path.stat()
                found = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
                is_known = found.items() <= entry.items()
                if is_known and is_sealed and status.st_size > _SMALL_BYTES:
                    continue
                is_intact = atomic.sha256_file(path) == entry["sha256"]
            except (OSError, ValueError):  # ValueError: a NUL in the name
                is_intact = False
            if not is_intact:
                _warn_damaged(kind, key, name)
                return None
            if not is_known:
                entry |= found
                changed = True
        with contextlib.suppress(OSError):  # a store that cannot be written can be read
            if changed:
                atomic.write_json(folder / INDEX, atomic.sealed(index))
            else:
                os.utime(folder / INDEX)  # last use, for `--prune --older-than`
        return folder

    def sha256(self, kind: str, key: str) -> dict[str, str]:
        """Return file name -> sha256 of a complete piece, as recorded in its index."""
        index, _ = _read_index(self.path(kind, key))
        return {name: entry["sha256"] for name, entry in index.items()}

    @contextlib.contextmanager
    def make(self, kind: str, key: str, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Yield an empty folder; its files become the piece if the block raises nothing.

        The caller holds the key's lock. An existing piece is replaced.

        Args:
            hashes: File name -> sha256 of files already hashed; may be filled within the block.
        """
        final = self.path(kind, key)
        temporary = self.root / "tmp" / f"{kind}-{key}"
        with self._writing():
            atomic.remove(temporary)  # left by a dead process
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
                atomic.write_json(temporary / INDEX, atomic.sealed(index))
                final.parent.mkdir(parents=True, exist_ok=True)
                self.discard(kind, key)
                os.rename(temporary, final)
                atomic.fsync_folder(final.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def discard(self, kind: str, key: str) -> None:
        """Remove a piece, if it exists, with `unlink_damaged`."""
        folder = self.path(kind, key)
        if not os.path.lexists(folder):
            return
        if folder.is_dir() and not folder.is_symlink():
            atomic.remove(folder / INDEX)  # from here on the piece is incomplete
        unlink_damaged(folder)

    def sweep(self) -> None:
        """Remove incomplete pieces of dead processes: those whose lock is free."""
        for path in (self.root / "tmp").glob("*-*"):
            kind, key = path.name.split("-", 1)
            if self.is_locked(kind, key):
                continue
            with contextlib.suppress(UserError, OSError), self.lock(kind, key, wait=False):
                atomic.remove(path)


def _warn_damaged(kind: str, key: str, name: str) -> None:
    # Not removed here: the process that rebuilds the piece, under its lock, replaces it.
    place = f"{kind}/{key[:12]}/{printable(name)}"
    print(f"warning: {place} in the store is damaged; it will be rebuilt", flush=True)


def _read_index(folder: Path) -> tuple[dict[str, Any], bool]:
    """Read a piece's index: its entries, and whether it has the hash that it is written with.

    Indexes of earlier versions have none: their files are hashed again.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    index = atomic.parse_json(atomic.read_bytes(folder / INDEX))
    if is_sealed := isinstance(index, dict) and atomic.SEAL in index:
        index = atomic.unsealed(index)
    if (
        not index
        or not isinstance(index, dict)
        or not all(
            isinstance(entry, dict) and entry.keys() >= {"size", "mtime_ns", "sha256"}
            for entry in index.values()
        )
    ):
        raise ValueError(f"{folder / INDEX}: not an index")
    return index, is_sealed


def merged_key(chunk_keys: Sequence[str]) -> str:
    """Return the key of the shard of the merged validation documents of these chunks."""
    return atomic.sha256_json(list(chunk_keys))


def unlink_damaged(path: Path) -> None:
    """Remove a damaged file or folder, with `mark_damaged`; not through links."""
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            unlink_damaged(entry)
        path.rmdir()
        return
    mark_damaged(path)
    path.unlink()


def mark_damaged(damaged: Path) -> None:
    """Have DVC hash a damaged file again, and replace it in its cache.

    The cache holds the same inode by hard link. DVC trusts an object that is read-only, and one
    whose time and size are those for which it knows a hash: so the file becomes writable for its
    owner, and its time is now. A symbolic link is followed only to such an object, which DVC has
    linked where it cannot make hard links.
    """
    with contextlib.suppress(OSError):  # another user's file
        if damaged.is_symlink():
            damaged = Path(os.path.realpath(damaged))  # `resolve` raises on a loop
            if not _DVC_OBJECT.search(damaged.as_posix()):
                return
        mode = damaged.lstat().st_mode
        if stat.S_ISREG(mode):
            damaged.chmod(stat.S_IMODE(mode) | stat.S_IWUSR)
            os.utime(damaged)


def publish(files: Mapping[str, Path | bytes], out: Path) -> None:
    """Replace ``out`` by a folder of exactly ``files``, built aside and renamed into place.

    Args:
        files: Path within the folder -> file to hard-link (or copy, on another file system), or
            bytes to write.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        _publish(files, out)
    except FileNotFoundError:
        raise  # a piece of the store is gone
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); make it a folder with enough free space "
            "that you may write, and run the same command again"
        ) from None


def _publish(files: Mapping[str, Path | bytes], out: Path) -> None:
    temporary, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (temporary, old):
        atomic.remove(leftover)
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
    """Raise a `UserError` unless ``folder`` has room for the ``needed`` bytes of ``what``."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "free some space, or set work_dir in machine.yaml to a folder on a larger disk"
        )
