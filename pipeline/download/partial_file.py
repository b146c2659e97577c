"""A file that arrives piece by piece and outlives the process that fetches it.

Its bytes lie in ``data`` of a folder of the store, and the ETag that they came under in ``etag``.
They are hashed as they are written, and once more when another process takes them up. Bytes that a
power cut took from the page cache may be zeros: only the whole file's hash says that it is right.
"""

import hashlib
from pathlib import Path
from types import TracebackType

DATA = "data"
_ETAG = "etag"
_READ_BYTES = 1 << 20


class Partial:
    """The bytes so far, and their hashes. The caller holds the folder's lock.

    Args:
        folder: where it lies; what is there already is hashed, and counts.
        size: bytes of the whole file.
        git: also compute the name that git gives the file.
    """

    def __init__(self, folder: Path, size: int, git: bool = False) -> None:
        self.path, self.size = folder / DATA, size
        self._etag, self._with_git = folder / _ETAG, git
        self.path.touch()
        self._file = open(self.path, "r+b", buffering=0)
        self._begin()
        if self.path.stat().st_size > size:
            self.restart()
        buffer = memoryview(bytearray(_READ_BYTES))
        while count := self._file.readinto(buffer):
            self._count(buffer[:count])

    def __enter__(self) -> "Partial":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _begin(self) -> None:
        self.done = 0
        self._sha256 = hashlib.sha256()
        header = b"blob %d\0" % self.size
        self._git = hashlib.sha1(header, usedforsecurity=False) if self._with_git else None

    def _count(self, block: bytes | memoryview) -> None:
        self._sha256.update(block)
        if self._git is not None:
            self._git.update(block)
        self.done += len(block)

    @property
    def sha256(self) -> str:
        """Of the bytes so far."""
        return self._sha256.hexdigest()

    @property
    def git(self) -> str | None:
        """What git calls the bytes when they are whole: sha1 with a header."""
        return self._git.hexdigest() if self._git else None

    @property
    def etag(self) -> str | None:
        """The server's name for the version that the bytes are of, where it gave one."""
        try:
            return self._etag.read_text(encoding="latin-1") or None
        except FileNotFoundError:
            return None

    def restart(self, etag: str | None = None) -> None:
        """Drop what has come; what comes next is of the version ``etag``."""
        self._file.seek(0)
        self._file.truncate()
        # Not synced to the disk: the body is arriving, and the hash sees whatever goes wrong.
        self._etag.write_text(etag or "", encoding="latin-1", errors="replace")
        self._begin()

    def append(self, block: bytes) -> None:
        """Write the next bytes."""
        view = memoryview(block)
        while view:
            view = view[self._file.write(view) :]
        self._count(block)
