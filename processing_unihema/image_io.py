"""Opening images of every kind a microscope or a phone writes, as 8-bit RGB."""

import os
import re
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

from unihema.errors import InputError, InputTypeError, UnreadableImageError


# Suffixes of image files, in lower case.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".jp2")
# Of slide scanners, in formats that need a library of their own; those that end with `.svs` are TIFFs.
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide")
# Images larger than this are reduced on opening: a whole slide does not fit into memory.
MAX_PIXELS = 64_000_000
# An image that needs more memory than this, and is so much larger than its file, is damaged or an attack.
MAX_BYTES = 1 << 29
MAX_COMPRESSION = 200
# Pages of a TIFF that are looked at.
MAX_PAGES = 4096
# Planes of a stack whose focus is measured, and the side of the window in their middle where it is, in pixels.
MOST_PLANES, FOCUS_WINDOW = 32, 1024
# Share of pixels that may be brighter than white: hot pixels, and a burned-in scale bar, all of whose pixels are equal.
HOT_PIXELS = 0.001
SCALE_BAR = 0.05
# Filters overshoot white, and undershoot black, by up to this share of the range.
OVERSHOOT = 0.25

_ORIENTATION = 0x0112
_WIDTH, _HEIGHT = 256, 257
_BITS, _COMPRESSION, _PHOTOMETRIC, _DESCRIPTION, _SAMPLES, _MAX_VALUE, _PLANAR = 258, 259, 262, 270, 277, 281, 284
_PAGE_KIND, _SAMPLE_FORMAT, _MAX_SIGNED = 254, 339, 341
_PHOTOMETRICS = {0: "gray, white is 0", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
_SAMPLE_FORMATS = {1: "", 2: "signed", 3: "float", 5: "complex", 6: "complex float"}
# What PIL cannot average over blocks of pixels, and what to convert it to first.
_BEFORE_REDUCING = {"1": "L", "P": "RGBA", "PA": "RGBA", "I;16": "I", "I;16L": "I", "I;16B": "I", "I;16N": "I"}
# Bytes a pixel takes on its way to RGB; those of two decodings where PIL gives half of the bits.
_BYTES_OF_MODE = {"1": 2, "L": 1, "I": 12, "F": 12}
_BYTES_OF_DEEP_COLOUR = 24
# What PIL's readers raise at damaged files, beside errors of files and values.
_DAMAGE = (
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    Image.DecompressionBombError,
)
# Micrometres that a pixel of a microscope's image can have: the 72, 96 or 300 dots an inch of cameras and editors are far beyond.
LOW_MICROMETRES, HIGH_MICROMETRES = 0.02, 2.0
# Names of units of length, in micrometres; `pixel` is none.
_UNITS = {
    **dict.fromkeys(
        ("um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer", "micrometre", "\\u00b5m", "&#181;m"), 1.0
    ),
    **{"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0, "in": 25400.0},
}
# PIL keeps its limit of pixels in a global.
_opening = threading.Lock()


class RefusedImageError(UnreadableImageError):
    """An image file that can be decoded, and what it holds are no colours: no other reader may guess at it either."""


class ImageReadWarning(UserWarning):
    """Something about the pixels of an image was guessed, or left out, because its file does not say."""


def load_image(image: "str | Path | bytes | Image.Image | np.ndarray", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image as 8-bit RGB, upright.

    What [`read_image`] says about it is given as an [`ImageReadWarning`].

    Args:
        image (`str`, `Path`, `bytes`, `PIL.Image.Image` or `np.ndarray`): As for [`read_image`].
        max_pixels (`int`): As there.

    Returns:
        `PIL.Image.Image`: Mode RGB.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
        ValueError: Pixels of another shape or range.
        TypeError: Not an image at all.
    """
    opened, notes = read_image(image, max_pixels)
    for note in notes:
        # Without the file's name, so that Python shows each kind once.
        warnings.warn(note, ImageReadWarning, stacklevel=2)
    return opened


def read_image(
    image: "str | Path | bytes | Image.Image | np.ndarray", max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, list[str]]:
    """Opens an image as 8-bit RGB, upright, and says what had to be guessed.

    Palettes are resolved, transparency laid over white, CMYK, Lab, grayscale and inverted grayscale converted and EXIF
    rotation applied. Pixels of more than 8 bits are scaled by the bit depth that the file states (OME `SignificantBits`, PNG
    `sBIT`, TIFF `MaxSampleValue`), else by the bits that its pixels use; hot pixels and a burned-in scale bar do not count.
    Three gray pages of a TIFF are red, green and blue; of a z-stack the plane in focus is read, of a time series the first.

    Args:
        image (`str`, `Path`, `bytes`, `PIL.Image.Image` or `np.ndarray`): A file, its content, an opened image, or pixels
            `[H, W]`, `[H, W, 1|3|4]`. Floats are 0..1 or 0..255.
        max_pixels (`int`): Larger files are reduced to about this many pixels; [`image_size`] tells their own size.

    Returns:
        `tuple[PIL.Image.Image, list[str]]`: The image in mode RGB, and a sentence for each guess.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
        ValueError: Pixels of another shape or range.
        TypeError: Not an image at all.
    """
    if isinstance(image, (str, Path, bytes)):
        return _read(image, "image" if isinstance(image, bytes) else image, max_pixels)
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        if pixels.size == 0 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)):
            raise InputError(f"Pixels must be [H, W] or [H, W, 1|3|4] and not empty, got shape {image.shape}.")
        check_numbers(pixels)
        notes: list[str] = []
        return to_rgb(Image.fromarray(_to_8_bit(pixels, notes))), notes
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", None) or "image"
        # A file that PIL has opened is only read now.
        with _naming(name):
            content = _unread_content(image)
            if content is not None:
                return _read(content, name, None)
            notes = []
            return to_rgb(image, notes), notes
    raise InputTypeError(f"Expected a path, bytes, PIL image or array, got {type(image).__name__}.")


def check_numbers(pixels: np.ndarray) -> None:
    """Checks that the entries of an array are real numbers or truth values.

    Raises:
        TypeError: They are not.
    """
    if pixels.dtype.kind not in "buif":
        raise InputTypeError(f"Pixels must be real numbers, got an array of {pixels.dtype}.")


def load_mask(path: "str | Path") -> np.ndarray:
    """The values of a mask file as they are, `[H, W]`, or with channels if the file has them.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
    """
    with _reading(path, path) as opened:
        _check_memory(opened, path)
        with _pil():
            return np.array(opened)


def stored_size(image: "str | Path | bytes") -> tuple[int, int]:
    """Width and height of an image as the beginning of its file states them, however it is turned. Nothing is decoded.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
    """
    with _reading(image, "image" if isinstance(image, bytes) else image) as opened:
        return opened.size


def image_size(image: "str | Path | bytes | Image.Image") -> tuple[int, int]:
    """Height and width of an upright image in pixels; those of its file, however [`load_image`] reduces it.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
    """
    if isinstance(image, (str, Path, bytes)):
        name = "image" if isinstance(image, bytes) else image
        with _reading(image, name) as opened:
            if opened.format == "PNG" and _says_more_behind_its_pixels(opened):
                _check_memory(opened, name, image)
            return image_size(opened)
    with _pil():
        exif = image.getexif() if _says_more_behind_its_pixels(image) else Image.Image.getexif(image)
        sideways = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)
    if sideways and image.format == "TIFF":
        # Releases of PIL differ in whether the size of a TIFF that is not read yet is upright.
        (width,), (height,) = _numbers(image, _WIDTH), _numbers(image, _HEIGHT)
        return width, height
    return image.size if sideways else image.size[::-1]


def pixel_size(path: "str | Path") -> tuple[float, str] | None:
    """How many micrometres a pixel of an image file is wide, and where that stands in it; `None` where nothing plausible does.

    Read are what OME, ImageJ and Aperio write into a TIFF's description, and the resolution of TIFF, PNG and JPEG files.

    Raises:
        UnreadableImageError: The file cannot be read as an image.
    """
    with _reading(path, path) as opened:
        description = _description(opened) if opened.format == "TIFF" else ""
        with _pil():
            dots = opened.info.get("dpi")
            # A resolution of a unit that is not said: that of ImageJ stands in its description.
            bare = opened.info.get("resolution") if dots is None and opened.format == "TIFF" else None
        return described_pixel_size(description, bare) or plausible_pixel_size(
            _inverse(dots, _UNITS["inch"]), f"the resolution of the {opened.format}"
        )


def described_pixel_size(description: str, resolution: object = None) -> tuple[float, str] | None:
    """Micrometres of a pixel by a TIFF's description, and who wrote them there; `None` where it says nothing plausible.

    Args:
        description (`str`): The description.
        resolution (`tuple`, *optional*): Pixels for each of ImageJ's units along x and y.
    """
    if "<Pixels" in description:
        pixels = description[description.index("<Pixels") :].partition(">")[0]
        sizes = []
        for axis in "XY":
            size = re.search(rf'\bPhysicalSize{axis}\s*=\s*"([^"]{{1,40}})"', pixels)
            unit = re.search(rf'\bPhysicalSize{axis}Unit\s*=\s*"([^"]{{1,20}})"', pixels)
            sizes.append(_number(size[1] if size else None) * (_unit(unit[1]) if unit else 1.0))
        return plausible_pixel_size(tuple(sizes), "OME metadata")
    if description.startswith("ImageJ="):
        unit = re.search(r"^unit=(.{1,20}?)\s*$", description, re.MULTILINE)
        return plausible_pixel_size(_inverse(resolution, _unit(unit[1]) if unit else 0.0), "ImageJ metadata")
    aperio = re.search(r"\bMPP\s*=\s*([0-9.eE+-]{1,40})", description)
    if description.startswith("Aperio") and aperio:
        return plausible_pixel_size((_number(aperio[1]),) * 2, "Aperio metadata")
    return None


def plausible_pixel_size(sizes: tuple[float, ...], source: str) -> tuple[float, str] | None:
    """The micrometres of a pixel along x and y as one number, with where they come from; `None` where they are no microscope's:
    outside `LOW_MICROMETRES` to `HIGH_MICROMETRES`, or more than a twentieth apart."""
    if len(sizes) != 2 or not all(LOW_MICROMETRES <= size <= HIGH_MICROMETRES for size in sizes):
        return None
    if max(sizes) > 1.05 * min(sizes):
        return None
    return float(np.sqrt(sizes[0] * sizes[1])), source


def _unit(text: str) -> float:
    """A unit of length in micrometres; 0 for what is none."""
    with suppress(ValueError):
        # PIL reads the UTF-8 of a TIFF as Latin-1.
        text = text.encode("latin-1").decode("utf-8")
    return _UNITS.get(text.strip().lower(), 0.0)


def _inverse(resolution: object, unit: float) -> tuple[float, ...]:
    """Micrometres of a pixel from pixels for each unit of so many micrometres."""
    values = resolution if isinstance(resolution, tuple) else ()
    return tuple(unit / number if (number := _number(value)) > 0 else 0.0 for value in values)


def _number(value: object) -> float:
    """A number of a file; 0 for what is none."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return 0.0
    return number if np.isfinite(number) else 0.0


def _says_more_behind_its_pixels(image: Image.Image) -> bool:
    """Whether PIL has to decode a PNG to know its EXIF data: chunks of metadata may stand behind the pixels."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None or getattr(file, "closed", False):
        return True
    place = file.tell()
    file.seek(8)
    try:
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind == b"IEND":
                return False
            if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and file.tell() > place:
                return True
            file.seek(length + 4, os.SEEK_CUR)
        return True
    finally:
        file.seek(place)


@contextmanager
def _reading(file: "str | Path | bytes", name: "str | Path") -> Iterator[Image.Image]:
    """An image file, or its content, opened whatever its size; what goes wrong is an [`UnreadableImageError`]."""
    # A text too long for the name of a file is none.
    if not isinstance(file, bytes) and not os.path.isfile(file):
        raise UnreadableImageError(f"{name}: no such image file. Check the path.")
    with _naming(name):
        if _file_bytes(file) == 0:
            raise UnreadableImageError(f"{name}: the file is empty. Copy it again from the microscope.")
        try:
            with of_any_size(), _pil():
                opened = Image.open(BytesIO(file) if isinstance(file, bytes) else file)
        except UnidentifiedImageError as error:
            kind = _kind_of_tiff(file)
            if kind is None:
                raise
            raise UnreadableImageError(
                f"{name}: a TIFF of {kind} is not read. Export it as RGB of 8 or 16 bits, without compression or with LZW."
            ) from error
        with opened:
            yield opened


@contextmanager
def of_any_size() -> Iterator[None]:
    """Images that are opened meanwhile may have any size; Pillow refuses large ones otherwise."""
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _naming(name: "str | Path") -> Iterator[None]:
    try:
        yield
    except UnreadableImageError:
        raise
    except InputError as error:
        raise RefusedImageError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{name}: not an image. Formats that work include PNG, JPEG, TIFF and BMP."
        ) from error
    except PermissionError as error:
        raise UnreadableImageError(f"{name}: the file may not be read. Change its permissions.") from error
    except MemoryError as error:
        raise UnreadableImageError(f"{name}: the image needs more memory than there is. Export it smaller.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UnreadableImageError(
            f"{name}: the image is truncated or damaged ({_shown(error)}). Copy it again or export it anew."
        ) from error


@contextmanager
def _pil() -> Iterator[None]:
    """What a reader of PIL raises at a damaged file, as an error of that file; our own faults stay what they are."""
    try:
        yield
    except _DAMAGE as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _shown(text: object) -> str:
    """What a file or PIL says of itself, short and without what a terminal obeys."""
    return "".join(each if each.isprintable() else "?" for each in str(text)[:200])


def _file_bytes(file: "str | Path | bytes") -> int:
    return len(file) if isinstance(file, bytes) else os.path.getsize(file)


def _beginning(file: "str | Path | bytes", count: int = 1 << 16) -> bytes:
    if isinstance(file, bytes):
        return file[:count]
    with open(file, "rb") as opened:
        return opened.read(count)


def _unread_content(image: Image.Image) -> bytes | None:
    """The file of an image that PIL has only opened so far, if more is in it than PIL would give."""
    file = getattr(image, "fp", None)
    if (
        file is None
        or getattr(file, "closed", False)
        or image.format not in ("TIFF", "PNG", "JPEG2000")
        or getattr(image, "tell", int)()
    ):
        return None
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    return content


def _check_memory(opened: Image.Image, name: "str | Path", file: "str | Path | bytes | None" = None) -> None:
    """Refuses, before anything is decoded, an image whose size its file cannot hold, or whose parts lie beyond its end."""
    held = _file_bytes(name if file is None else file)
    # PIL reads as far as the next part, and takes the memory for that first.
    offsets = [tile.offset or 0 for tile in getattr(opened, "tile", [])]
    if not all(isinstance(offset, int) and offset <= held for offset in offsets):
        raise UnreadableImageError(f"{name}: the file ends before its pixels do. Copy it again or export it anew.")
    # Of 16-bit planes PIL names no layout.
    bits = max(_numbers(opened, _BITS), default=8) if opened.format == "TIFF" else 8
    deep = bits > 8 or any(";16" in layout for layout in _rawmodes(opened))
    deep = deep and opened.mode in ("RGB", "RGBA", "RGBX", "LA")
    of_pixel = _BYTES_OF_DEEP_COLOUR if deep else _BYTES_OF_MODE.get(opened.mode, 4)
    needed = opened.width * opened.height * of_pixel
    if needed > MAX_BYTES and needed > MAX_COMPRESSION * held:
        raise UnreadableImageError(
            f"{name}: the file is far too small for the {opened.width} x {opened.height} pixels it names, so it is damaged. "
            "Copy it again or export it anew."
        )


def _read(file: "str | Path | bytes", name: "str | Path", max_pixels: int | None) -> tuple[Image.Image, list[str]]:
    notes: list[str] = []
    with _reading(file, name) as opened:
        pages = _pages(file, name, opened, notes)
        channel = len(pages) > 1
        first = _plane(file, name, opened, pages[0], max_pixels, notes, channel)
        if not channel and isinstance(first.pixels, Image.Image):
            return to_rgb(first.pixels, notes), notes
        pixels = [np.array(first.pixels)]
        pixels += [np.array(_plane(file, name, opened, page, max_pixels, notes, channel).pixels) for page in pages[1:]]
        merged = _to_8_bit(np.dstack(pixels) if len(pixels) > 1 else pixels[0], notes, first.bits, first.stated)
        if first.transparent is not None:
            merged = np.dstack([merged] * (3 if merged.ndim == 2 else 1) + [np.where(first.transparent, 0, 255)])
            merged = merged.astype(np.uint8)
        if first.inverted:
            merged = 255 - merged
        if first.premultiplied:
            merged = merged[..., :3] + (255 - np.maximum(merged[..., 3:], merged[..., :3].max(-1, keepdims=True)))
        return to_rgb(Image.fromarray(merged)), notes


class _Plane(NamedTuple):
    """One page of a file.

    Args:
        pixels: An image of 8 bits, or an array of more.
        bits (`int`, *optional*): Of a sample in the file, where that is more than 8.
        stated (`int`, *optional*): Bits in use, as the file says.
        inverted (`bool`): Zero is white.
        premultiplied (`bool`): Colours are multiplied with alpha.
        transparent (`np.ndarray`, *optional*): Pixels of the colour that the file names as transparent.
    """

    pixels: "Image.Image | np.ndarray"
    bits: int | None = None
    stated: int | None = None
    inverted: bool = False
    premultiplied: bool = False
    transparent: np.ndarray | None = None


def _plane(
    file: "str | Path | bytes",
    name: "str | Path",
    opened: Image.Image,
    page: int,
    max_pixels: int | None,
    notes: list[str],
    channel: bool = False,
) -> _Plane:
    """Decodes one page with all the bits it has; of one that is a channel its numbers, whatever its palette."""
    _go_to(opened, page)
    if max_pixels and opened.width * opened.height > max_pixels:
        shrink = (opened.width * opened.height / max_pixels) ** 0.5
        # JPEG decodes straight to a smaller size; other formats are reduced after decoding.
        opened.draft(opened.mode, (int(opened.width / shrink), int(opened.height / shrink)))
    _check_memory(opened, name, file)
    stated = _stated_bits(file, opened)
    inverted = opened.mode[0] in "IF" and _numbers(opened, _PHOTOMETRIC) == (0,)
    modes = _byte_modes(opened)
    if any("X" in layout for layout in _rawmodes(opened)):
        notes.append("Extra channels, which the file says nothing about, are left out.")
    if modes is None:
        bits = _bits_lost(file, opened)
        depth = 16 if opened.mode.startswith("I;16") else None
        image = _reduced(opened, max_pixels, channel)
        if image.mode[0] in "IF":
            pixels = np.asarray(_upright(image))
            return _Plane(pixels, depth, stated, inverted, transparent=_transparent(pixels, image))
        if bits is None or image.mode not in ("RGB", "RGBA"):
            return _Plane(image)
        upper = np.asarray(_upright(image))
        if int(_brightest(upper.ravel())) < 32:
            raise InputError(
                f"its pixels use the lower of {bits} bits, and of this compression only the upper eight can be read. Export it "
                "as PNG, or as TIFF without planes."
            )
        # The lower bits are taken to be the same as the upper ones.
        upper = upper.astype(np.uint16)
        return _Plane(upper << (bits - 8) | upper >> (16 - bits), bits, stated)
    premultiplied = _rawmodes(opened)[0].startswith("RGBa")
    high, low = (_decoded(file, name, page, rawmodes) for rawmodes in modes)
    if len(modes[0]) == 1 and modes[0][0] == "RGBA":
        # A PNG of gray and alpha: both bytes of each came as a channel.
        values = high.astype(np.uint16)
        gray, alpha = values[..., 0] << 8 | values[..., 1], values[..., 2] << 8 | values[..., 3]
        return _Plane(_averaged(np.dstack([gray, gray, gray, alpha]), max_pixels), 16, stated)
    pixels = _averaged(high.astype(np.uint16) << 8 | low, max_pixels)
    return _Plane(pixels, 16, stated, premultiplied=premultiplied, transparent=_transparent(pixels, opened))


def _averaged(pixels: np.ndarray, max_pixels: int | None) -> np.ndarray:
    """Pixels `[H, W, C]`, averaged over blocks so that about `max_pixels` are left."""
    shrink = (pixels.shape[0] * pixels.shape[1] / max_pixels) ** 0.5 if max_pixels else 1
    if shrink <= 1:
        return pixels
    planes = [Image.fromarray(pixels[..., band].astype(np.int32)) for band in range(pixels.shape[-1])]
    return np.dstack([plane.reduce(int(np.ceil(shrink))) for plane in planes]).astype(np.uint16)


def _go_to(opened: Image.Image, page: int) -> None:
    if getattr(opened, "tell", int)() != page:
        with of_any_size(), _pil():
            opened.seek(page)


def _transparent(pixels: np.ndarray, image: Image.Image) -> np.ndarray | None:
    key = image.info.get("transparency")
    if not isinstance(key, (int, tuple)):
        return None
    same = pixels == np.array(key)
    return same.all(-1) if same.ndim == 3 else same


def _rawmodes(opened: Image.Image) -> list[str]:
    """How the bytes of each tile are laid out, as PIL's decoders are told."""
    tiles = getattr(opened, "tile", [])
    modes = [tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0] for tile in tiles]
    return [mode if isinstance(mode, str) else "" for mode in modes]


def _byte_modes(opened: Image.Image) -> tuple[list[str], list[str]] | None:
    """What to tell PIL's decoders for the upper and for the lower bytes of 16-bit colours, of which PIL has the upper only.

    `None` where PIL gives all bits, or where there is no way to the lower ones.
    """
    found = _rawmodes(opened)
    if not found or opened.format not in ("PNG", "TIFF"):
        return None
    if found == ["LA;16B"]:
        return ["RGBA"], ["RGBA"]
    planar, bits = _numbers(opened, _PLANAR) == (2,), max(_numbers(opened, _BITS), default=8)
    if planar and bits == 16 and opened.mode in ("RGB", "RGBA") and set(found) <= set("RGBA"):
        order = "LB" if opened.tag_v2.prefix == b"II" else "BL"
        return [f"{band};16{order[0]}" for band in found], [f"{band};16{order[1]}" for band in found]
    layout, separator, order = found[0].partition(";16")
    if planar and bits > 8 and len(found[0]) == 1:
        raise InputError(f"planes of {bits} bits are read of RGB only. Export it as RGB, or with 8 bits.")
    # Compressed planes are put together by libtiff.
    if not separator or layout not in ("RGB", "RGBA", "RGBX", "RGBa") or (planar and order == "N"):
        return None
    order = ("L" if sys.byteorder == "little" else "B") if order == "N" else order
    layout = "RGBA" if layout == "RGBa" else layout
    other = "B" if order == "L" else "L"
    return [f"{layout};16{order}"] * len(found), [f"{layout};16{other}"] * len(found)


def _decoded(file: "str | Path | bytes", name: "str | Path", page: int, rawmodes: Sequence[str]) -> np.ndarray:
    """A page, decoded as if its bytes were laid out otherwise."""
    with _reading(file, name) as opened:
        _go_to(opened, page)
        opened.tile = [
            tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))
            for tile, mode in zip(opened.tile, rawmodes, strict=True)
        ]
        with _pil():
            opened.load()
        return np.asarray(_upright(opened))


