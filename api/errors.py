"""Every error that a user can cause or meet. The command shows these as one line; anything else is a fault of ours."""


class UniHemaError(Exception):
    """Something about the input, the settings or the machine; the message names it and the remedy."""


class RequestError(UniHemaError, ValueError):
    """What was asked for cannot be done by any checkpoint: an unknown task, a threshold that is none, a text too long."""


__all__ = ["RequestError", "UniHemaError"]
