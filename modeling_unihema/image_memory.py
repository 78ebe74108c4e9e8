"""The states of the image last asked about, so that a conversation on one image looks at it once."""

import torch
from torch import nn

from .kept_results import keeping_state
from .visual_backbone import FeatureLevels


class ImageMemory:
    """Keeps the feature levels of one batch of images, and gives them again for the same pixels and weights.

    Only in evaluation without gradients. Holding the pixels costs as much memory as they have; comparing them takes less
    than a millisecond for a field of view.
    """

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Frees what is kept."""
        self._key: tuple | None = None
        self._images: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._levels: FeatureLevels | None = None

    def __call__(
        self, visual_backbone: nn.Module, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
    ) -> FeatureLevels:
        """The feature levels of these images.

        Args:
            visual_backbone (`nn.Module`): Makes them where they are not known.
            pixel_values (`torch.Tensor`): `[B, 3, H, W]`.
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`.
        """
        key = keeping_state(visual_backbone)
        if key is None:
            return visual_backbone(pixel_values, pixel_mask)
        if key != self._key or not _same(self._images, (pixel_values, pixel_mask)):
            self._levels = visual_backbone(pixel_values, pixel_mask)
            self._key = key
            self._images = (pixel_values.clone(), None if pixel_mask is None else pixel_mask.clone())
        return self._levels

    def __deepcopy__(self, memo) -> "ImageMemory":
        return ImageMemory()


def _same(a: tuple | None, b: tuple) -> bool:
    if a is None:
        return False
    return all(
        x is y
        or (x is not None and y is not None and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y))
        for x, y in zip(a, b)
    )


__all__ = ["ImageMemory"]