def _bits_lost(file: "str | Path | bytes", opened: Image.Image) -> int | None:
    """Bits of a colour, where that is more than the eight that PIL gives."""
    if opened.format == "TIFF":
        bits = max(_numbers(opened, _BITS), default=8)
        return bits if 8 < bits <= 16 else None
    if opened.format == "JPEG2000":
        content = _beginning(file)
        # The size segment of the code stream: the precision of the first component is its 39th byte.
        start = content.find(b"\xff\x4f\xff\x51")
        if 0 <= start < len(content) - 42:
            bits = (content[start + 42] & 0x7F) + 1
            return bits if 8 < bits <= 16 else None
    return None


def _stated_bits(file: "str | Path | bytes", opened: Image.Image) -> int | None:
    """Bits in use, where the file says fewer than a sample has."""
    if opened.format == "PNG":
        content = _beginning(file)
        at = 8
        while at + 8 <= len(content) and content[at + 4 : at + 8] != b"IDAT":
            length = int.from_bytes(content[at : at + 4], "big")
            if content[at + 4 : at + 8] == b"sBIT" and 0 < length <= 4:
                return max(content[at + 8 : at + 8 + length], default=None)
            at += 12 + length
    if opened.format != "TIFF":
        return None
    significant = re.search(r'SignificantBits\s*=\s*"(\d{1,2})"', _description(opened))
    if significant:
        return int(significant[1])
    for tag in (_MAX_VALUE, _MAX_SIGNED):
        largest = max(_numbers(opened, tag), default=0)
        if largest > 255:
            return largest.bit_length()
    return None


