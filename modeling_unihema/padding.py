"""An image gives the same result alone and in a padded batch: convolutions and norms that do not see padding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import local

import torch
from torch import nn


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording; code must then not depend on tensor values."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


# Valid pixels of the batch in the running forward pass. Layers of other libraries take a map only, so they read this.
# It is set and reset within one call, for each thread. torch.compile traces a `local`, but no `ContextVar`.
_running = local()


def _valid_pixels() -> torch.Tensor | None:
    return getattr(_running, "valid_pixels", None)


def valid_at(pixels: torch.Tensor | None, maps: torch.Tensor) -> torch.Tensor | None:
    """The valid area at the size of a feature map.

    A map of stride s has one valid cell for every s valid pixels, rounded up, as the image has alone.

    Args:
        pixels (`torch.Tensor`, *optional*): Boolean `[B, H, W]`, `True` on the image.
        maps (`torch.Tensor`): `[B, C, h, w]`, made from these pixels.

    Returns:
        `torch.Tensor`: Boolean `[B, h, w]`; `None` without `pixels`.
    """
    if pixels is None or pixels.shape[-2:] == maps.shape[-2:]:
        return pixels
    rows, columns = strides(pixels.shape[-2:], maps.shape[-2:])
    valid = pixels[:, ::rows, ::columns]
    if valid.shape[-2:] != maps.shape[-2:]:
        valid = nn.functional.interpolate(pixels[:, None].float(), size=maps.shape[-2:])[:, 0] > 0.5
    return valid


def strides(full: Sequence[int], part: Sequence[int]) -> list[int]:
    """Strides of a map of size `part` that was made from size `full` by repeated halving, rounded up, or down if only that
    gives `part`."""
    found = []
    for whole, cells in zip(full, part):
        stride = 1
        # Compared as integers, which a graph traced for any size can record.
        while -(-whole // stride) > cells:
            stride *= 2
        found.append(stride if -(-whole // stride) == cells else stride // 2)
    return found


def hold_edge(maps: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Repeats the last valid row and column over the padding, as interpolation does at the edge of a map.

    Args:
        maps (`torch.Tensor`): `[B, C, h, w]`.
        valid (`torch.Tensor`, *optional*): Boolean `[B, h, w]`, a rectangle from the upper left corner.

    Returns:
        `torch.Tensor`: `[B, C, h, w]`.
    """
    if valid is None:
        return maps
    for axis, count in ((2, valid[:, :, 0].sum(1)), (3, valid[:, 0].sum(1))):
        place = torch.arange(maps.shape[axis], device=maps.device).expand(maps.shape[0], -1)
        place = torch.minimum(place, (count - 1)[:, None])
        shape = [maps.shape[0], 1, 1, 1]
        shape[axis] = maps.shape[axis]
        maps = maps.gather(axis, place.view(shape).expand_as(maps))
    return maps


@contextmanager
def without_padding(pixels: torch.Tensor | None) -> Iterator[None]:
    """Context in which layers prepared by [`ignore_padding`] treat padding as outside the image.

    Args:
        pixels (`torch.Tensor`, *optional*): Boolean `[B, H, W]`, `True` on the image; `None` changes nothing.
    """
    if pixels is None:
        yield
        return
    before = _valid_pixels()
    _running.valid_pixels = pixels
    try:
        yield
    finally:
        _running.valid_pixels = before


def ignore_padding(module: nn.Module) -> None:
    """Prepares every convolution and pooling in `module` that looks at neighbours.

    Layers that mix a whole map (attention, squeeze-and-excitation) still see padding.

    Args:
        module (`nn.Module`): A backbone, or any module.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) and part.kernel_size not in (1, (1, 1)):
            part.register_forward_pre_hook(_blank_padding)
        if isinstance(part, nn.MaxPool2d):
            part.register_forward_hook(_blank_result)


def filled(maps: torch.Tensor, valid: torch.Tensor, blank: float) -> torch.Tensor:
    """Maps `[B, C, h, w]` with `blank` where `valid`, boolean `[B, h, w]`, is `False`."""
    # `masked_fill` takes four times as long where channels are last in memory.
    return torch.where(valid[:, None], maps, blank)


def image_sizes(valid: torch.Tensor) -> list[tuple[int, int]] | None:
    """Height and width of each image's valid area; `None` on other devices than a CPU, with gradients, or in a traced graph.

    Args:
        valid (`torch.Tensor`): Boolean `[B, h, w]`.

    Returns:
        `list[tuple[int, int]]`: `None` also where an area is no rectangle from the upper left corner.
    """
    if is_traced() or torch.is_grad_enabled() or valid.device.type != "cpu":
        return None
    sizes = list(zip(valid[:, :, 0].sum(1).tolist(), valid[:, 0].sum(1).tolist()))
    return sizes if valid.sum((1, 2)).tolist() == [height * width for height, width in sizes] else None


def _blank_padding(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    pixels = _valid_pixels()
    if pixels is None:
        return None
    maps = inputs[0]
    # Outside an image a pooling ignores pixels, and a convolution reads zeros.
    blank = torch.finfo(maps.dtype).min if isinstance(module, nn.MaxPool2d) else 0.0
    return (filled(maps, valid_at(pixels, maps), blank), *inputs[1:])


def blanked_in_place(maps: torch.Tensor) -> torch.Tensor:
    """Maps `[B, C, h, w]` with zeros in their padding, written in place where possible, which saves a copy. Only for maps
    whose padding nothing else reads."""
    pixels = _valid_pixels()
    if pixels is None:
        return maps
    valid = valid_at(pixels, maps)
    sizes = image_sizes(valid)
    if sizes is None:
        return filled(maps, valid, 0.0)
    for image, (height, width) in zip(maps, sizes):
        image[:, height:] = 0.0
        image[:, :, width:] = 0.0
    return maps


def _blank_result(module: nn.Module, inputs: tuple[torch.Tensor, ...], maps: torch.Tensor) -> torch.Tensor | None:
    # A window of padding only gives the smallest float, which would overflow in the layers that adapters add.
    pixels = _valid_pixels()
    return None if pixels is None else filled(maps, valid_at(pixels, maps), 0.0)


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm whose mean and variance are those of the image, not of its padding, which becomes 0."""

    def forward(self, maps: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            maps (`torch.Tensor`): `[B, C, h, w]`.
            valid (`torch.Tensor`, *optional*): Boolean `[B, h, w]`.

        Returns:
            `torch.Tensor`: `[B, C, h, w]`.
        """
        if valid is None:
            return super().forward(maps)
        if (sizes := image_sizes(valid)) is not None:
            normed = torch.zeros_like(maps)
            for image, result, (height, width) in zip(maps, normed, sizes):
                result[:, :height, :width] = super().forward(image[None, :, :height, :width])[0]
            return normed
        groups = maps.float().unflatten(1, (self.num_groups, -1))
        weight = valid[:, None, None].to(groups.dtype)
        count = weight.sum((2, 3, 4), keepdim=True) * groups.shape[2]
        mean = (groups * weight).sum((2, 3, 4), keepdim=True) / count
        variance = ((groups - mean).square() * weight).sum((2, 3, 4), keepdim=True) / count
        normed = ((groups - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        scaled = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return filled(scaled.to(maps.dtype), valid, 0.0)
