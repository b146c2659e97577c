"""Exceptions that end a command without a traceback, and text that is safe to print."""

import unicodedata


class UserError(ValueError):
    """A mistake of the user: one line that names the key, file or flag and how to fix it.

    Commands print it on stderr and exit with status 2. It has several lines for several files.
    """


class Stopped(KeyboardInterrupt):
    """A signal stopped the command: finished work is kept, exit status 3.

    It is a `KeyboardInterrupt` because Ray's waits let no other exception through.
    """


class StageFailed(Exception):
    """A fault whose message explains it: printed without a traceback, exit status 1."""


def printable(text: str) -> str:
    """Escape control characters, line ends and bytes that are not UTF-8, as in file names."""
    unsafe = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in unsafe else char
        for char in text
    )
