"""Errors that are the user's to mend: one line each, naming the thing and the mend."""


class ModelError(ValueError):
    """Base of all errors below; the commands print it as one line and leave with status 2."""


class ConfigError(ModelError):
    """A model size that cannot be, or an argument outside its range."""


class FormatError(ModelError):
    """A folder of weights that is incomplete, or holds something else than it should."""
