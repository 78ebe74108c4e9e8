"""Every error that a user can cause or meet. The command shows these as one line; anything else is a fault of ours.

Each kind is also the kind of Python's own errors that it stands for, so that `except ValueError` works as elsewhere.
"""


class UniHemaError(Exception):
    """Something about the input, the settings or the machine; the message names it and the remedy."""


class InputError(UniHemaError, ValueError):
    """An image, a text, a label or a setting that cannot be used."""


class InputTypeError(UniHemaError, TypeError):
    """An argument of the wrong kind."""


class RequestError(InputError):
    """What was asked for cannot be done by any checkpoint: an unknown task, a threshold that is none, a text too long."""


class RunError(UniHemaError, RuntimeError):
    """Work that was begun and could not go on."""


class NotFiniteError(RunError):
    """The model predicts values that are no numbers."""


class FileMissingError(UniHemaError, FileNotFoundError):
    """A file or folder that is not there."""


class FileThereError(UniHemaError, FileExistsError):
    """A file or folder that is in the way."""


class OutputError(UniHemaError, OSError):
    """A file or folder that cannot be written."""


class PackageMissingError(UniHemaError, ImportError):
    """A package of an extra is not installed."""


__all__ = [
    "FileMissingError",
    "FileThereError",
    "InputError",
    "InputTypeError",
    "NotFiniteError",
    "OutputError",
    "PackageMissingError",
    "RequestError",
    "RunError",
    "UniHemaError",
]
