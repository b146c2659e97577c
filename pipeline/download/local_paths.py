"""The files of this machine that a path of `source.paths` names: a file, a folder, or a glob.

Globs are those of a shell with `globstar`. A folder, also one that a glob matches, stands for all
files in it. Links are followed, and no folder is read twice.
"""

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import NamedTuple

from pipeline.download.left_out import AUXILIARY, OTHER_NAME, LeftOut, is_auxiliary, matches
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import project_root

_WILDCARD = re.compile(r"[*?\[]")


class LocalFile(NamedTuple):
    """A regular file, or a link to one."""

    name: str
    """The path relative to the folder or glob that names the file; else the file name."""
    path: Path
    status: os.stat_result


def find(pattern: str, left_out: LeftOut) -> list[LocalFile]:
    """Return the regular files that the pattern names, of any format, sorted by name.

    Raises:
        UserError: There is no such file, a folder cannot be listed, or the named file is special.
    """
    shown = f"source.paths: {printable(pattern)[:300] or repr(pattern)}"
    if not pattern or "\0" in pattern:
        raise UserError(f"{shown}: not a path; name a file, folder or glob")
    link = ""
    try:
        start, names = _start(pattern, shown)
        path = start.joinpath(*names)
        link = " (a link to a missing file)" if path.is_symlink() else ""
        above, parts = _split(start, names, shown)
        search = _Search(above, left_out, path)
        if parts:
            search.add_matches(parts, only_folders=pattern.endswith("/"))
        elif above.is_dir():
            search.add_folder(above)
        elif not stat.S_ISREG((status := above.stat()).st_mode):
            raise UserError(f"{shown}: not a regular file; name a file, folder or glob")
        elif not left_out.excludes(above.name):
            search.files[above] = LocalFile(above.name, above, status)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{shown}: no such file{link}; correct the path") from None
    except RecursionError:
        raise UserError(f"{shown}: folders are nested too deeply; move the files up") from None
    except OSError as error:
        where = f"source.paths: {printable(str(error.filename or pattern))[:300]}"
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{where}: the name is too long; shorten it") from None
        raise UserError(
            f"{where}: cannot be read ({error.strerror}); make it readable, or list it in "
            "source.exclude"
        ) from None
    return sorted(search.files.values())


def _start(pattern: str, shown: str) -> tuple[Path, Sequence[str]]:
    """Return the folder in which a path begins, which is no glob, and the parts of the path."""
    path = Path(pattern.removeprefix("file://"))
    if path.is_absolute():
        return Path(path.anchor), path.parts[1:]
    if pattern.startswith("~") and not os.path.lexists(path):
        try:
            return Path(path.parts[0]).expanduser(), path.parts[1:]
        except RuntimeError:
            raise UserError(f"{shown}: no such user or home folder; correct the path") from None
    # An experiment's workspace lacks the files that git ignores, and so part of a folder.
    named = Path(*takewhile(lambda part: not _WILDCARD.search(part), path.parts))
    is_file = named == path and os.path.lexists(named) and not named.is_dir()
    is_there = os.path.lexists(project_root() / named)
    return Path.cwd() if is_file or not is_there else project_root(), path.parts


def _split(above: Path, parts: Sequence[str], shown: str) -> tuple[Path, Sequence[str]]:
    """Split a path into its folder above the first wildcard, and the parts of the glob.

    A part with wildcards that exists as it is written is a name, if it matches nothing else.
    """
    for index, part in enumerate(parts):
        if _WILDCARD.search(part):
            if not os.path.lexists(above / part):
                return above, parts[index:]
            if others := [match for match in _matches(above, part) if match != part]:
                raise UserError(
                    f"{shown}: {part} is the name of a file and a pattern that matches "
                    f"{printable(others[0])}; name the folder above, and use source.exclude"
                )
        above /= part
    return above, []