def _numbers(opened: Image.Image, tag: int) -> tuple[int, ...]:
    """The whole numbers of a TIFF's tag; none where it has none, or other values."""
    tags = getattr(opened, "tag_v2", {})
    with _pil():
        values = tags.get(tag, ())
    return tuple(value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, int))


def _description(opened: Image.Image) -> str:
    with _pil():
        text = opened.tag_v2.get(_DESCRIPTION, "")
    return text if isinstance(text, str) else ""


def _kind_of_tiff(file: "str | Path | bytes") -> str | None:
    """What is in a TIFF that PIL does not read, in words; `None` for other files."""
    start = _beginning(file, 16)
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        tags = ImageFileDirectory_v2(start if b"+" in start[:4] else start[:8])
        with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
            opened.seek(tags.next)
            tags.load(opened)
        bits, formats = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
        kind = _SAMPLE_FORMATS.get(formats[0], "unknown")
        samples, colours = tags.get(_SAMPLES, len(bits)), _PHOTOMETRICS.get(tags.get(_PHOTOMETRIC), "unknown colours")
        packed = COMPRESSION_INFO.get(tags.get(_COMPRESSION, 1), "unknown")
        return _shown(f"{samples} x {bits[0]} bits {kind}".strip() + f" ({colours}, compression {packed})")
    except (*_DAMAGE, OSError, SyntaxError, ValueError, EOFError, MemoryError):
        return None


