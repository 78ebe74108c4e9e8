"""Image processor of UniHema: resize, pad and normalise for each task; annotations in, results in pixels out."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    pil_torch_interpolation_mapping,
)
from transformers.processing_utils import ImagesKwargs

from unihema.errors import InputError, InputTypeError
from unihema.modeling_unihema.remote_code import ProcessorWithCode
from unihema.modeling_unihema.tasks import TASK_TABLE, TASKS, check_task

from .annotations import detection_labels
from .image_io import check_numbers, image_size, load_image, load_mask
from .post_processing import (
    post_process_morphology,
    post_process_object_detection,
    post_process_semantic_segmentation,
)


FIELD_SIZE = {"shortest_edge": 480, "longest_edge": 640}
LARGEST_EDGE = 8192
CROP_SIZE = {"longest_edge": 192}


class UniHemaImageProcessorKwargs(ImagesKwargs, total=False):
    """Call arguments of [`UniHemaImageProcessor`] beyond those of every image processor."""

    task: str
    task_sizes: dict[str, dict[str, int]]
    pad_multiple: int
    invalid_boxes: str


class UniHemaImageProcessor(ProcessorWithCode, TorchvisionBackend):
    r"""Prepares images, with or without annotations, for a UniHema model.

    Images keep their aspect ratio: a task's size gives the shortest and longest edge they are resized to, up or down.
    A batch is padded at the right and bottom to its largest image, rounded up to a multiple of `pad_multiple`.

    Args:
        task_sizes (`dict[str, dict[str, int]]`, *optional*): For each task `shortest_edge` and/or `longest_edge` in pixels.
        pad_multiple (`int`, *optional*, defaults to 32): Padded sides are multiples of this.
        invalid_boxes (`str`, *optional*, defaults to `"error"`): Boxes outside the image or of zero area raise an error,
            or are dropped with a warning (`"drop"`).
        size (`dict[str, int]`, *optional*): The size of detection, another way to write `task_sizes["detection"]`.
    """

    valid_kwargs = UniHemaImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    do_convert_rgb = True
    default_to_square = False
    rescale_factor = 1 / 255
    task = "detection"
    pad_multiple = 32
    invalid_boxes = "error"
    task_sizes = None

    def __init__(self, **kwargs: Any):
        # Finding cells needs large fields of view; crops and images of questions may be smaller.
        sizes = {name: FIELD_SIZE if task.default_prompt else CROP_SIZE for name, task in TASK_TABLE.items()}
        # What a file names becomes an attribute, and no method of it.
        method = next((name for name in kwargs if name[:2] == "__" or callable(getattr(type(self), name, None))), None)
        if method is not None:
            raise InputError(f"{method[:80]!r} is no option of an image processor.")
        given = kwargs.pop("task_sizes", None) or {}
        if not isinstance(given, dict) or set(given) - set(TASKS):
            raise InputError(
                f"task_sizes is {repr(given)[:80]}, which has unknown tasks; tasks are {', '.join(TASKS)}."
            )
        sizes |= given
        if kwargs.get("size") is not None:
            sizes["detection"] = kwargs["size"]
        kwargs["task_sizes"] = {task: _size_dict(size) for task, size in sizes.items()}
        kwargs["size"] = kwargs["task_sizes"]["detection"]
        super().__init__(**kwargs)
        _check_options({name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__})

    @property
    def size(self) -> SizeDict:
        """The size of detection, which is stored in `task_sizes`."""
        return SizeDict(**self.task_sizes["detection"])

    @size.setter
    def size(self, size: int | dict[str, int] | SizeDict):
        self.task_sizes = {**(self.task_sizes or {}), "detection": _size_dict(size)}

    def __call__(self, images, annotations=None, masks=None, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: One image or a list: paths, PIL images, or arrays and tensors, channels first or last. Floats up
                to 1 count as 0..1; with `do_rescale=False` floats are taken as they are. All become RGB.
            annotations (`dict` or `list[dict]`, *optional*): COCO annotations of each image: `image_id` and
                `annotations`, each with `bbox` (x, y, width, height in pixels), `category_id` and optionally
                `iscrowd`, `area` and `morphology` (value indices, -100 missing).
            masks (*optional*): For each image a two-dimensional array or PIL image of its size, nonzero on cells.
            **kwargs: `task`, `size` (instead of the task's own), `pad_size` (instead of the largest image's),
                `input_data_format` (`"channels_first"` or `"channels_last"`, where the shape does not tell), `device`,
                and any other attribute of the processor.

        Returns:
            `BatchFeature`: `pixel_values` `[B, 3, H, W]`, `pixel_mask` `[B, H, W]` (1 on the image), and `labels`: a
            list of dictionaries for annotations, `[B, H, W]` int64 for masks (-100 on padding). PyTorch tensors on
            `device`, whatever `return_tensors` says.

        Raises:
            UnreadableImageError: An image file cannot be read.
            ValueError: No image, annotations or masks that do not fit the images, a `pad_size` smaller than an image,
                or cropping.
            TypeError: An argument the processor does not know.
        """
        return self.preprocess(images, annotations=annotations, masks=masks, **kwargs)

    def preprocess(self, images, annotations=None, masks=None, **kwargs: Any) -> BatchFeature:
        """See [`~UniHemaImageProcessor.__call__`]."""
        images = image_list(images)
        unknown = kwargs.keys() - self.valid_kwargs.__annotations__.keys()
        if unknown:
            raise InputTypeError(f"{type(self).__name__} has no argument {' and no '.join(sorted(unknown))}.")
        if annotations is not None and masks is not None:
            raise InputError("Give annotations or masks, not both: they are labels of different tasks.")
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, dict) else list(annotations)
            _check_count("annotations", annotations, images)
        if masks is not None:
            masks = list(masks) if isinstance(masks, (list, tuple)) else [masks]
            _check_count("masks", masks, images)
        given = {name: value for name, value in kwargs.items() if value is not None}
        options = {name: given.get(name, getattr(self, name, None)) for name in self.valid_kwargs.__annotations__}
        _check_options(options)
        if "size" not in given:
            check_task(options["task"])
            options["size"] = (self.task_sizes | options["task_sizes"])[options["task"]]
        options["size"] = _size_dict(options["size"])
        if options["do_center_crop"]:
            raise InputError("do_center_crop would cut cells off: give the part of the image to look at instead.")
        if options["data_format"] not in (None, ChannelDimension.FIRST):
            raise InputError(f"pixel_values are channels_first, not {options['data_format']}.")
        mean, std = (_of_channels(options[name]) for name in ("image_mean", "image_std"))
        device = options["device"]
        prepared, mask_maps, labels = [], [], []
        for index, image in enumerate(images):
            pixels = _as_pixels(image, options["do_rescale"], options["input_data_format"])
            opened = tuple(pixels.shape[-2:])
            # A very large file is reduced on opening, but its labels are in its own pixels.
            original = image_size(image) if isinstance(image, (str, Path)) else opened
            target = _fitted_size(original, options["size"]) if options["do_resize"] else opened
            pixels = self._resized(pixels, target, options["resample"], device)
            pixels = self.rescale_and_normalize(
                pixels,
                options["do_rescale"],
                float(options["rescale_factor"]),
                options["do_normalize"],
                mean,
                std,
            )
            prepared.append(pixels)
            if annotations is not None:
                found = detection_labels(annotations[index], index, original, target, options["invalid_boxes"])
                labels.append({name: value.to(pixels.device) for name, value in found.items()})
            if masks is not None:
                mask_maps.append(_mask_map(masks[index], index, original, target).to(pixels.device))
        data = self._pad_batch(
            prepared,
            options["pad_multiple"] if options["do_pad"] else 1,
            options["pad_size"] if options["do_pad"] else None,
        )
        if annotations is not None:
            data["labels"] = labels
        if masks is not None:
            height, width = data["pixel_values"].shape[-2:]
            data["labels"] = torch.stack(
                [
                    torch.nn.functional.pad(mask, (0, width - mask.shape[1], 0, height - mask.shape[0]), value=-100)
                    for mask in mask_maps
                ]
            )
        return BatchFeature(data)

    def normalise(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> torch.Tensor:
        """What a call makes of pixels, for a batch that was left in bytes (`do_rescale=False, do_normalize=False`) since these
        take a quarter of the memory on the way to the device.

        Args:
            pixel_values (`torch.Tensor`): uint8 `[B, 3, H, W]`.
            pixel_mask (`torch.Tensor`): `[B, H, W]`, 1 on the image.

        Returns:
            `torch.Tensor`: float32 `[B, 3, H, W]` on the same device, 0 on padding.
        """
        pixels = self.rescale_and_normalize(
            pixel_values,
            self.do_rescale,
            float(self.rescale_factor),
            self.do_normalize,
            _of_channels(self.image_mean),
            _of_channels(self.image_std),
        )
        return pixels.float() * pixel_mask[:, None]

    def scale(self, size: tuple[int, int], task: str = "detection") -> float:
        """Pixels that the model sees for each pixel of an image.

        Args:
            size (`tuple[int, int]`): Height and width of the image in pixels.
            task (`str`): One of the five tasks.
        """
        return max(_fitted_size(size, self.task_sizes[task])) / max(size) if self.do_resize else 1.0

    def reduced(self, pixels: torch.Tensor, task: str = "detection") -> torch.Tensor:
        """Pixels `[3, H, W]` at the size at which the model sees them, resized as a call would, if that is the smaller one."""
        size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        target = _fitted_size(size, self.task_sizes[task]) if self.do_resize else size
        if target[0] * target[1] >= size[0] * size[1]:
            return pixels
        return self._resized(pixels, target, self.resample, None)

    def _resized(
        self, pixels: torch.Tensor, target: tuple[int, int], resample: PILImageResampling, device
    ) -> torch.Tensor:
        """Pixels `[3, H, W]` of size `target`, on `device`."""
        pixels = pixels.to(device) if device else pixels
        mode = resampling(resample)
        if target == tuple(pixels.shape[-2:]):
            return pixels
        return tvf.resize(pixels, list(target), pil_torch_interpolation_mapping[mode], antialias=True)

    @staticmethod
    def _pad_batch(images: list[torch.Tensor], multiple: int, size) -> dict[str, torch.Tensor]:
        largest = [max(image.shape[side] for image in images) for side in (-2, -1)]
        height, width = (-(-side // multiple) * multiple for side in largest)
        if size is not None:
            size = get_size_dict(size, param_name="pad_size")
            if size.keys() != {"height", "width"}:
                raise InputError(f"pad_size needs height and width, got {' and '.join(size)}.")
            height, width = size["height"], size["width"]
            if height < largest[0] or width < largest[1]:
                raise InputError(
                    f"pad_size {height}x{width} is smaller than the batch's largest image, {largest[0]}x{largest[1]}."
                )
        dtype = reduce(torch.promote_types, (image.dtype for image in images))
        pixel_values = images[0].new_zeros(len(images), 3, height, width, dtype=dtype)
        pixel_mask = torch.zeros(len(images), height, width, dtype=torch.long, device=pixel_values.device)
        for row, image in enumerate(images):
            pixel_values[row, :, : image.shape[-2], : image.shape[-1]] = image
            pixel_mask[row, : image.shape[-2], : image.shape[-1]] = 1
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}

    def post_process_object_detection(self, outputs, threshold=0.3, target_sizes=None, **kwargs) -> list[dict]:
        """See [`post_process_object_detection`]."""
        return post_process_object_detection(outputs, threshold, target_sizes, **kwargs)

    def post_process_morphology(self, outputs, detections, attributes) -> list[list[dict]]:
        """See [`post_process_morphology`]."""
        return post_process_morphology(outputs, detections, attributes)

    def post_process_semantic_segmentation(self, outputs, target_sizes=None, **kwargs) -> list[torch.Tensor]:
        """See [`post_process_semantic_segmentation`]."""
        return post_process_semantic_segmentation(outputs, target_sizes, **kwargs)


# Saving it copies this file, and what it imports, beside its settings.
UniHemaImageProcessor.register_for_auto_class()


def _size_dict(size: Any) -> dict[str, int]:
    """A size as a dictionary of edges in pixels.

    Raises:
        InputError: It is none.
    """
    try:
        edges = dict(get_size_dict(size, default_to_square=False))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(f"{repr(size)[:80]} is no size of images; write shortest_edge and/or longest_edge.") from error
    for name, edge in edges.items():
        if edge is not None and not _is_number(edge, 1, LARGEST_EDGE, int):
            raise InputError(f"an image size has {name}={repr(edge)[:40]}; edges are 1 to {LARGEST_EDGE} pixels.")
    return edges


def _is_number(value: Any, least: float, most: float, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


# Options that are never without a value.
NEEDED = ("pad_multiple", "rescale_factor", "image_mean", "image_std", "invalid_boxes")


def _check_options(options: Mapping[str, Any]) -> None:
    """Checks what is given in a call, or stands in a file, before any pixel is touched by it.

    Raises:
        InputError: A value that an option cannot have.
    """
    checks = {name: lambda value: isinstance(value, bool) for name in options if name.startswith("do_")}
    checks |= {
        "pad_multiple": lambda value: _is_number(value, 1, 1024, int),
        "rescale_factor": lambda value: _is_number(value, -1e3, 1e3) and abs(value) >= 1e-6,
        "invalid_boxes": lambda value: value in ("error", "drop"),
        "task_sizes": lambda value: isinstance(value, dict) and not set(value) - set(TASKS),
    }
    for name, most in (("image_mean", 1e4), ("image_std", 1e4)):
        least = 1e-6 if name == "image_std" else -most
        checks[name] = lambda value, least=least, most=most: (
            len(values := value if isinstance(value, (list, tuple)) else [value]) in (1, 3)
            and all(_is_number(each, least, most) for each in values)
        )
    for name, check in checks.items():
        value = options.get(name)
        if (value is not None or name in NEEDED) and not check(value):
            raise InputError(f"{name} cannot be {repr(value)[:60]}: see the options of UniHemaImageProcessor.")
    if options.get("resample") is not None:
        resampling(options["resample"])


def _check_count(name: str, values: Sequence, images: Sequence) -> None:
    if len(values) != len(images):
        raise InputError(f"{len(values)} {name} for {len(images)} images: give one for each image.")


def _of_channels(value) -> tuple[float, ...]:
    return (float(value),) * 3 if np.ndim(value) == 0 else tuple(value)


def image_list(images) -> list:
    """One image, a list of them, or a batch as one array or tensor `[B, ...]`, as a list.

    Raises:
        ValueError: No image.
    """
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        images = [image[0] if isinstance(image, (list, tuple)) and len(image) == 1 else image for image in images]
    else:
        images = [images]
    if not images:
        raise InputError("The list of images is empty: give at least one image.")
    return images


def _as_pixels(image, rescaled: bool, channels: str | None = None) -> torch.Tensor:
    """Any image as a tensor `[3, H, W]`: uint8, or the floats that came if they will not be rescaled."""
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        if not isinstance(image, (str, Path, Image.Image)):
            raise InputTypeError(
                f"Expected images as paths, PIL images, arrays or tensors, got {type(image).__name__}."
            )
        return torch.from_numpy(np.array(load_image(image))).permute(2, 0, 1)
    pixels = torch.as_tensor(_as_native(image) if isinstance(image, np.ndarray) else image.detach())
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and channels is not None:
        pixels = pixels.permute(2, 0, 1) if ChannelDimension(channels) == ChannelDimension.LAST else pixels
    elif pixels.ndim == 3:
        first, last = pixels.shape[0] in (1, 3, 4), pixels.shape[-1] in (1, 3, 4)
        # Where both ends could be the channels, tensors are channels first and arrays channels last.
        if last and (not first or isinstance(image, np.ndarray)):
            pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4) or not pixels.numel():
        raise InputError(
            "Pixels must be [H, W], or have 1, 3 or 4 channels first or last, and not be empty; got shape "
            f"{tuple(image.shape)}."
        )
    if pixels.is_floating_point():
        pixels = pixels.float()
    if pixels.dtype == torch.uint8 or (pixels.is_floating_point() and not rescaled):
        if pixels.shape[0] != 4:
            return pixels.expand(3, -1, -1)
        if pixels.is_floating_point():
            colours, opacity = pixels.split((3, 1))
            return colours * opacity + (1 - opacity)
    opened = load_image(pixels.permute(1, 2, 0).cpu().numpy())
    return torch.from_numpy(np.array(opened)).permute(2, 0, 1).to(pixels.device)


def _as_native(pixels: np.ndarray) -> np.ndarray:
    """An array as PyTorch takes it: contiguous, writable (what PIL gives is not) and in the byte order of this machine.

    Raises:
        TypeError: Its entries are no real numbers.
    """
    check_numbers(pixels)
    native = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))
    return native if native.flags.writeable else native.copy()


