"""Rows that need not all be in memory, and which samples they make."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from unihema.modeling_unihema.tasks import LANGUAGE_TASKS
from unihema.training.data.label_names import rename_rows


Row = dict[str, Any]
# Blocks (what is read at once) whose samples are shuffled among each other, and so the most that are in use at once.
WINDOW = 16


class LazyRows(Sequence):
    """Rows of one task. The attributes say what there is without reading any.

    Attributes:
        witnesses (`list[Row]`): Rows among which every class, label, attribute value and prompt occurs.
        sources (`list[tuple[str, list[range]]]`): For each data set its name and its blocks: the numbers of samples that
            are read together.
        groups (`Sequence[Sequence[int]]`): The row numbers of each sample.
    """

    witnesses: list[Row]
    sources: list[tuple[str, list[range]]]
    groups: Sequence[Sequence[int]]

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same rows with other class names."""


class ListedRows(LazyRows):
    """A list of rows, to stand beside others that are not in memory.

    Args:
        rows (`Sequence[Row]`): Of one task and one data set.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = self.witnesses = list(rows)
        self.groups = rows_by_sample(self.rows)
        self.sources = [(self.rows[0]["dataset"], [range(len(self.groups))])]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]

    def renamed(self, names: Mapping[str, str]) -> "ListedRows":
        """The same rows with other class names."""
        return ListedRows(rename_rows(self.rows, names))


class JoinedRows(LazyRows):
    """Rows of several data sets, some of which are not in memory.

    Args:
        parts (`Sequence[LazyRows | list[Row]]`): The rows of each, of one task.
    """

    def __init__(self, parts: Sequence[Any]):
        self.parts: list[LazyRows] = [
            part if isinstance(part, LazyRows) else ListedRows(part) for part in parts if len(part)
        ]
        self.witnesses = [row for part in self.parts for row in part.witnesses]
        self._rows = np.cumsum([0, *map(len, self.parts)]).tolist()
        samples = np.cumsum([0, *(len(part.groups) for part in self.parts)]).tolist()
        self.sources = [
            (name, [range(block.start + first, block.stop + first) for block in blocks])
            for part, first in zip(self.parts, samples)
            for name, blocks in part.sources
        ]
        self.groups = _JoinedGroups([part.groups for part in self.parts], samples, self._rows)

    def __len__(self) -> int:
        return self._rows[-1]

    def __getitem__(self, number: int) -> Row:
        part = int(np.searchsorted(self._rows, number, side="right")) - 1
        return self.parts[part][number - self._rows[part]]

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            yield from part

    def renamed(self, names: Mapping[str, str]) -> "JoinedRows":
        """The same rows with other class names."""
        return JoinedRows([part.renamed(names) for part in self.parts])


class ConsecutiveGroups(Sequence):
    """Row numbers of samples whose rows follow each other.

    Args:
        counts (`np.ndarray`): Rows of each sample.
    """

    def __init__(self, counts: np.ndarray):
        self._single = bool((counts == 1).all())
        self._samples = len(counts)
        # Where every sample is one row there is nothing to remember.
        self._starts = None if self._single else np.concatenate([[0], np.cumsum(counts)])
        self.rows = self._samples if self._single else int(self._starts[-1])
        self.largest = int(counts.max(initial=0))

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, sample: int) -> range:
        if not 0 <= sample < self._samples:
            raise IndexError(f"Sample {sample} of {self._samples}.")
        if self._single:
            return range(sample, sample + 1)
        return range(int(self._starts[sample]), int(self._starts[sample + 1]))

    def locate(self, row: int) -> tuple[int, int]:
        """The sample of a row, and its place there."""
        if not 0 <= row < self.rows:
            raise IndexError(f"Row {row} of {self.rows}.")
        if self._single:
            return row, 0
        sample = int(np.searchsorted(self._starts, row, side="right")) - 1
        return sample, row - int(self._starts[sample])


class _JoinedGroups(Sequence):
    def __init__(self, parts: list[Sequence[Sequence[int]]], samples: list[int], rows: list[int]):
        self.parts, self.samples, self.rows = parts, samples, rows
        self.largest = max(largest_group(part) for part in parts)

    def __len__(self) -> int:
        return self.samples[-1]

    def __getitem__(self, sample: int) -> list[int]:
        part = int(np.searchsorted(self.samples, sample, side="right")) - 1
        return [row + self.rows[part] for row in self.parts[part][sample - self.samples[part]]]


def largest_group(groups: Sequence[Sequence[int]]) -> int:
    """The most rows that a sample has."""
    return groups.largest if hasattr(groups, "largest") else max(map(len, groups))


def rows_by_sample(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers of each sample: a row, but for language tasks all rows of an image."""
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        image = row["image"] if isinstance(row["image"], str) else id(row["image"])
        groups.setdefault(image if row["task"] in LANGUAGE_TASKS else number, []).append(number)
    return list(groups.values())


def witnesses(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows among which all names of `rows` occur: themselves, where they are in memory."""
    return rows.witnesses if isinstance(rows, LazyRows) else rows


def one_cell_samples(rows: Sequence[Row]) -> np.ndarray:
    """Which samples of detection are crops of one cell (rows `from_attributes`), bool `[samples]`.

    Rows that are not in memory are taken for what all rows named by their index are.
    """
    if isinstance(rows, JoinedRows):
        return np.concatenate([one_cell_samples(part) for part in rows.parts])
    if isinstance(rows, LazyRows) and not isinstance(rows, ListedRows):
        return np.full(len(rows.groups), all(row.get("from_attributes") for row in rows.witnesses))
    return np.array([bool(row.get("from_attributes")) for row in rows])


def joined(parts: Sequence[Any]) -> "list[Row] | JoinedRows":
    """The rows of several data sets: one list, or, where some are not in memory, [`JoinedRows`]."""
    if any(isinstance(part, LazyRows) for part in parts):
        return JoinedRows(parts)
    return [row for part in parts for row in part]