class _Page(NamedTuple):
    number: int
    size: tuple[int, int]
    mode: str


def _pages(file: "str | Path | bytes", name: "str | Path", opened: Image.Image, notes: list[str]) -> list[int]:
    """The pages of a file to read: one, or those of red, green and blue.

    Raises:
        ValueError: Several channels, and which are red, green and blue is not said.
    """
    if opened.format != "TIFF":
        with _pil():
            animated = opened.format in ("GIF", "PNG", "WEBP") and getattr(opened, "is_animated", False)
        if animated:
            notes.append("The file is an animation: only its first picture is read.")
        return [0]
    first = _Page(0, opened.size, opened.mode)
    further = list(_further_pages(opened))
    same = [0, *(page.number for page in further if page[1:] == first[1:])]
    _go_to(opened, 0)
    largest = max((page.size for page in further), key=np.prod, default=first.size)
    if np.prod(largest) > np.prod(first.size):
        notes.append(
            f"The file has a larger page ({largest[0]} x {largest[1]} pixels): only the first ({first.size[0]} x "
            f"{first.size[1]}) is read."
        )
    gray = first.mode[0] in "IF" or first.mode == "L"
    # The palette of a page with several beside it is the colour in which a microscope's program shows that channel.
    axes = page_axes(_description(opened), len(same), gray, one_sample=gray or first.mode == "P")
    if axes.sizes.get("?", 1) > 1:
        notes.append(f"The file has {len(same)} pages, and nothing says what they are: only the first is read.")

    def plane_in_focus(planes: Sequence[int]) -> int:
        return _plane_in_focus(file, name, opened, [same[plane] for plane in planes])

    return [same[page] for page in pages_of_picture(axes, plane_in_focus, notes)]


