"""The store `.work/`: finished pieces addressed by content, and folders of unfinished runs.

```
.work/<kind>/<key>/            a piece: its files, and piece.json, written last
.work/tmp/<kind>-<key>/        a piece being made, renamed into place when complete
.work/locks/<kind>-<key>       one flock per key, so that no piece is made twice at a time
```

`piece.json` records size, mtime and sha256 of each file. A file whose size or mtime differs is
hashed again; a damaged piece is discarded and rebuilt. Outs of DVC stages are hard links to these
files, so a damaged file is made writable before it is unlinked, see `unlink_damaged`.
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

    def folder(self, kind: str, key: str) -> Path:
        """Create the folder of unfinished work, such as a training run; return its path."""
        folder = self.root / kind / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, wait: bool = True) -> Iterator[None]:
        """Hold the key's lock. The kernel releases it when the process dies.

        Raises:
            UserError: ``wait`` is false and another process holds the lock.
        """
        path = self.root / "locks" / f"{kind}-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(
                    f"another process is working on {kind}/{key[:12]}; wait until it ends"
                ) from None
            yield

    def find(self, kind: str, key: str) -> Path | None:
        """Return the folder of a complete piece, or None if it is missing or damaged."""
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
            os.utime(index_path)  # last use, for `--prune --older-than`
        return folder

    def sha256(self, kind: str, key: str) -> dict[str, str]:
        """Return file name -> sha256 of a complete piece, as recorded in its index."""
        index = json.loads((self.root / kind / key / INDEX).read_text())
        return {name: entry["sha256"] for name, entry in index.items()}

    @contextlib.contextmanager
    def make(self, kind: str, key: str, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Yield an empty folder; its files become the piece if the block raises nothing.

        The caller holds the key's lock. An existing piece is replaced.

        Args:
            hashes: File name -> sha256 of files already hashed; may be filled within the block.
        """
        temporary = self.root / "tmp" / f"{kind}-{key}"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a dead process
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
        """Remove a piece, if it exists, with `unlink_damaged`."""
        folder = self.root / kind / key
        if not folder.exists():
            return
        (folder / INDEX).unlink(missing_ok=True)
        for path in folder.iterdir():
            unlink_damaged(path)
        folder.rmdir()

    def sweep(self) -> None:
        """Remove incomplete pieces of dead processes: those whose lock is free."""
        for path in (self.root / "tmp").glob("*-*"):
            kind, key = path.name.split("-", 1)
            with contextlib.suppress(UserError), self.lock(kind, key, wait=False):
                shutil.rmtree(path, ignore_errors=True)


def _warn_damaged(kind: str, key: str, name: str) -> None:
    # Not removed here: the process that rebuilds the piece, under its lock, replaces it.
    print(f"warning: {kind}/{key[:12]}/{name} in the store is damaged; it will be rebuilt")


def _is_index(index: object) -> bool:
    return isinstance(index, dict) and all(
        isinstance(entry, dict) and entry.keys() >= {"size", "mtime_ns", "sha256"}
        for entry in index.values()
    )


def merged_key(chunk_keys: Sequence[str]) -> str:
    """Return the key of the shard of the merged validation documents of these chunks."""
    return atomic.sha256_json(list(chunk_keys))


def unlink_damaged(path: Path) -> None:
    """Make a damaged file writable, then unlink it.

    DVC's cache holds the same inode by hard link. DVC trusts a read-only object, but hashes one of
    mode 0644 again, finds that it changed, and replaces it.
    """
    path.chmod(0o644)
    path.unlink()


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
    """Raise a `UserError` unless ``folder`` has room for the ``needed`` bytes of ``what``."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "free some space, or set work_dir in machine.yaml to a folder on a larger disk"
        )
