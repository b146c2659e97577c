"""Command line of the model's commands: flags, errors and exit status."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from model.errors import ModelError

# other errors of the file system are faults, such as a full disk
_USER_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_USER_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong flag in one line, `error: ...`, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Override argparse, which also prints the usage."""
        self.exit(2, f"error: {message} (see --help)\n")


def count(text: str) -> int:
    """Parse a flag: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text}")
    return int(text)


def positive(text: str) -> float:
    """Parse a flag: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def folder_path(text: str) -> Path:
    """Parse a flag: the path of a folder, which may not exist."""
    if not text or "\0" in text:  # the path "" would be the working directory
        raise argparse.ArgumentTypeError("must be the path of a folder, without NUL characters")
    return Path(text)


def repository(text: str) -> str:
    """Parse a flag: the name of a repository, as the Hugging Face hub allows it."""
    name = r"\w(?:[\w.-]{0,94}\w)?"
    if not re.fullmatch(f"{name}/{name}(?<![.]git)", text, re.ASCII) or re.search(r"--|\.\.", text):
        # Without the text: it may be an address with a token in it.
        raise argparse.ArgumentTypeError(
            "must be OWNER/NAME, each of letters, digits, '_', '-' and '.', as me/my-model"
        )
    return text


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command.

    Exit status: 0 done, 1 a fault, 2 user error, 3 interrupted. A user error, and an error of the
    file system such as a full disk, is reported in one line.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
    except (ModelError, OSError) as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        wrong_path = isinstance(error, OSError) and error.errno in _USER_ERRNOS
        sys.exit(2 if wrong_path or isinstance(error, (ModelError, *_USER_ERRORS)) else 1)
    except KeyboardInterrupt:
        sys.exit(3)
    sys.exit(0)


def _printable(text: str) -> str:
    """Return the text on one line, with the control characters of file names escaped."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
