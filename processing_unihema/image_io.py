"""Opening images of every kind a microscope or a phone writes, as 8-bit RGB."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unihema.errors import InputError, InputTypeError, UnreadableImageError


# Suffixes of image files, in lower case.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".jp2")
# Images larger than this are reduced on opening: a whole slide does not fit into memory.
MAX_PIXELS = 64_000_000
_ORIENTATION = 0x0112
# Modes that PIL cannot average over blocks of pixels, and the mode to convert them to first.
_BEFORE_REDUCING = {"1": "L", "P": "RGBA", "PA": "RGBA", "I;16": "I", "I;16L": "I", "I;16B": "I", "I;16N": "I"}
# PIL keeps its limit of pixels in a global.
_opening = threading.Lock()


def load_image(image: "str | Path | bytes | Image.Image | np.ndarray", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image as 8-bit RGB, upright.

    16-bit images are scaled by the bits in use, palettes resolved, transparency laid over white, CMYK and grayscale
    converted and EXIF rotation applied.

    Args:
        image (`str`, `Path`, `bytes`, `PIL.Image.Image` or `np.ndarray`): A file, its content, an opened image, or pixels
            `[H, W]`, `[H, W, 1|3|4]`.
        max_pixels (`int`): Larger files are reduced to about this many pixels; [`image_size`] tells their own size.

    Returns:
        `PIL.Image.Image`: Mode RGB.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
        ValueError: Pixels of another shape.
        TypeError: Not an image at all.
    """
    if isinstance(image, (str, Path, bytes)):
        with _reading(image) as opened:
            return to_rgb(_reduced(opened, max_pixels))
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        if pixels.size == 0 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)):
            raise InputError(f"Pixels must be [H, W] or [H, W, 1|3|4] and not empty, got shape {image.shape}.")
        return to_rgb(Image.fromarray(_to_8_bit(pixels)))
    if isinstance(image, Image.Image):
        # A file that PIL has opened is only read now.
        with _naming(getattr(image, "filename", None) or "image"):
            return to_rgb(image)
    raise InputTypeError(f"Expected a path, bytes, PIL image or array, got {type(image).__name__}.")


def load_mask(path: "str | Path") -> np.ndarray:
    """The values of a mask file as they are, `[H, W]`, or with channels if the file has them.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
    """
    with _reading(path) as opened:
        return np.array(opened)


def image_size(image: "str | Path | bytes | Image.Image") -> tuple[int, int]:
    """Height and width of an upright image in pixels; those of its file, however [`load_image`] reduces it.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
    """
    if isinstance(image, (str, Path, bytes)):
        with _reading(image) as opened:
            return image_size(opened)
    sideways = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size if sideways else image.size[::-1]


@contextmanager
def _reading(file: "str | Path | bytes") -> Iterator[Image.Image]:
    """An image file, or its content, opened whatever its size; what goes wrong is an [`UnreadableImageError`]."""
    content = isinstance(file, bytes)
    name = "image" if content else file
    # A text that is too long for a file name is not one.
    if not content and not os.path.isfile(file):
        raise UnreadableImageError(f"{name}: no such image file. Check the path.")
    with _naming(name):
        if (len(file) if content else os.path.getsize(file)) == 0:
            raise UnreadableImageError(f"{name}: the file is empty. Copy it again from the microscope.")
        with _opening:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                opened = Image.open(BytesIO(file) if content else file)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with opened:
            yield opened


@contextmanager
def _naming(name: "str | Path") -> Iterator[None]:
    try:
        yield
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{name}: not an image. Formats that work include PNG, JPEG, TIFF and BMP."
        ) from error
    except PermissionError as error:
        raise UnreadableImageError(f"{name}: the file may not be read. Change its permissions.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UnreadableImageError(
            f"{name}: the image is truncated or damaged ({error}). Copy it again or export it anew."
        ) from error


def _reduced(opened: Image.Image, max_pixels: int) -> Image.Image:
    """An opened file with at most about `max_pixels` pixels, averaged over blocks."""
    shrink = (opened.width * opened.height / max_pixels) ** 0.5
    if shrink > 1:
        # JPEG decodes straight to a smaller size; other formats are reduced after decoding.
        opened.draft(opened.mode, (int(opened.width / shrink), int(opened.height / shrink)))
        shrink = (opened.width * opened.height / max_pixels) ** 0.5
    opened.load()
    if shrink <= 1:
        return opened
    mode = _BEFORE_REDUCING.get(opened.mode)
    if mode is None:
        return opened.reduce(int(np.ceil(shrink)))
    return opened.convert(mode).reduce(int(np.ceil(shrink)))


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as upright 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image.copy() if getattr(image, "fp", None) else image
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Pixels to uint8: floats up to 1 are scaled from 0..1, more than 8 bits by the bits in use, others kept."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    fractions = np.issubdtype(pixels.dtype, np.floating)
    pixels = pixels.astype(np.float64)
    if fractions:
        pixels = np.where(np.isfinite(pixels), pixels, 0.0)
    highest = float(pixels.max(initial=0))
    if fractions and highest <= 1:
        scale = 255.0
    elif highest <= 255:
        scale = 1.0
    else:
        # Cameras put 10, 12 or 14 bits into a 16-bit file.
        bits = int(np.ceil(np.log2(highest + 1)))
        scale = 255.0 / (2 ** max(bits, 8) - 1)
    return (pixels * scale).clip(0, 255).round().astype(np.uint8)
