"""Sources `files` and `tokens`: local paths, folders, globs and fsspec URLs of `source.paths`."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.download import to_parquet
from pipeline.download.http import Patience
from pipeline.download.partial_file import PartialFile
from pipeline.runtime.errors import UserError
from pipeline.store import atomic

TEXT_FORMATS = (*to_parquet.PARQUET, *to_parquet.FORMATS)

_WILDCARDS = "*?["
_READ_BYTES = 1 << 22
# Keys of fsspec's file info that change with a file's content, by file system.
_VERSION_KEYS = (
    "ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation",
    "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "blob_id",
)  # fmt: skip


@dataclass(frozen=True)
class PathFile:
    """A file that fsspec can open; see `ingest.SourceItem`."""

    path: str
    """The path relative to the folder or glob that names the file; else the file name."""
    url: str
    size: int
    version: str
    """A hash that changes when the file changes."""
    local: bool

    @property
    def identity(self) -> str:
        """A name for the bytes, as their hash is not known before they are read."""
        return "seen-" + atomic.sha256_json([self.url, self.size, self.version])

    @property
    def local_path(self) -> Path | None:
        """The path on this machine; None for a remote file."""
        return Path(self.url) if self.local else None

    def fetch(self, folder: Path, patience: float) -> tuple[Path, str]:
        """Return a local path and the sha256; a remote file is downloaded to ``folder``.

        Raises:
            UserError: The file cannot be read.
        """
        if self.local:
            try:
                return Path(self.url), atomic.sha256_file(Path(self.url))
            except OSError as error:
                raise UserError(f"source.paths: {self.url}: {error.strerror}") from None
        waiting = Patience(self.url, patience)
        with PartialFile(folder, self.size) as partial:
            while partial.done < self.size:
                before = partial.done
                try:
                    for block in _read(self.url, partial.done):
                        partial.append(block)
                    reason = "disconnected"
                except (FileNotFoundError, PermissionError) as error:
                    raise UserError(f"source.paths: {self.url}: {_reason(error)}") from None
                except Exception as error:  # each file system raises its own types
                    reason = type(error).__name__
                if partial.done > before:
                    waiting.progress()
                if partial.done < self.size:
                    waiting.wait(f"{reason} at {partial.done:,} of {self.size:,} bytes")
            if partial.done > self.size:
                partial.restart()
                raise UserError(
                    f"source.paths: {self.url}: the file grew while it was read; run the same "
                    "command again"
                )
            return partial.path, partial.sha256


def _read(url: str, start: int) -> Iterator[bytes]:
    import fsspec

    with fsspec.open(url, "rb") as file:
        file.seek(start)
        while block := file.read(_READ_BYTES):
            yield block


def resolve(paths: Sequence[str], formats: Sequence[str] = TEXT_FORMATS) -> list[PathFile]:
    """Find the files that the paths name, sorted by their path in `data/raw`.

    Args:
        formats: Suffixes of the files to use.

    Raises:
        UserError: A path names no file, or two files would have the same path.
    """
    found: dict[str, PathFile] = {}
    for pattern in paths:
        for file in _find(pattern, formats):
            other = found.setdefault(file.path, file)
            if other.url != file.url:
                raise UserError(
                    f"source.paths: {other.url} and {file.url} would both be {file.path} in "
                    "data/raw; name a folder or glob above both, which keeps their relative paths"
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
        # In a URL "?" begins the query.
        wild = any(c in path for c in (_WILDCARDS if local else _WILDCARDS.replace("?", "")))
        if not wild or (local and system.exists(path)):
            if system.info(path)["type"] == "directory":
                above, matches = path.rstrip("/"), sorted(system.find(path))
            else:
                matches = [path]
        else:
            above = _folder_above_wildcard(path)
            matches = sorted(system.glob(path))
        infos = [(match, system.info(match)) for match in matches]
        infos = [(match, info) for match, info in infos if info["type"] == "file"]
    except FileNotFoundError:
        raise UserError(f"source.paths: {pattern}: no such file") from None
    except (ImportError, ValueError) as error:  # no such protocol, or a package for it is missing
        raise UserError(f"source.paths: {pattern}: {_reason(error)}") from None
    except Exception as error:  # each file system raises its own types
        raise UserError(f"source.paths: {pattern}: cannot be listed: {_reason(error)}") from None
    files = []
    for match, info in infos:
        # The query of a URL, often a signature, is not part of the name.
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
        raise UserError(f"source.paths: {pattern}: no file of a known format; known: {known}")
    return files


def _file(path: str, url: str, info: dict[str, Any], local: bool) -> PathFile:
    size = info.get("size")
    if size is None:
        raise UserError(
            f"source.paths: {url}: the server does not send the file's size; download the file and "
            "name its local path"
        )
    found = {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}
    # Without version information the file may have changed: it is fetched by each run.
    version = atomic.sha256_json(found) if found else uuid.uuid4().hex
    return PathFile(path, url, int(size), version, local)


def _folder_above_wildcard(path: str) -> str:
    parts = path.split("/")
    for index, part in enumerate(parts):
        if any(wildcard in part for wildcard in _WILDCARDS):
            return "/".join(parts[:index])
    return "/".join(parts[:-1])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
