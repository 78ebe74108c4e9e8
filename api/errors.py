"""Every error that a user can cause or meet. The command shows these as one line; anything else is a fault of ours.

Each kind is also the kind of Python's own errors that it stands for, so that `except ValueError` works as elsewhere.
"""

import unicodedata


def printable(text: str) -> str:
    """Text in one line and as it reads: control characters, line ends, what is no character and what turns the direction of
    the text after it, as escapes such as `\\n`."""
    escaped = ("Cc", "Cs", "Zl", "Zp")
    turning = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return "".join(
        repr(each)[1:-1]
        if unicodedata.category(each) in escaped or unicodedata.bidirectional(each) in turning
        else each
        for each in text
    )


class UniHemaError(Exception):
    """Something about the input, the settings or the machine; the message names it and the remedy.

    Whatever of a file or a name is told in it is shown as text: no character of it drives a terminal.
    """

    def __str__(self) -> str:
        return "\n".join(printable(line) for line in super().__str__().split("\n"))


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


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the message names the file or task and the remedy."""


class UnreadableImageError(InputError):
    """An image file that is missing, empty, truncated or no image; the message names it and the remedy."""


class DatasetError(InputError):
    """A data folder, file or row that cannot be used; the message names it and the remedy."""


class RunConfigError(InputError):
    """A setting that does not exist, has the wrong type, or contradicts another; the message names it."""


class TrainingError(RunError):
    """Training cannot go on; the message says where it stood and what to do."""


class TrainingInterrupted(TrainingError):
    """Stopped by the user or the system; a checkpoint to resume from is saved."""


class PushError(RunError):
    """A push that did not happen; the message names the repository and the remedy, never the token."""


class CardError(InputError):
    """A card with an empty or false field; the message names the field and the remedy."""


class PreparedModelError(InputError):
    """A model prepared for inference was to be saved; the message says what to do instead."""


class DeviceError(InputError):
    """A device or a dtype that there is not."""


__all__ = [
    "CardError",
    "CheckpointError",
    "DatasetError",
    "DeviceError",
    "FileMissingError",
    "FileThereError",
    "InputError",
    "InputTypeError",
    "NotFiniteError",
    "OutputError",
    "PackageMissingError",
    "PreparedModelError",
    "PushError",
    "RequestError",
    "RunConfigError",
    "RunError",
    "TrainingError",
    "TrainingInterrupted",
    "UniHemaError",
    "UnreadableImageError",
]
