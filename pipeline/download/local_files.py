"""Sources `files` and `tokens`: local paths, folders, globs, and whatever fsspec has a URL for."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.download import to_parquet
from pipeline.download.http import Patience
from pipeline.download.partial_file import Partial
from pipeline.runtime.errors import UserError
from pipeline.store import atomic

TEXT_FORMATS = (*to_parquet.PARQUET, *to_parquet.FORMATS)

_WILD = "*?["
_READ_BYTES = 1 << 22
# What file systems call the version of a file, each in its own way.
_VERSIONS = (
    "ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation",
    "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "blob_id",
)  # fmt: skip


@dataclass(frozen=True)
class PathFile:
    """A file that fsspec can open."""

    path: str
    """Its path below the folder that its glob or folder names; else its name."""
    url: str
    size: int
    version: str
    """What tells that it has changed."""
    local: bool

    @property
    def identity(self) -> str:
        """What its bytes are known by, as long as they are not hashed anew."""
        return "seen-" + atomic.sha256_json([self.url, self.size, self.version])

    @property
    def here(self) -> Path | None:
        """The file itself, where it lies on a disk of this machine."""
        return Path(self.url) if self.local else None

    def space(self, folder: Path) -> int:
        """Bytes that it takes up on a disk."""
        return self.size

    def fetch(self, folder: Path, patience: float) -> tuple[Path, str]:
        """Its path here and its sha256; a remote file is copied into ``folder``.

        Raises:
            UserError: it cannot be read.
        """
        if self.local:
            try:
                return Path(self.url), atomic.sha256_file(Path(self.url))
            except OSError as error:
                raise UserError(f"source.paths: {self.url}: {error.strerror}") from None
        waiting = Patience(self.url, patience)
        with Partial(folder, self.size) as partial:
            while partial.done < self.size:
                before = partial.done
                try:
                    for block in _read(self.url, partial.done):
                        partial.append(block)
                    reason = "cut"
                except (FileNotFoundError, PermissionError) as error:
                    raise UserError(f"source.paths: {self.url}: {_reason(error)}") from None
                except Exception as error:  # each file system has its own
                    reason = type(error).__name__
                if partial.done > before:
                    waiting.progress()
                if partial.done < self.size:
                    waiting.wait(f"{reason} at {partial.done:,} of {self.size:,} bytes")
            if partial.done > self.size:
                partial.restart()
                raise UserError(f"source.paths: {self.url}: it grows while it is read; run again")
            return partial.path, partial.sha256


def _read(url: str, start: int) -> Iterator[bytes]:
    import fsspec

    with fsspec.open(url, "rb") as file:
        file.seek(start)
        while block := file.read(_READ_BYTES):
            yield block


def resolve(paths: Sequence[str], formats: Sequence[str] = TEXT_FORMATS) -> list[PathFile]:
    """The files that the paths name, by their path in `data/raw`.

    Args:
        formats: the suffixes of the files that are taken.

    Raises:
        UserError: a path names no file, or two of them would have the same path.
    """
    found: dict[str, PathFile] = {}
    for pattern in paths:
        for file in _find(pattern, formats):
            other = found.setdefault(file.path, file)
            if other.url != file.url:
                raise UserError(
                    f"source.paths: {other.url} and {file.url} would both be {file.path} in "
                    "data/raw; name a folder or a glob above them, which keeps the paths below it"
                )
    return [found[path] for path in sorted(found)]


def _find(pattern: str, formats: Sequence[str]) -> list[PathFile]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(pattern)
        protocols = [system.protocol] if isinstance(system.protocol, str) else system.protocol
        if local := "file" in protocols:
            path = str(Path(path).expanduser().absolute())
        above = path.rpartition("/")[0]
        # A query begins with "?" where it is no local path.
        wild = any(sign in path for sign in (_WILD if local else _WILD.replace("?", "")))
        if not wild or (local and system.exists(path)):
            if system.info(path)["type"] == "directory":
                above, matches = path.rstrip("/"), sorted(system.find(path))
            else:
                matches = [path]
        else:
            above = "/".join(_fixed(path.split("/")))
            matches = sorted(system.glob(path))
        infos = [(match, system.info(match)) for match in matches]
        infos = [(match, info) for match, info in infos if info["type"] == "file"]
    except FileNotFoundError:
        raise UserError(f"source.paths: {pattern}: no such file") from None
    except (ImportError, ValueError) as error:  # no such protocol, or a package for it is missing
        raise UserError(f"source.paths: {pattern}: {_reason(error)}") from None
    except Exception as error:  # each file system has its own
        raise UserError(f"source.paths: {pattern}: cannot be listed: {_reason(error)}") from None
    files = []
    for match, info in infos:
        # The query of a web address, often a signature, is not of the name.
        name = match.removeprefix(above).lstrip("/")
        name = name if local else name.partition("?")[0]
        if to_parquet.suffix_of(name) in formats and not any(
            part.startswith(".") for part in name.split("/")
        ):
            files.append(
                _file(name, match if local else system.unstrip_protocol(match), info, local)
            )
    if not files:
        known = ", ".join(formats)
        raise UserError(f"source.paths: {pattern}: no file of a known format there ({known})")
    return files


def _file(path: str, url: str, info: dict[str, Any], local: bool) -> PathFile:
    size = info.get("size")
    if size is None:
        raise UserError(f"source.paths: {url}: the server does not say how large it is")
    version = {key: str(info[key]) for key in _VERSIONS if info.get(key) is not None}
    # Without any word on its version it may have changed: it is fetched each time.
    known = atomic.sha256_json(version) if version else uuid.uuid4().hex
    return PathFile(path, url, int(size), known, local)


def _fixed(parts: list[str]) -> list[str]:
    """The folders above the first with a wild card."""
    for index, part in enumerate(parts):
        if any(sign in part for sign in _WILD):
            return parts[:index]
    return parts[:-1]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