def _expand(above: Path, parts: Sequence[str], auxiliary: set[Path]) -> Iterable[Path]:
    """Return the paths below a folder that match the parts of a glob, each once.

    Args:
        auxiliary: Gets the folders below a `**` whose names begin with `_`, which are not entered.
    """
    # Part by part: several `**` may lead to a folder in exponentially many ways.
    found = {above: None}
    for part, following in zip_longest(parts, parts[1:]):
        if part == "**" and following in ("**", None):
            continue  # the next one finds the same; the last one stands for the folder
        below: list[Path] = []
        for folder in found:
            if part == "**":
                below += _folders(folder, set(), auxiliary)
            else:
                below += [folder / name for name in _matches(folder, part)]
        found = {path: None for path in below if following is None or path.is_dir()}
    return found


def _matches(folder: Path, part: str) -> list[str]:
    """Return the names in a folder that match a part of a glob, as a shell does."""
    if not _WILDCARD.search(part):
        return [part] if os.path.lexists(folder / part) else []
    return [
        path.name
        for path in folder.iterdir()
        if matches(path.name, part) and path.name.startswith(".") <= part.startswith(".")
    ]


def _folders(folder: Path, seen: set[tuple[int, int]], auxiliary: set[Path]) -> Iterator[Path]:
    """Yield a folder and all below it, each once, without hidden and auxiliary ones."""
    if (key := _key(folder)) not in seen:
        seen.add(key)
        yield folder
        for path in sorted(folder.iterdir(), key=_links_last):
            if path.name.startswith(".") or not os.path.isdir(path):  # noqa: PTH112
                continue
            if path.name.startswith("_"):
                auxiliary.add(path)
            else:
                yield from _folders(path, seen, auxiliary)


def _key(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _links_last(path: Path) -> tuple[bool, Path]:
    """Sort key: a file or folder is read under its own name where it has one."""
    return path.is_symlink(), path


class _Search:
    """Collects the files that are found, by path."""

    def __init__(self, above: Path, left_out: LeftOut, pattern: Path) -> None:
        self.above, self.left_out, self.pattern = above, left_out, pattern
        self.files: dict[Path, LocalFile] = {}
        self.folders: dict[tuple[int, int], Path] = {}

    def add_matches(self, parts: Sequence[str], *, only_folders: bool) -> None:
        """Add what the parts of a glob match; raise `FileNotFoundError` if they match nothing."""
        auxiliary: set[Path] = set()
        found = sorted(set(_expand(self.above, parts, auxiliary)), key=_links_last)
        if only_folders:
            found = [path for path in found if path.is_dir()]
        if not found:
            raise FileNotFoundError
        for path in found:
            self.add(path)
        # Another part of the glob may have matched them.
        folders = {path.parent for path in self.files}
        for path in sorted(auxiliary.difference(folders, *(path.parents for path in folders))):
            name = os.path.relpath(path, self.above)
            if not self.left_out.excludes(name):
                self.left_out.add(AUXILIARY, f"{name}/")

    def add(self, path: Path) -> None:
        """Add a file or folder that was found, or record why it is left out."""
        name = os.path.relpath(path, self.above)
        if self.left_out.excludes(name):
            return
        try:
            status = path.stat()
        except OSError as error:
            if not path.is_symlink() or isinstance(error, PermissionError):
                raise
            self.left_out.add(f"a broken link ({error.strerror})", name)
            return
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_auxiliary(path, self.pattern):
            self.left_out.add(AUXILIARY, f"{name}/" if is_folder else name)
        elif is_folder:
            self.add_folder(path)
        elif stat.S_ISREG(status.st_mode):
            self.files[path] = LocalFile(name, path, status)
        else:
            self.left_out.add("not a regular file", name)

    def add_folder(self, path: Path) -> None:
        """Add the files of a folder, unless it was read before."""
        if (key := _key(path)) not in self.folders:
            self.folders[key] = path
            for below in sorted(path.iterdir(), key=_links_last):
                self.add(below)
        elif self.folders[key] != path:
            self.left_out.add(OTHER_NAME, f"{os.path.relpath(path, self.above)}/")
