"""Atomic file writes: write to a temporary name, fsync, rename; and JSON that knows its hash."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import stat
from pathlib import Path
from typing import Any

SEAL = "json_sha256"
"""Key of a JSON object's own hash, see `sealed`."""


def fsync_folder(folder: Path) -> None:
    """Flush the entries of ``folder`` to disk: a rename is durable only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush a written and closed file to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{platform.node()}."
    _remove_leftovers(path.parent, prefix)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove the temporary files of processes of this machine that were killed while they wrote."""
    for leftover in folder.glob(f"{glob.escape(prefix)}*.tmp"):
        pid = leftover.name[len(prefix) : -len(".tmp")]
        if not (pid.isdecimal() and is_alive(int(pid))):
            leftover.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine runs, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists; of a link never the target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """Encode ``value`` as in all JSON files of this project: sorted keys, indent 2, no NaN."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path`` atomically."""
    write_bytes(path, json_bytes(value))


def check_regular(path: Path) -> None:
    """Raise an `OSError` for what is no file: a pipe would block the process that reads it."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: It cannot be read, or is no file.
    """
    check_regular(path)
    return path.read_bytes()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal.

    Raises:
        OSError: It cannot be read, or is no file.
    """
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the sha256 of a JSON value, regardless of key order: a key for the store."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(data: bytes | str) -> Any:
    """Parse JSON from outside.

    Raises:
        ValueError: It is not JSON, or nested deeper than Python can parse.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own sha256 added under `SEAL`."""
    return {**value, SEAL: sha256_json(value)}


def unsealed(value: Any) -> dict[str, Any]:
    """Return a `sealed` JSON object without its hash, which is checked.

    Raises:
        ValueError: It is not the object that was sealed.
    """
    if isinstance(value, dict):
        rest = {key: entry for key, entry in value.items() if key != SEAL}
        if value.get(SEAL) == sha256_json(rest):
            return rest
    raise ValueError(f"does not match its {SEAL}")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a `sealed` JSON object; one of an earlier version, without a hash, is not checked.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    value = parse_json(read_bytes(path))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return unsealed(value) if SEAL in value else value
