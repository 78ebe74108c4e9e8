"""How far the work on one image is."""

from collections.abc import Callable
from typing import Literal, NamedTuple


class Progress(NamedTuple):
    """How much of an image has been seen.

    Args:
        image (`str`, *optional*): Path of the image.
        unit (`"tile"` or `"crop"`): What is looked at: the tiles of an image, then the crops of its cells.
        done, total (`int`): How many of these have been seen, and how many there are.
        cells (`int`): Cells found in the tiles that are done.
    """

    image: str | None
    unit: Literal["tile", "crop"]
    done: int
    total: int
    cells: int


OnProgress = Callable[[Progress], None]

__all__ = ["OnProgress", "Progress"]
