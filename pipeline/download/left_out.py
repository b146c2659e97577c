"""The files of a source that are not read: by `exclude`, or because they hold no text."""

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath

from pipeline.runtime.errors import UserError, printable

AUXILIARY = "hidden or auxiliary (the name begins with . or _)"
UNKNOWN = "unknown format"
OTHER_NAME = "read under another name"
_EXCLUDED = "exclude"

_NAMES = 20


class LeftOut:
    """Applies `exclude` of a source, and collects by reason what a source does not use."""

    def __init__(self, exclude: Sequence[str] = (), source: str = "main") -> None:
        self._source = source
        self._unmatched = dict.fromkeys(exclude)
        self._exclude = list(self._unmatched)
        self._names: dict[str, dict[str, None]] = {}
        self.n_excluded = 0

    def excludes(self, path: str) -> bool:
        """Return whether a pattern matches the path in the source, its name, or a folder of it."""
        if not self._exclude:
            return False
        pure = PurePosixPath(path)
        names = {path, pure.name, *map(str, pure.parents)} - {"", ".", ".."}
        for pattern in self._exclude:
            wanted = pattern.removeprefix("./").rstrip("/")
            # Also for no folder in place of `**`, as in a shell.
            globs = (wanted, wanted.removeprefix("**/").replace("/**/", "/"))
            if any(name == wanted or matches(name, glob) for name in names for glob in globs):
                self._unmatched.pop(pattern, None)
                self.n_excluded += 1
                self.add(_EXCLUDED, path)
                return True
        return False

    def add(self, reason: str, path: str) -> None:
        """Record an entry that is not read."""
        self._names.setdefault(reason, {})[path] = None

    def report(self) -> None:
        """Print one line per reason, and one per pattern of `exclude` without a match."""
        for reason, names in self._names.items():
            print(f"download: {self._source}: left out, {reason}: {_shown(names)}", flush=True)
        for pattern in self._unmatched:
            print(
                f"warning: sources.{self._source}.exclude: {printable(pattern)!r} matches no file",
                flush=True,
            )

    def nothing_left(self) -> UserError:
        """Return the error for a source whose files of a known format are all excluded."""
        return UserError(
            f"source.exclude: leaves no file of a known format ({_shown(self._exclude)}); "
            "remove a pattern from it"
        )


def _shown(names: Collection[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(printable(name)[:300] for name in islice(names, _NAMES)) + more


def matches(name: str, glob: str) -> bool:
    """Return whether a glob of a shell matches, where `*` stands for any characters, `/` too."""
    try:
        return fnmatchcase(name, glob.replace("[^", "[!"))
    except re.error:  # Python 3.10: an empty range, which matches nothing
        return False


def is_auxiliary(path: str | Path, pattern: str | Path) -> bool:
    """Return whether a path has more names that begin with `.` or `_` than the pattern asks for.

    Spark and Hive write such files and folders beside their data, and for unfinished data.
    """
    return _marked(path) > _marked(pattern)


def _marked(path: str | Path) -> int:
    parts = str(path).split("/")
    return sum(part.startswith((".", "_")) and part not in (".", "..") for part in parts)
