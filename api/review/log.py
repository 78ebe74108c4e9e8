"""The log of a review: an append-only table in which every row holds the hash of the one before it."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from unihema.errors import OutputError
from unihema.files import shortened


# Of the file, in the header that SQLite keeps for it: the first letters of the package, and the layout of the table.
APPLICATION, VERSION = 0x556E6948, 1
# Hash before the first row.
BEGINNING = "0" * 64
# A log cannot be changed by a statement that forgets what it is for. Who drops the triggers is found by the hashes.
_SCHEMA = """
CREATE TABLE entries (
    number INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    who TEXT NOT NULL,
    sample TEXT,
    image TEXT,
    cell INTEGER,
    kind TEXT NOT NULL,
    old TEXT,
    new TEXT,
    why TEXT NOT NULL,
    action INTEGER NOT NULL,
    undoes INTEGER,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT;
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries
BEGIN SELECT RAISE(ABORT, 'an entry of the log is never changed'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries
BEGIN SELECT RAISE(ABORT, 'an entry of the log is never deleted'); END;
CREATE TRIGGER entries_follow BEFORE INSERT ON entries
WHEN NEW.number IS NOT (SELECT COALESCE(MAX(number), 0) + 1 FROM entries)
    OR (NEW.number > 1 AND NEW.previous IS NOT (SELECT hash FROM entries WHERE number = NEW.number - 1))
BEGIN SELECT RAISE(ABORT, 'an entry of the log follows the last one'); END;
"""


class Entry(NamedTuple):
    """A row of the log.

    Args:
        number (`int`): From 1, without gaps.
        time (`str`): ISO 8601, UTC.
        who (`str`): Name of the person, as typed.
        sample (`str`, *optional*): Name of the sample.
        image (`str`, *optional*): Name of the image in its results folder.
        cell (`int`, *optional*): Number of the cell in its image.
        kind (`str`): What was done.
        old, new (`Any`): JSON values: what was changed, before and after.
        why (`str`): Reason, as typed.
        action (`int`): Number of the first of the entries that were made at once.
        undoes (`int`, *optional*): The action that an `undo` takes back, or a `redo` does again.
        previous (`str`): Hash of the entry before.
        hash (`str`): SHA-256 of all of this as canonical JSON.
    """

    number: int
    time: str
    who: str
    sample: str | None
    image: str | None
    cell: int | None
    kind: str
    old: Any
    new: Any
    why: str
    action: int
    undoes: int | None
    previous: str
    hash: str


class Change(NamedTuple):
    """What becomes an entry. See [`Entry`]."""

    kind: str
    sample: str | None = None
    image: str | None = None
    cell: int | None = None
    old: Any = None
    new: Any = None


class Damage(NamedTuple):
    """The first entry that is not what was written.

    Args:
        number (`int`): Of the entry.
        what (`str`): A sentence about it.
    """

    number: int
    what: str


class Log:
    """The log of one results folder.

    Args:
        path (`Path`): The SQLite file; made when missing, unless it is only read.
        read_only (`bool`): Do not write. Another process may be writing meanwhile.

    Raises:
        OutputError: It cannot be opened, or is something else.
    """

    def __init__(self, path: Path, read_only: bool = False):
        self.path = path
        mode = "ro" if read_only else "rwc"
        try:
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(read_only)
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            raise OutputError(
                f"{path}: not readable as the log of a review ({shortened(error)}). Put back a copy of it, or move it away and "
                "begin anew."
            ) from error

    def _prepare(self, read_only: bool) -> None:
        run = self._connection.execute
        run("PRAGMA busy_timeout = 10000")
        run("PRAGMA trusted_schema = OFF")
        application, version = (run(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if (application, version) == (0, 0) and not read_only:
            # Durable when a change is acknowledged, also where the machine loses its power.
            run("PRAGMA journal_mode = WAL")
            run("PRAGMA synchronous = FULL")
            if not run("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]:
                # In one transaction: a process that is killed leaves all of it or nothing.
                self._connection.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;"
                )
                return
        if (application, version) != (APPLICATION, VERSION):
            raise OutputError(f"{self.path}: not the log of a review that this version reads. Move it away.")
        if not read_only:
            run("PRAGMA synchronous = FULL")

    def append(self, who: str, changes: Sequence[Change], why: str = "", undoes: int | None = None) -> list[Entry]:
        """Writes entries, all or none; they are on the disk when this returns.

        Args:
            who (`str`): Name of the person.
            changes (`Sequence[Change]`): What was done at once.
            why (`str`): Reason.
            undoes (`int`, *optional*): The action that is taken back or done again.

        Raises:
            OutputError: They cannot be written; nothing of them is.
        """
        entries: list[Entry] = []
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                number, previous = self.head
                action = number + 1
                for change in changes:
                    number += 1
                    row = (
                        number, now, who, change.sample, change.image, change.cell, change.kind,
                        _stored(change.old), _stored(change.new), why, action, undoes, previous,
                    )  # fmt: skip
                    previous = _hash(row)
                    self._connection.execute(f"INSERT INTO entries VALUES ({', '.join('?' * 14)})", (*row, previous))
                    entries.append(_entry((*row, previous)))
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise OutputError(f"{self.path}: cannot be written ({shortened(error)}).") from error
        return entries

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the last entry; 0 and zeros of an empty log."""
        row = self._connection.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        return row or (0, BEGINNING)

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """The entries in their order.

        Args:
            after (`int`): Those with a larger number.
        """
        for row in self._rows(after):
            try:
                entry = _entry(row)
            except (ValueError, RecursionError) as error:
                raise OutputError(f"{self.path}: entry {row[0]} is no JSON. Put back a copy of it.") from error
            yield entry

    def _rows(self, after: int = 0) -> Iterator[tuple]:
        # Read in pieces: an open query would keep the log from being packed.
        while True:
            try:
                rows = self._connection.execute(
                    "SELECT * FROM entries WHERE number > ? ORDER BY number LIMIT 1000", (after,)
                ).fetchall()
            except sqlite3.Error as error:
                raise OutputError(
                    f"{self.path}: cannot be read ({shortened(error)}). Put back a copy of it."
                ) from error
            if not rows:
                return
            yield from rows
            after = rows[-1][0]

    def verify(self, head: str | None = None) -> Damage | None:
        """Finds the first entry that was changed, or is missing.

        That the last entries are missing can be told only by who has noted a later hash.

        Args:
            head (`str`, *optional*): Hash of an entry that has to be there, as a signature or a report has it.

        Returns:
            [`Damage`] or `None`: `None` where all is as it was written.
        """
        expected, previous, seen = 1, BEGINNING, head in (None, BEGINNING)
        for row in self._rows(after=-(1 << 62)):
            number, *_, of_previous, own = row
            if number != expected:
                return Damage(expected, f"entry {expected} is missing.")
            if of_previous != previous or own != _hash(row[:-1]):
                return Damage(number, f"entry {number} is not what was written, or the one before it is not.")
            seen |= own == head
            expected, previous = expected + 1, own
        return None if seen else Damage(expected, f"the entry with the hash {head} is missing.")

    def close(self) -> None:
        """Gives the file back."""
        self._connection.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


def _stored(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _entry(row: tuple) -> Entry:
    *before, old, new, why, action, undoes, previous, own = row
    values = (None if value is None else json.loads(value) for value in (old, new))
    return Entry(*before, *values, why, action, undoes, previous, own)


def _hash(row: tuple) -> str:
    """SHA-256 of a row without its own hash, as canonical JSON: what was stored, name by name."""
    named = dict(zip(Entry._fields, row))
    return hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


__all__ = ["BEGINNING", "Change", "Damage", "Entry", "Log"]
