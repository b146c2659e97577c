"""Errors that the user can fix: one line, naming the problem, the place and the fix."""


class ModelError(ValueError):
    """Base of the errors below; commands print it as one line and exit with status 2."""


class ConfigError(ModelError):
    """An impossible model size, or an argument out of range."""


class FormatError(ModelError):
    """A folder of weights that is incomplete or invalid."""
