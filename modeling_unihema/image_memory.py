"""The states of the image last looked at, so that a conversation about it, or another task on it, looks at it once."""

from typing import NamedTuple

import torch
from torch import nn

from .kept_results import is_watched, keeping_state
from .visual_backbone import FeatureLevels


class _Looked(NamedTuple):
    """What the backbone made of a batch of images, and what that belongs to."""

    state: tuple
    images: tuple[torch.Tensor, torch.Tensor | None]
    levels: FeatureLevels


class _Encoded(NamedTuple):
    """What the image encoder made of feature levels."""

    state: tuple
    levels: FeatureLevels
    tokens: torch.Tensor


class ImageMemory:
    """Keeps the feature levels of one batch of images and their encoded tokens, and gives them again for the same pixels and
    weights.

    Only in evaluation without gradients, and not while someone's hook waits for a layer of these parts to run. Holding the
    pixels costs as much memory as they have; comparing them takes less than a millisecond for a field of view.
    """

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Frees what is kept."""
        self._looked: _Looked | None = None
        self._encoded: _Encoded | None = None

    def levels(
        self, visual_backbone: nn.Module, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
    ) -> FeatureLevels:
        """The feature levels of these images.

        Args:
            visual_backbone (`nn.Module`): Makes them where they are not known.
            pixel_values (`torch.Tensor`): `[B, 3, H, W]`.
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`.
        """
        state = keeping_state(visual_backbone)
        if state is None:
            return visual_backbone(pixel_values, pixel_mask)
        # Read once: another thread may look at another image meanwhile.
        looked = None if is_watched(visual_backbone) else self._looked
        if looked is None or looked.state != state or not _same(looked.images, (pixel_values, pixel_mask)):
            # Not both at once in memory, the last image's and this one's.
            del looked
            self.forget()
            images = pixel_values.clone(), None if pixel_mask is None else pixel_mask.clone()
            looked = self._looked = _Looked(state, images, visual_backbone(pixel_values, pixel_mask))
        return looked.levels

    def tokens(self, image_encoder: nn.Module, levels: FeatureLevels) -> torch.Tensor:
        """The encoded tokens `[B, S, d]` of feature levels; kept for those that [`ImageMemory.levels`] keeps.

        Args:
            image_encoder (`nn.Module`): Makes them where they are not known.
            levels ([`FeatureLevels`]): Of a batch of images.
        """
        looked, encoded = self._looked, self._encoded
        state = keeping_state(image_encoder) if looked is not None and looked.levels is levels else None
        if state is None:
            return image_encoder(levels.tokens, levels)
        if encoded is None or is_watched(image_encoder) or encoded.levels is not levels or encoded.state != state:
            encoded = self._encoded = _Encoded(state, levels, image_encoder(levels.tokens, levels))
        # A copy: they are in the model's output, where a caller may write into them.
        return encoded.tokens.clone()

    def __reduce__(self) -> tuple:
        # Neither a copy nor a file holds someone's images.
        return ImageMemory, ()


def _same(a: tuple, b: tuple) -> bool:
    return all(
        x is y
        or (x is not None and y is not None and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y))
        for x, y in zip(a, b)
    )


__all__ = ["ImageMemory"]
