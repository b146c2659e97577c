"""An unfinished download, which survives the process that started it.

Its folder in the store holds the bytes in ``data`` and the server's ETag in ``etag``. The bytes are
hashed as they are written, and again when another process resumes. After a power cut some of them
may be zeros: only the hash of the complete file proves that it is right.
"""

import hashlib
from pathlib import Path

from pipeline.store import atomic

DATA = "data"
_ETAG = "etag"
_READ_BYTES = 1 << 20


class PartialFile:
    """The bytes received so far and their hashes. The caller must hold the folder's lock.

    Args:
        folder: The download's folder; bytes that are already there are hashed and counted.
        size: Bytes of the complete file.
        git: Whether to compute the git blob hash as well.
    """

    def __init__(self, folder: Path, size: int, git: bool = False) -> None:
        self.path, self.size = folder / DATA, size
        self._etag, self._with_git = folder / _ETAG, git
        for path in (self.path, self._etag):
            if not path.is_file():  # a pipe would block
                atomic.remove(path)
        self.path.touch()
        self._file = open(self.path, "r+b", buffering=0)
        self._reset()
        if self.path.stat().st_size > size:
            self.restart()
        buffer = memoryview(bytearray(_READ_BYTES))
        while count := self._file.readinto(buffer):
            self._update(buffer[:count])

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _reset(self) -> None:
        self.done = 0
        self._sha256 = hashlib.sha256()
        header = b"blob %d\0" % self.size
        self._git = hashlib.sha1(header, usedforsecurity=False) if self._with_git else None

    def _update(self, block: bytes | memoryview) -> None:
        self._sha256.update(block)
        if self._git is not None:
            self._git.update(block)
        self.done += len(block)

    @property
    def sha256(self) -> str:
        """The sha256 of the bytes so far."""
        return self._sha256.hexdigest()

    @property
    def git(self) -> str | None:
        """The git blob hash (sha1 of a header and the bytes), valid once the file is complete."""
        return self._git.hexdigest() if self._git else None

    @property
    def etag(self) -> str | None:
        """The ETag of the version that the bytes belong to, if the server sent one."""
        try:
            return self._etag.read_text(encoding="latin-1") or None
        except FileNotFoundError:
            return None

    def restart(self, etag: str | None = None) -> None:
        """Discard all bytes; the next ones belong to the version ``etag``."""
        self._file.seek(0)
        self._file.truncate()
        # Not fsynced, which would delay the body: the hash detects any corruption.
        self._etag.write_text(etag or "", encoding="latin-1", errors="replace")
        self._reset()

    def append(self, block: bytes) -> None:
        """Write the next bytes."""
        view = memoryview(block)
        while view:
            view = view[self._file.write(view) :]
        self._update(block)
