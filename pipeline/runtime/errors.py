"""Exceptions that end a command without a traceback."""


class UserError(ValueError):
    """A mistake of the user: one line that names the key, file or flag and how to fix it.

    Commands print it on stderr and exit with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal stopped the command: finished work is kept, exit status 3.

    It is a `KeyboardInterrupt` because Ray's waits let no other exception through.
    """


class StageFailed(Exception):
    """A fault whose message explains it: printed without a traceback, exit status 1."""
