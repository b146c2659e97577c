"""What the three commands share: how a mistake is told."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from model.errors import ModelError


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line, `error: ...`, and leaves with status 2."""

    def error(self, message: str) -> NoReturn:
        """Overrides argparse's, which prints the usage as well."""
        self.exit(2, f"error: {message} (see --help)\n")


def count(text: str) -> int:
    """The type of a flag: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """The type of a flag: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: not a number above 0")
    return value


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command. Exit status: 0 done, 2 the user's mistake in one line, 3 interrupted."""
    try:
        main()
        sys.stdout.flush()
    except (
        ModelError,
        FileNotFoundError,
        FileExistsError,
        PermissionError,
        NotADirectoryError,
    ) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(3)
    except BrokenPipeError:  # whoever read the text has enough, `| head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
    sys.exit(0)
