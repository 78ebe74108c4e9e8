"""Images looked at within the memory of a device."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from unihema.files import OpenedImage
from unihema.request import Request
from unihema.results.smear_result import SmearResult


if TYPE_CHECKING:
    from PIL import Image

    from unihema.analyzer import Analyzer


SMALL_MEMORY = (
    "The device has not enough memory for one image at this size, so the processor does the rest, more slowly."
)


class OutOfMemoryWarning(UserWarning):
    """The device has not enough memory, so the processor goes on with the work."""


class WithinMemory:
    """Looks at images in as large groups as the device has memory for; where it has none for a single one, the processor does.

    Args:
        request ([`Request`]): What is asked.
        look (`Callable`): Looks at images on the device.
        on_cpu (`Callable`): Gives what does so on the processor.
    """

    def __init__(
        self,
        request: Request,
        look: Callable[[Request, Sequence[OpenedImage]], list[SmearResult]],
        on_cpu: Callable[[], "Analyzer | None"],
    ):
        self._request, self._look, self._on_cpu = request, look, on_cpu
        self._most: int | None = None
        self.warnings: list[str] = []

    def look_at_parts(self, parts: "Sequence[Image.Image]") -> list[SmearResult]:
        """What is seen of parts of images."""
        return self.look([OpenedImage(part, part.width, part.height, None) for part in parts])

    def look(self, images: Sequence[OpenedImage]) -> list[SmearResult]:
        """What is seen of whole images."""
        import torch

        found: list[SmearResult] = []
        while len(found) < len(images):
            group = images[len(found) : len(found) + (self._most or len(images))]
            try:
                found += self._look(self._request, group)
                continue
            except torch.OutOfMemoryError:
                on_cpu = self._on_cpu() if len(group) == 1 else None
                if len(group) == 1 and on_cpu is None:
                    raise
            # Not before: the error's traceback holds on to what fills the memory.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if on_cpu is None:
                self._most = len(group) // 2
                continue
            warnings.warn(SMALL_MEMORY, OutOfMemoryWarning, stacklevel=5)
            self.warnings.append(SMALL_MEMORY)
            self._look, self._on_cpu = on_cpu.look, lambda: None
            self._request = on_cpu.request(*self._request.asked)
        return found


__all__ = ["OutOfMemoryWarning", "WithinMemory"]
