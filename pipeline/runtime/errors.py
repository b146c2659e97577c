"""The ways in which a command ends early that need no traceback."""


class UserError(ValueError):
    """A mistake of the user's: one line that names the key, file or flag, and the mend.

    Commands print it on stderr without a traceback and exit with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop: what is finished is kept, exit status 3.

    A `KeyboardInterrupt`, for Ray lets no other exception out of its waiting.
    """


class StageFailed(Exception):
    """A fault that its lines say in full: printed without a traceback, exit status 1."""
