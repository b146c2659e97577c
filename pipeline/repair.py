"""`python -m pipeline.repair`: repair what a killed `dvc` has left half written.

DVC writes some of its own files in place, or reads a folder in which one is not complete. After a
SIGKILL in such a moment, or a full disk, every later `dvc repro` ends with an error:

    dvc.lock               truncated, then written: the committed one is taken. Without git it is
                           removed, and the stages find their work in the store.
    .dvc/tmp/rwlock        likewise: removed. It says which running `dvc` uses which file.
    .dvc/cache/runs/       DVC takes a temporary file, and an empty folder, for an entry: removed
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import read_yaml

LOCK, RWLOCK = Path("dvc.lock"), Path(".dvc/tmp/rwlock")
RUN_CACHE = Path(".dvc/cache/runs")


def repair() -> Iterator[str]:
    """Repair the project in the working directory; yield what was done, a line each.

    Raises:
        UserError: A `dvc` is running here: what looks half written may be its work.
    """
    if pids := [pid for pid in _users(RWLOCK) or () if _is_alive(pid)]:
        raise UserError(f"{RWLOCK}: dvc is running here (pid {pids[0]}); wait until it ends")
    if LOCK.exists() and not _is_lock_file(LOCK):
        restored = subprocess.run(["git", "checkout", "--quiet", "--", LOCK], capture_output=True)
        if restored.returncode != 0 or not _is_lock_file(LOCK):
            LOCK.unlink()
        yield f"{LOCK}: was damaged; " + (
            "it is the committed one again" if LOCK.exists() else "removed"
        )
    if _users(RWLOCK) is None:
        RWLOCK.unlink()
        yield f"{RWLOCK}: was damaged; removed"
    for path in sorted(RUN_CACHE.rglob("*"), reverse=True):  # a folder after its files
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
            yield f"{path}: was empty; removed"
        elif path.suffix == ".tmp":
            path.unlink()
            yield f"{path}: was not complete; removed"


def _is_lock_file(path: Path) -> bool:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # takes a second to import
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(read_yaml(path))
    except (UserError, Invalid):
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


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main(argv: Sequence[str] = ()) -> None:
    """Repair what a killed `dvc` has left half written; no other `dvc` may run in this folder."""
    command.Parser(prog="python -m pipeline.repair", description=main.__doc__).parse_args(argv)
    for line in repair():
        print(f"repair: {line}", flush=True)


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
