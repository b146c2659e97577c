"""Sources `files` and `tokens`: local paths, folders, globs and fsspec URLs of `source.paths`."""

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.download import local_paths, to_parquet
from pipeline.download.http import Patience
from pipeline.download.left_out import AUXILIARY, OTHER_NAME, UNKNOWN, LeftOut, is_auxiliary
from pipeline.download.partial_file import PartialFile
from pipeline.runtime.errors import UserError, printable
from pipeline.store import atomic

TEXT_FORMATS = (*to_parquet.PARQUET, *to_parquet.FORMATS)

_WILDCARD = re.compile(r"[*\[]")  # in a URL "?" begins the query
_READ_BYTES = 1 << 22
_MAX_SHOWN = 300  # characters of a path or URL in a message
_MAX_STARS = 3  # in a name of a URL's glob: fsspec needs exponential time for more
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
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
    def _shown(self) -> str:
        return printable(self.url)[:_MAX_SHOWN]

    @property
    def real(self) -> str:
        """The path without links, or the URL."""
        return os.path.realpath(self.url) if self.local else self.url

    @property
    def local_path(self) -> Path | None:
        """The path on this machine; None for a remote file."""
        return Path(self.url) if self.local else None

    def fetch(self, folder: Path, patience: float) -> tuple[Path, str]:
        """Return a local path and the sha256; a remote file is downloaded to ``folder``.

        Raises:
            UserError: The file cannot be read, or is a pointer of Git LFS.
        """
        if not self.local:
            path, sha256 = self._download(folder, patience)
        else:
            try:
                path, sha256 = Path(self.url), atomic.sha256_file(Path(self.url))
            except OSError as error:
                raise UserError(
                    f"source.paths: {self._shown}: {error.strerror}; make it a readable file"
                ) from None
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"{self.path}: a pointer of Git LFS, no data; run `git lfs pull`")
        return path, sha256

    def _download(self, folder: Path, patience: float) -> tuple[Path, str]:
        waiting = Patience(self._shown, patience)
        with PartialFile(folder, self.size) as partial:
            while partial.done < self.size:
                before = partial.done
                try:
                    for block in _read(self.url, partial.done):
                        partial.append(block)
                    reason = "disconnected"
                except (FileNotFoundError, PermissionError) as error:
                    raise UserError(
                        f"source.paths: {self._shown}: {_reason(error)}; check the URL and its "
                        "access rights"
                    ) from None
                except Exception as error:  # each file system raises its own types
                    reason = type(error).__name__
                if partial.done > before:
                    waiting.progress()
                if partial.done < self.size:
                    waiting.wait(f"{reason} at {partial.done:,} of {self.size:,} bytes")
            if partial.done > self.size:
                partial.restart()
                raise UserError(
                    f"source.paths: {self._shown}: the file grew while it was read; run the same "
                    "command again"
                )
            return partial.path, partial.sha256


def _read(url: str, start: int) -> Iterator[bytes]:
    import fsspec

    with fsspec.open(url, "rb") as file:
        file.seek(start)
        while block := file.read(_READ_BYTES):
            yield block


def resolve(
    paths: Sequence[str],
    formats: Sequence[str] = TEXT_FORMATS,
    exclude: Sequence[str] = (),
    source: str = "main",
) -> list[PathFile]:
    """Find the files that the paths name, sorted by their path in `data/raw`.

    A file that several paths or links name is taken once, under its first name. Prints what is
    left out.

    Args:
        formats: Suffixes of the files to use.
        exclude: Globs of files to leave out; see `LeftOut.excludes`.
        source: Name of the source, for what is printed.

    Raises:
        UserError: A path names no file, or two files would have the same path.
    """
    left_out = LeftOut(exclude, source)
    found: dict[str, PathFile] = {}
    first: dict[str, PathFile] = {}
    for pattern in paths:
        n_excluded = left_out.n_excluded
        files = _find(pattern, formats, left_out)
        if not files and left_out.n_excluded == n_excluded:
            left_out.report()
            raise UserError(
                f"source.paths: {printable(pattern)}: no file of a known format; known: "
                f"{', '.join(formats)}"
            )
        for file in sorted(files, key=lambda file: file.url != file.real):
            if (same := first.setdefault(file.real, file)) is not file:
                if same.path != file.path:
                    left_out.add(OTHER_NAME, file.path)
                continue
            other = found.setdefault(file.path, file)
            if other is not file:
                raise UserError(
                    f"source.paths: {printable(other.url)} and {printable(file.url)} would both be "
                    f"{printable(file.path)} in data/raw; name a folder or glob above both, which "
                    "keeps their relative paths, or list one in source.exclude"
                )
    left_out.report()
    if not found:
        raise left_out.nothing_left()
    return [found[path] for path in sorted(found)]


