"""Exceptions that end a command without a traceback, and text that is safe to print."""

import unicodedata

# Marks, embeddings, overrides and isolates: they reorder the text around them on a terminal.
_BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


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
    """Escape control characters, line ends and bytes that are not UTF-8, as in file names.

    Bidirectional controls are escaped, too, but not joiners, which some languages need.
    """
    unsafe = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in unsafe or char in _BIDI_CONTROLS
        else char
        for char in text
    )
