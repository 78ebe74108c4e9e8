"""The image processor with PIL in place of torchvision for resizing: `AutoImageProcessor`'s backend `"pil"`."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_processing_unihema import UniHemaImageProcessor, resampling


class UniHemaImageProcessorPil(UniHemaImageProcessor):
    """[`UniHemaImageProcessor`] that resizes with PIL, on the CPU; results are PyTorch tensors all the same.

    With bilinear resizing, the default, pixels of the two differ by at most one level of 255. Each loads what the other saved.
    """

    @property
    def backend(self) -> str:
        """Name of the backend in `AutoImageProcessor`."""
        return "pil"

    def to_dict(self) -> dict[str, Any]:
        """The settings to save, under the name both backends share."""
        settings = super().to_dict()
        settings["image_processor_type"] = settings["image_processor_type"].removesuffix("Pil")
        return settings

    def _resized(self, pixels: torch.Tensor, target: tuple[int, int], resample, device) -> torch.Tensor:
        mode = resampling(resample)
        if target != tuple(pixels.shape[-2:]):
            # PIL has no images of three float channels.
            planes = [
                np.array(Image.fromarray(plane).resize(target[::-1], mode))
                for plane in pixels.cpu().contiguous().numpy()
            ]
            device = device or pixels.device
            pixels = torch.from_numpy(np.stack(planes))
        return pixels.to(device) if device else pixels


# Saving it copies this file, and what it imports, beside its settings.
UniHemaImageProcessorPil.register_for_auto_class()
