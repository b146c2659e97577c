"""`python -m pipeline.repair`: repair what a killed `dvc` has left half written.

DVC writes some of its own files in place, or reads a folder in which one is not complete. After a
SIGKILL in such a moment, or a full disk, every later `dvc repro` ends with an error:

    dvc.lock               truncated, then written: the committed one is taken. Where git has none
                           it is moved aside, and the stages find their work in the store.
    .dvc/tmp/rwlock        likewise: removed. It says which running `dvc` uses which file.
    .dvc/cache/runs/       DVC takes a temporary file, and an empty folder, for an entry: removed

Its temporary files elsewhere in the cache, beside dvc.yaml and beside the outs are read by nothing,
but DVC leaves them for ever: removed as well.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.store import atomic

LOCK, RWLOCK = Path("dvc.lock"), Path(".dvc/tmp/rwlock")
REPO_LOCK = Path(".dvc/tmp/lock")
ASIDE = Path(".dvc/tmp/dvc.lock.damaged")  # git ignores this folder
CACHE = Path(".dvc/cache")
RUN_CACHE = CACHE / "runs"
OUTS = ("data", "artifacts", "metrics")  # folders of the outs
_TEMPORARY = re.compile(r".*\.[\w-]{22}\.tmp")  # `tmp_fname` of the package dvc_objects


def repair() -> Iterator[str]:
    """Repair the project in the working directory; yield what was done, a line each.

    Raises:
        UserError: A `dvc` is running here: what looks half written may be its work. Or `dvc.lock`
            cannot be read.
    """
    with _no_other_dvc():
        yield from _repair()


@contextlib.contextmanager
def _no_other_dvc() -> Iterator[None]:
    """Hold the lock that `dvc` holds, except while a stage runs: then the rwlock has its pid."""
    from dvc.lock import LockError, make_lock

    REPO_LOCK.parent.mkdir(parents=True, exist_ok=True)
    lock = make_lock(str(REPO_LOCK))
    try:
        lock.lock()  # waits for three seconds
    except LockError:
        raise UserError(f"{REPO_LOCK}: dvc is running here; wait until it ends") from None
    try:
        yield
    finally:
        lock.unlock()


def _repair() -> Iterator[str]:
    if pids := [pid for pid in _users(RWLOCK) or () if atomic.is_alive(pid)]:
        raise UserError(f"{RWLOCK}: dvc is running here (pid {pids[0]}); wait until it ends")
    if LOCK.exists() and not _is_lock_file(LOCK):
        if _check_out(LOCK) and _is_lock_file(LOCK):
            yield f"{LOCK}: was damaged; it is the committed one again"
        else:  # not committed, no git, or a merge that is not resolved
            os.replace(LOCK, ASIDE)
            yield f"{LOCK}: was damaged; moved to {ASIDE}"
    if _users(RWLOCK) is None:
        RWLOCK.unlink()
        yield f"{RWLOCK}: was damaged; removed"
    below = (Path(folder).rglob("*.tmp") for folder in (CACHE, *OUTS))
    for path in sorted(chain(Path().glob("*.tmp"), *below)):
        if _TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink()
            yield f"{path}: was not complete; removed"
    for path in sorted(RUN_CACHE.rglob("*"), reverse=True):  # a folder after those in it
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
            yield f"{path}: was empty; removed"


def _check_out(path: Path) -> bool:
    """Take a file from git; return whether that was possible."""
    try:
        git = subprocess.run(["git", "checkout", "--quiet", "--", path], capture_output=True)
    except OSError:  # there is no git
        return False
    return git.returncode == 0


def _is_lock_file(path: Path) -> bool:
    """Return whether DVC can read a `dvc.lock`.

    Raises:
        UserError: The file system cannot, which does not show that it is damaged.
    """
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # takes a second to import
    from dvc.utils.serialize import parse_yaml

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); make it a readable file"
        ) from None
    try:
        COMPILED_LOCKFILE_SCHEMA(parse_yaml(data.decode(), path))
    except Exception:  # the parser raises many types
        return False
    return True


def _users(rwlock: Path) -> list[int] | None:
    """Return the ids of the processes that use a file, of which some may be dead; None: damaged."""
    pids: list[int] = []

    def collect(entry: dict[str, Any]) -> dict[str, Any]:
        pids.extend(value for name, value in entry.items() if name == "pid")
        return entry

    try:
        json.loads(rwlock.read_bytes(), object_hook=collect)
    except FileNotFoundError:
        return []
    except ValueError:
        return None
    return pids


def main(argv: Sequence[str] = ()) -> None:
    """Repair what a killed `dvc` has left half written; no other `dvc` may run in this folder."""
    command.Parser(prog="python -m pipeline.repair", description=main.__doc__).parse_args(argv)
    for line in repair():
        print(f"repair: {line}", flush=True)


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
