"""What is wrong with the rows of a data set: collected in one pass, then a reason to stop or a list of what is left out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from unihema.errors import DatasetError, InputError


logger = logging.getLogger(__name__)

OnInvalid = Literal["error", "skip"]
SHOWN = 50


class BadRowsError(DatasetError):
    """Rows that cannot be used.

    Attributes:
        messages (`list[str]`): One for each bad row, with its file and line.
    """

    def __init__(self, messages: list[str], remedy: str = ""):
        self.messages = list(messages)
        if len(messages) == 1:
            text = messages[0]
        else:
            more = [f"... and {len(messages) - SHOWN} more"] if len(messages) > SHOWN else []
            text = "\n".join([f"{len(messages)} bad rows:", *messages[:SHOWN], *more])
        super().__init__(f"{text}\n{remedy}" if remedy else text)


class BadRows:
    """Collects bad rows while a reader goes on with the next one."""

    def __init__(self):
        self.messages: list[str] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Notes a [`DatasetError`] of one row instead of letting it end the reading."""
        try:
            yield
        except DatasetError as error:
            self.messages.append(str(error))

    def settle(self, on_invalid: OnInvalid) -> None:
        """Stops, or warns of each bad row and goes on.

        Args:
            on_invalid (`"error"` or `"skip"`): Which of the two.

        Raises:
            BadRowsError: There are bad rows, with `"error"`.
            ValueError: `on_invalid` is neither.
        """
        if on_invalid not in ("error", "skip"):
            raise InputError(f"on_invalid={on_invalid!r} must be 'error' or 'skip'.")
        if self.messages and on_invalid == "error":
            raise BadRowsError(self.messages, 'Correct this, or leave bad rows out (on_invalid="skip").')
        for message in self.messages:
            logger.warning("%s Left out.", message)