class PageAxes(NamedTuple):
    """What pages of one size and kind are to one another.

    Args:
        sizes (`dict[str, int]`): How many there are along C (channels), Z (planes) and T (times), or `?` where nothing says it.
        order (`str`): These axes, from the fastest.
        names (`list[str]`): Of the channels; none where they have none.
    """

    sizes: dict[str, int]
    order: str
    names: list[str]


def page_axes(description: str, count: int, gray: bool, one_sample: bool) -> PageAxes:
    """What the pages of a TIFF are, by its description (OME or ImageJ), and of three gray ones without any by their number.

    Args:
        description (`str`): Of the file's first page.
        count (`int`): Pages of one size and kind.
        gray (`bool`): They are gray.
        one_sample (`bool`): A pixel of them is one number: gray, or an index of a palette.

    Returns:
        [`PageAxes`]: To be given to [`pages_of_picture`].

    Raises:
        InputError: The description tells of several channels, and not all of them can be there.
    """
    sizes, order, names = _axes(description, one_sample)
    if sizes is not None and np.prod(list(sizes.values())) == count:
        return PageAxes(sizes, order, names)
    if sizes is not None and sizes["C"] > 1:
        raise InputError(
            f"it says that it has {sizes['C']} channels, and its pages ({count}) are not all of them. Merge them to one RGB "
            "image, and export that."
        )
    return PageAxes({"C": 3} if gray and count == 3 else {"?": count}, "C?", [])