def _find(pattern: str, formats: Sequence[str], left_out: LeftOut) -> list[PathFile]:
    """Return the files of these formats that a path or URL names."""
    if "://" in pattern and not pattern.startswith("file://") and not os.path.lexists(pattern):
        return _find_remote(pattern, formats, left_out)
    files = []
    for name, path, status in local_paths.find(pattern, left_out):
        if to_parquet.suffix_of(name) in formats:
            version = atomic.sha256_json({"mtime": str(status.st_mtime)})
            files.append(PathFile(name, str(path), status.st_size, version, local=True))
        else:
            left_out.add(UNKNOWN, name)
    return files


def _find_remote(url: str, formats: Sequence[str], left_out: LeftOut) -> list[PathFile]:
    from fsspec.core import url_to_fs

    shown = f"source.paths: {printable(url)[:_MAX_SHOWN]}"
    if any(part.count("*") > _MAX_STARS for part in url.split("/")) or url.count("**") > 1:
        raise UserError(
            f"{shown}: more than {_MAX_STARS} * in a name, or more than one **; name the folder, "
            "and use source.exclude"
        )
    if "::" in url:
        raise UserError(f"{shown}: URLs with :: are not supported; download and unpack the archive")
    try:
        system, path = url_to_fs(url)
        if _WILDCARD.search(path):
            above, matches = _folder_above_wildcard(path), system.glob(path.replace("[^", "[!"))
        else:
            above, matches = path.rpartition("/")[0], [path]
        infos = {match: system.info(match) for match in sorted(matches)}
        for folder in [match for match in matches if infos[match]["type"] == "directory"]:
            above = folder.rstrip("/") if folder == path else above
            infos |= {match: system.info(match) for match in sorted(system.find(folder))}
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file; correct the URL") from None
    except (ImportError, ValueError) as error:  # no such protocol, or a package for it is missing
        raise UserError(
            f"{shown}: {_reason(error)}; correct the URL, or install the package of its file system"
        ) from None
    except Exception as error:  # each file system raises its own types
        raise UserError(
            f"{shown}: cannot be listed ({_reason(error)}); check the URL and its access rights"
        ) from None
    files = []
    for match, info in infos.items():
        # The query of a URL, often a signature, is not part of the name.
        name = match.removeprefix(above).lstrip("/").partition("?")[0]
        if info["type"] != "file" or left_out.excludes(name):
            continue
        if is_auxiliary(match, path):
            left_out.add(AUXILIARY, name)
        elif to_parquet.suffix_of(name) not in formats:
            left_out.add(UNKNOWN, name)
        elif "::" in match:  # fsspec would take it for two URLs
            left_out.add("a name with ::", name)
        else:
            files.append(_remote_file(name, system.unstrip_protocol(match), info))
    return files


def _remote_file(path: str, url: str, info: dict[str, Any]) -> PathFile:
    size = info.get("size")
    if type(size) is not int or size < 0:
        raise UserError(
            f"source.paths: {printable(url)[:_MAX_SHOWN]}: the server does not send the file's "
            "size; download the file and name its local path"
        )
    found = {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}
    # Without version information the file may have changed: it is fetched by each run.
    version = atomic.sha256_json(found) if found else uuid.uuid4().hex
    return PathFile(path, url, size, version, local=False)


def _folder_above_wildcard(path: str) -> str:
    parts = path.split("/")
    for index, part in enumerate(parts):
        if _WILDCARD.search(part):
            return "/".join(parts[:index])
    return "/".join(parts[:-1])


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error)[:1000].split()) or type(error).__name__)[:200]
