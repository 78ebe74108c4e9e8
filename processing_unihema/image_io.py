"""Opening images of every kind a microscope or a phone writes, as 8-bit RGB."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


# Images larger than this are reduced on opening: a whole slide does not fit into memory.
MAX_PIXELS = 64_000_000


class UnreadableImageError(ValueError):
    """An image file that is missing, empty, truncated or no image; the message names it and the remedy."""


def load_image(image: "str | Path | Image.Image | np.ndarray", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image as 8-bit RGB, upright.

    16-bit images are scaled by their own range, palettes resolved, transparency laid over white, CMYK and grayscale
    converted and EXIF rotation applied.

    Args:
        image (`str`, `Path`, `PIL.Image.Image` or `np.ndarray`): A file, an opened image, or pixels `[H, W]`,
            `[H, W, 1|3|4]`.
        max_pixels (`int`): Larger images are reduced to about this many pixels.

    Returns:
        `PIL.Image.Image`: Mode RGB.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
        TypeError: Not an image at all.
    """
    if isinstance(image, (str, Path)):
        return _open_file(Path(image), max_pixels)
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        return to_rgb(Image.fromarray(_to_8_bit(pixels)))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    raise TypeError(f"Expected a path, PIL image or array, got {type(image).__name__}.")


def _open_file(path: Path, max_pixels: int) -> Image.Image:
    if not path.is_file():
        raise UnreadableImageError(f"{path}: no such image file. Check the path.")
    if path.stat().st_size == 0:
        raise UnreadableImageError(f"{path}: the file is empty. Copy it again from the microscope.")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as opened:
            shrink = (opened.width * opened.height / max_pixels) ** 0.5
            if shrink > 1:
                # JPEG decodes straight to a smaller size; other formats are reduced after decoding.
                opened.draft(opened.mode, (int(opened.width / shrink), int(opened.height / shrink)))
                opened.load()
                shrink = (opened.width * opened.height / max_pixels) ** 0.5
                if shrink > 1:
                    return to_rgb(opened.reduce(int(np.ceil(shrink))))
            opened.load()
            return to_rgb(opened)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{path}: not an image. Formats that work include PNG, JPEG, TIFF and BMP."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UnreadableImageError(
            f"{path}: the image is truncated or damaged ({error}). Copy it again or export it anew."
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


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
    """Integer or float pixels to uint8: by the type's range when they use more than 8 bits of it, else as they are."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    pixels = pixels.astype(np.float64)
    highest = float(pixels.max(initial=0))
    if highest <= 1:
        scale = 255.0
    elif highest <= 255:
        scale = 1.0
    else:
        # Cameras put 10, 12 or 14 bits into a 16-bit file.
        bits = int(np.ceil(np.log2(highest + 1)))
        scale = 255.0 / (2 ** max(bits, 8) - 1)
    return (pixels * scale).clip(0, 255).round().astype(np.uint8)