def pages_of_picture(axes: PageAxes, plane_in_focus: Callable[[Sequence[int]], int], notes: list[str]) -> list[int]:
    """The pages that are one picture: one, or those of red, green and blue; of a z-stack in focus, of a time series the first.

    Args:
        axes ([`PageAxes`]): What the pages are.
        plane_in_focus (`Callable`): Pages of the planes of a z-stack -> which of these planes is the sharpest.
        notes (`list[str]`): Takes a sentence for each guess, and for what is left out.

    Returns:
        `list[int]`: Their numbers, counted from 0.

    Raises:
        InputError: Several channels, and which are red, green and blue is not said.
    """
    sizes, order, names = axes
    channels = sizes.get("C", 1)
    chosen = _colour_channels(channels, names) if channels > 1 else None
    if channels > 1 and chosen is None:
        listed = f" ({', '.join(names)})" if names else ""
        raise InputError(
            f"it has {channels} channels{listed}, and which are red, green and blue is not said. Merge them to one RGB image, "
            "and export that."
        )
    strides, step = {}, 1
    for axis in order:
        strides[axis], step = step, step * sizes.get(axis, 1)
    start = 0
    if sizes.get("Z", 1) > 1:
        sharpest = plane_in_focus([plane * strides["Z"] for plane in range(sizes["Z"])])
        start += sharpest * strides["Z"]
        notes.append(f"The file is a stack of {sizes['Z']} planes: only plane {sharpest + 1}, the sharpest, is read.")
    if sizes.get("T", 1) > 1:
        notes.append(f"The file is a series of {sizes['T']} times: only the first is read.")
    if chosen is None:
        return [start]
    if not names or set(_colour_names(names)) < {"r", "g", "b"}:
        listed = f" (they are named {', '.join(names)})" if names else ""
        notes.append(f"Three gray pages are read as red, green and blue{listed}.")
    return [start + channel * strides["C"] for channel in chosen]


