"""Every error that a user can cause or meet. The command shows these as one line; anything else is a fault of ours."""


class UniHemaError(Exception):
    """Something about the input, the settings or the machine; the message names it and the remedy."""


__all__ = ["UniHemaError"]