def _fitted_size(original: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """`(h, w)` after resizing, aspect ratio kept: the shortest edge as asked unless the longest would exceed its own."""
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    short, long = min(original), max(original)
    scales = []
    if size.get("shortest_edge"):
        scales.append(size["shortest_edge"] / short)
    if size.get("longest_edge"):
        scales.append(size["longest_edge"] / long)
    if not scales:
        raise InputError(f"size needs shortest_edge, longest_edge, or height and width; got {size}.")
    return tuple(max(1, round(side * min(scales))) for side in original)


def resampling(resample: PILImageResampling | int) -> PILImageResampling:
    """The resampling filter, checked to be one that both backends and every device support.

    Raises:
        ValueError: It is not.
    """
    if isinstance(resample, bool) or not isinstance(resample, int) or resample not in (0, 2, 3):
        raise InputError(f"resample must be 0 (nearest), 2 (bilinear) or 3 (bicubic), got {repr(resample)[:40]}.")
    return PILImageResampling(int(resample))


def _mask_map(mask, index: int, original: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """A mask as int64 `[h, w]` of 0 and 1, resized by nearest neighbour."""
    values = torch.as_tensor(load_mask(mask) if isinstance(mask, (str, Path)) else np.array(mask))
    if tuple(values.shape) != original:
        raise InputError(
            f"Mask {index} has shape {tuple(values.shape)}, its image {original}: a mask is two-dimensional and of its "
            "image's size."
        )
    mask = (values != 0)[None].to(torch.uint8)
    return tvf.resize(mask, list(target), tvf.InterpolationMode.NEAREST_EXACT)[0].long()
