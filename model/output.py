"""Output folders of commands: complete or not there, and never in place of something else.

    output.check(out, source, FILES)
    with output.new_files(out, FILES) as part:
        ...                                       # write FILES to the folder `part`

`part` is a hidden folder in `out`. At the end its files are moved to `out`, the last of `names` as
the last, without which no reader takes the folder for complete. Started again after a crash at any
moment, the command ends with the same files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from model.errors import FormatError
from model.files import sync

PART = ".model-part"


def check(
    out: Path,
    read: Path | None,
    names: Sequence[str],
    ours: Callable[[Path], bool],
    *,
    replace: bool = True,
) -> None:
    """Check that a command may write to a folder.

    Args:
        out: Must not exist, or be empty, or hold an earlier or interrupted output of the command.
        read: The folder that the command reads, if there is one.
        names: Files that the command writes.
        ours: Whether the files of a folder, all of `names`, are an output of the command.
        replace: Whether a finished output may be replaced.

    Raises:
        FormatError: It may not.
    """
    folder = Path(os.path.realpath(out))
    if read is not None and _overlap(folder, Path(os.path.realpath(read))):
        raise FormatError(f"--out {out} overlaps with {read}, which is read: give another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FormatError(f"--out {out} is not a folder: give a new one")
    files = {path.name for path in folder.iterdir()}
    part = folder / PART
    interrupted = part.is_dir() and not part.is_symlink()
    if interrupted:
        files.remove(PART)
    unfinished = interrupted and names[-1] not in files
    replaceable = unfinished or ((interrupted or replace) and ours(folder))
    foreign = files.difference(names if replaceable else ())
    if foreign:
        raise FormatError(f"--out {out} is not empty, it holds {min(foreign)!r}: give a new folder")


@contextmanager
def new_files(out: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a folder to write files to, and move these to `out` if no error is raised.

    Args:
        out: A folder that `check` accepts; created if needed.
        names: All files of an output, in order; those of an earlier output are removed.
    """
    out = Path(os.path.realpath(out))
    part = out / PART
    created = not out.exists()
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if created:
            with suppress(OSError):
                out.rmdir()
        raise
    for name in reversed(names):
        (out / name).unlink(missing_ok=True)
    for name in names:
        if (part / name).exists():
            (part / name).replace(out / name)
            sync(out)
    part.rmdir()


def _overlap(a: Path, b: Path) -> bool:
    """Return whether one folder is the other or inside it; both are real paths."""
    # `samefile` sees through bind mounts, and through case where the file system ignores it
    return any(_same(x, b) for x in (a, *a.parents)) or any(_same(x, a) for x in b.parents)


def _same(a: Path, b: Path) -> bool:
    return a == b or (a.exists() and b.exists() and a.samefile(b))
