"""The odd-cell score: how far what a model computes of a cell is from what it computed of the training cells of its class.

Compared is what a head reads: the decoder's state of a cell in a field, the feature of a crop. It is there anyway, so a score
costs no pass through the model. It is a Mahalanobis distance with classes as the groups, see [`TiedGaussians`].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .tied_gaussians import TiedGaussians


if TYPE_CHECKING:
    from .cell import Cell


# Share of the cells of a class, among those that a model names rightly, that are not odd.
QUANTILE = 0.95
# Fewer cells do not tell what a class is like, nor how much it varies.
FEWEST = 10
# The largest score: beyond, numbers tell nothing more.
MOST = 1000.0


@dataclass(frozen=True)
class CellReference:
    """The cells of one head that a model was trained on.

    Args:
        classes (`tuple[str, ...]`): Names of the classes.
        gaussians ([`TiedGaussians`]): Of what the head reads of their cells, fitted on training cells.
        limits (`np.ndarray`): `[classes]`, the distance below which `QUANTILE` of a class's validation cells are.
        head (`str`): Of the head that it belongs to, see `head_checksum`.
    """

    classes: tuple[str, ...]
    gaussians: TiedGaussians
    limits: np.ndarray
    head: str

    @classmethod
    def fit(
        cls,
        train: tuple[Sequence[str], np.ndarray],
        val: tuple[Sequence[str], np.ndarray],
        head: str,
    ) -> "CellReference | None":
        """
        Args:
            train, val (`tuple[Sequence[str], np.ndarray]`): Classes of cells that were named rightly, `[n]`, and what the head
                reads of them, `[n, d]`. A class with too few validation cells has the limit of its training cells.
            head (`str`): Of the head.

        Returns:
            [`CellReference`] or `None`: `None` where no class has `FEWEST` training cells.
        """
        (names, states), (val_names, val_states) = (
            (np.asarray(of, dtype=str), np.asarray(x)) for of, x in (train, val)
        )
        found, counts = np.unique(names, return_counts=True)
        classes = found[counts >= FEWEST]
        if not len(classes):
            return None
        known = np.isin(names, classes)
        names, states = names[known], states[known]
        gaussians = TiedGaussians.fit(states, np.searchsorted(classes, names))
        limits = []
        for number, name in enumerate(classes):
            own = val_states[val_names == name]
            own = own if len(own) >= FEWEST else states[names == name]
            limits.append(np.quantile(gaussians.distances(own, np.full(len(own), number)), QUANTILE))
        return cls(tuple(classes.tolist()), gaussians, np.array(limits), head)

    def scores(self, states: np.ndarray, labels: Sequence[str]) -> list[float | None]:
        """How odd cells are: above 1 are cells further from their class than `QUANTILE` of its cells.

        Args:
            states (`np.ndarray`): What the head reads of each cell, `[n, d]`.
            labels (`Sequence[str]`): The class of each.

        Returns:
            `list[float | None]`: `None` for a class of which too few cells were seen.
        """
        number = {name: place for place, name in enumerate(self.classes)}
        places = [place for place, label in enumerate(labels) if label in number]
        groups = np.array([number[labels[place]] for place in places], int)
        distances = self.gaussians.distances(np.asarray(states)[places], groups) / self.limits[groups]
        found: list[float | None] = [None] * len(labels)
        for place, score in zip(places, np.nan_to_num(distances, nan=MOST).clip(max=MOST).tolist(), strict=True):
            found[place] = round(score, 3)
        return found


def is_odd(cell: "Cell") -> bool:
    """Whether a cell is further from its class than most of that class's cells."""
    return cell.odd is not None and cell.odd > 1


__all__ = ["QUANTILE", "CellReference", "is_odd"]