def _plane_in_focus(file: "str | Path | bytes", name: "str | Path", opened: Image.Image, pages: Sequence[int]) -> int:
    """Which of these pages is the sharpest; of equals, and where none can be read, the one nearest to the middle."""

    def sharpness_of(plane: int) -> float:
        try:
            _go_to(opened, pages[plane])
            _check_memory(opened, name, file)
            with _pil():
                opened.load()
        except (OSError, SyntaxError, ValueError, EOFError, MemoryError):
            return -1.0
        left, top = (max(0, (side - FOCUS_WINDOW) // 2) for side in opened.size)
        window = opened.crop(
            (left, top, left + min(FOCUS_WINDOW, opened.width), top + min(FOCUS_WINDOW, opened.height))
        )
        return sharpness(np.asarray(window))

    return sharpest_plane(len(pages), sharpness_of)


def sharpest_plane(count: int, sharpness_of: Callable[[int], float]) -> int:
    """The plane of a z-stack that is in focus.

    Args:
        count (`int`): Planes of the stack; of more than `MOST_PLANES` so many are looked at, evenly spread.
        sharpness_of (`Callable`): Number of a plane -> its [`sharpness`], negative where it cannot be read.

    Returns:
        `int`: Its number; of equals the one nearest to the middle.
    """
    looked_at = np.unique(np.linspace(0, count - 1, min(count, MOST_PLANES)).round().astype(int)).tolist()
    looked_at.sort(key=lambda plane: abs(plane - count // 2))
    return max(looked_at, key=sharpness_of)


def sharpness(pixels: np.ndarray) -> float:
    """How much fine detail a picture has, by its mean brightness: higher in focus. Comparable between planes of one place only.

    Args:
        pixels (`np.ndarray`): `[H, W]` or `[H, W, C]`, of any range.
    """
    gray = pixels.astype(np.float32)
    gray = gray.mean(-1) if gray.ndim == 3 else gray
    # Averaged over 2 x 2: the noise of single pixels is no detail.
    height, width = (side // 2 * 2 for side in gray.shape)
    if min(height, width) < 6:
        return 0.0
    small = gray[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    laplacian = small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:] - 4 * small[1:-1, 1:-1]
    found = float(laplacian.std() / (abs(small.mean()) + 1e-6))
    return found if np.isfinite(found) else 0.0


def _further_pages(opened: Image.Image) -> Iterator[_Page]:
    for number in range(1, MAX_PAGES):
        try:
            _go_to(opened, number)
        # After the last one, or where one is damaged or of a kind that PIL does not read.
        except (OSError, SyntaxError, ValueError, EOFError):
            return
        # Previews are marked as reduced.
        if not any(kind & 1 for kind in _numbers(opened, _PAGE_KIND)):
            yield _Page(number, opened.size, opened.mode)


def _axes(description: str, one_sample: bool) -> tuple[dict[str, int] | None, str, list[str]]:
    """Sizes along C, Z and T of a file's pages, their order from the fastest, and names of the channels: OME or ImageJ."""
    if "<Pixels" in description:
        pixels = description[description.index("<Pixels") :]
        sizes = {axis: re.search(rf'Size{axis}\s*=\s*"(\d{{1,6}})"', pixels) for axis in "CZT"}
        order = re.search(r'DimensionOrder\s*=\s*"XY([CZT]{3})"', pixels)
        if all(sizes.values()) and order and len(set(order[1])) == 3:
            found = {axis: int(size[1]) for axis, size in sizes.items() if size}
            if not one_sample:
                found["C"] = 1
            channels = re.findall(r"<Channel\b[^>]*>", pixels)
            names = [
                _shown(name[1]) for name in (re.search(r'\bName\s*=\s*"([^"]*)"', tag) for tag in channels) if name
            ]
            return found, order[1], names if len(names) == found["C"] else []
    elif description.startswith("ImageJ="):
        found = {
            axis: int(size[1]) if size else 1
            for axis, key in (("C", "channels"), ("Z", "slices"), ("T", "frames"))
            for size in [re.search(rf"^{key}=(\d{{1,6}})\s*$", description, re.MULTILINE)]
        }
        if not one_sample:
            found["C"] = 1
        return found, "CZT", []
    return None, "", []


def _colour_names(names: Sequence[str]) -> list[str]:
    short = {"red": "r", "green": "g", "blue": "b"}
    return [short.get(name.strip().lower(), name.strip().lower()) for name in names]


def _colour_channels(count: int, names: Sequence[str]) -> list[int] | None:
    colours = _colour_names(names)
    if all(colours.count(colour) == 1 for colour in "rgb"):
        return [colours.index(colour) for colour in "rgb"]
    return [0, 1, 2] if count == 3 else None


def _upright(image: Image.Image) -> Image.Image:
    with _pil():
        return ImageOps.exif_transpose(image)


def _reduced(opened: Image.Image, max_pixels: int | None, channel: bool = False) -> Image.Image:
    """An opened file with at most about `max_pixels` pixels, averaged over blocks; of a channel without its palette."""
    with _pil():
        opened.load()
    if channel and opened.mode == "P":
        opened = Image.fromarray(np.asarray(opened))
    shrink = (opened.width * opened.height / max_pixels) ** 0.5 if max_pixels else 1
    if shrink <= 1:
        return opened
    mode = _BEFORE_REDUCING.get(opened.mode)
    if mode is None:
        return opened.reduce(int(np.ceil(shrink)))
    return opened.convert(mode).reduce(int(np.ceil(shrink)))


def to_rgb(image: Image.Image, notes: list[str] | None = None) -> Image.Image:
    """An opened image as upright 8-bit RGB.

    Args:
        image (`PIL.Image.Image`): Of any mode.
        notes (`list[str]`, *optional*): Takes a sentence for each guess.
    """
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if getattr(image, "fp", None) else image
    if image.mode.startswith(("I", "F")):
        bits = 16 if image.mode.startswith("I;16") else None
        image = Image.fromarray(_to_8_bit(np.asarray(image), [] if notes is None else notes, bits))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bit(pixels: np.ndarray, notes: list[str], bits: int | None = None, stated: int | None = None) -> np.ndarray:
    """Pixels to uint8: floats from 0..1 or 0..255, what needs more than 8 bits by the bits in use, the rest as it is.

    Args:
        pixels (`np.ndarray`): `[H, W]` or `[H, W, 3|4]`; a fourth channel is alpha.
        notes (`list[str]`): Takes a sentence for each guess.
        bits (`int`, *optional*): Of a sample; those of the array's type when missing.
        stated (`int`, *optional*): Bits in use, as the file says.

    Raises:
        ValueError: Many pixels are negative.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    fractions = np.issubdtype(pixels.dtype, np.floating)
    if fractions:
        finite = np.isfinite(pixels)
        if not finite.all():
            notes.append("Pixels that are no numbers are read as black, infinite ones as white.")
            pixels = np.where(np.isneginf(pixels) | np.isnan(pixels), 0, pixels).astype(np.float32)
    colours = pixels[..., :3] if pixels.ndim == 3 else pixels
    # A million pixels tell the range of any image.
    stride = max(1, int((colours.shape[0] * colours.shape[1] / 1e6) ** 0.5))
    sample = colours[::stride, ::stride]
    sample = sample[np.isfinite(sample)].ravel() if fractions else sample.ravel()
    brightest = _brightest(sample) if sample.size else 0.0
    if bits is None and pixels.dtype == np.uint16:
        bits = 16
    if fractions:
        white = _white_of_floats(brightest, notes)
    else:
        used = stated if stated and stated < (bits or 64) and brightest < 2**stated else None
        if used is None:
            used = max(8, int(brightest).bit_length())
            if used < (bits or 0) or (bits is None and used > 8):
                notes.append(
                    f"How many bits are in use is not said: read as {used}, which hold all but the very brightest pixels."
                )
        white = 2.0**used - 1
    if sample.size and pixels.dtype.kind != "u":
        darkest = -_brightest(-sample.astype(np.float64))
        reach = min(white, max(brightest, 1.0))
        if darkest < -OVERSHOOT * reach:
            raise InputError(
                f"Many pixels are negative (to {darkest:g}), which no brightness is. Give 0..1, 0..255, or whole numbers from 0."
            )
        if darkest < -0.02 * reach:
            notes.append(f"Negative pixels (to {darkest:g}) are read as black.")
    if pixels.ndim == 2 or pixels.shape[-1] == 3:
        return _scaled(pixels, white)
    alpha = pixels[..., 3]
    opaque = white if alpha.max() <= white else 2.0 ** (bits or 8) - 1
    return np.dstack([_scaled(colours, white), _scaled(alpha, opaque)])


def _white_of_floats(brightest: float, notes: list[str]) -> float:
    if brightest <= 1 + OVERSHOOT:
        return 1.0
    if brightest <= 255 * (1 + OVERSHOOT):
        if brightest < 64:
            notes.append(f"Floats up to {brightest:g} are neither 0..1 nor bright in 0..255: read as 0..255.")
        return 255.0
    used = int(brightest / (1 + OVERSHOOT)).bit_length()
    notes.append(f"Floats up to {brightest:g} are read as whole numbers of {used} bits.")
    return 2.0**used - 1


def _brightest(values: np.ndarray) -> float:
    """The largest value, without hot pixels and a burned-in scale bar."""
    values = np.sort(values)
    hot = max(int(values.size * HOT_PIXELS), 1 if values.size >= 256 else 0)
    below = int(np.searchsorted(values, values[-1], "left"))
    if below and values.size - below <= SCALE_BAR * values.size:
        rest = float(values[max(0, below - 1 - hot)])
        if values[-1] >= 4 * max(rest, 0):
            return rest
    return float(values[-1 - hot])


def _scaled(pixels: np.ndarray, white: float) -> np.ndarray:
    """Pixels in 0..`white` as uint8, a strip at a time: a large image has no room for its floats."""
    scale = 255.0 / white
    out = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(pixels), 256):
        strip = pixels[top : top + 256].astype(np.float64)
        out[top : top + 256] = (strip * scale).clip(0, 255).round()
    return out
