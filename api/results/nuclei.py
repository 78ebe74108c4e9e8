"""Nuclei of white cells seen at low power: where on a slide to look for white cells."""

import math

import numpy as np
from PIL import Image

from unihema.slides import RegionSource


# Size of a pixel at which nuclei are looked for, in micrometres; and of a part of the image, in these pixels.
LOW_POWER, BLOCK = 1.0, 1024
# A nucleus, or a lobe of one, is at least as large as a disc of this diameter in micrometres.
SMALLEST = 3.0
# Parts lie over one another by this many micrometres: more than a cell.
OVERLAP = 24.0
# What absorbs more green light than this is stained (optical density).
STAINED = 0.05
# How much bluer than the usual red cell a nucleus is: in deviations of stained pixels, and in optical density at least. Found on
# training parts; of the white cells of val all (CBC, Bio-Net), 98 % (TXL-PBC) and 93 % (WBC5) have one that is found.
DEVIATIONS, BLUER = 2.5, 0.06
# Blueness of azure, as a part of the green light that is absorbed: red cells have less (the middle of dense ones in Chula RBC-12
# 0.2 to 0.31). Where more than this share of what is stained is azure, as in marrow, the median of all of it is no red cell's.
# What is not azure are the edges of nuclei rather than red cells where it is less than the last share.
AZURE, MOST_AZURE, LEAST_RED = 0.32, 0.35, 0.1
# Places, along each side, that tell what the stain of an image is like, and their side in pixels.
SAMPLES, SAMPLE = 5, 256


def find_nuclei(source: RegionSource, um_per_pixel: float) -> np.ndarray:
    """Centres of what may be nuclei: azure takes away red and green light alike and little blue, eosin and haemoglobin do not.

    Some are clots, platelets in a heap, or dirt: it costs a look at full power to know. Found are bodies that are bluer than most
    of what is stained in the same image, so that little is assumed of lamp, camera and stain; where much of it may be nuclei,
    bluer than the rest of it.

    Args:
        source ([`RegionSource`]): The image, read in parts.
        um_per_pixel (`float`): Size of one of its pixels in micrometres.

    Returns:
        `np.ndarray`: (x, y) in pixels of the image `[n, 2]`, row by row of its parts.

    Raises:
        UnreadableImageError: Nothing of it can be read.
    """
    step = max(LOW_POWER / um_per_pixel, 1.0)
    white, usual, limit = _stain(source, step)
    least = math.pi / 4 * (SMALLEST / (um_per_pixel * step)) ** 2
    margin = round(OVERLAP / um_per_pixel)
    side = round(BLOCK * step)
    found = []
    for top in range(0, source.height, side):
        for left in range(0, source.width, side):
            right, bottom = min(left + side, source.width), min(top + side, source.height)
            box = (
                max(left - margin, 0),
                max(top - margin, 0),
                min(right + margin, source.width),
                min(bottom + margin, source.height),
            )
            density = optical_density(_at(source, box, step), white)
            nuclei = (blueness(density) > usual + limit) & (density[..., 1] > STAINED)
            centres = _bodies(nuclei, least) * step + box[:2]
            inside = (centres >= (left, top)) & (centres < (right, bottom))
            found.append(centres[inside.all(1)])
    return np.concatenate(found)


def _stain(source: RegionSource, step: float) -> tuple[np.ndarray, float, float]:
    """The colour of glass, the usual blueness of red cells, and how much more of it makes a nucleus."""
    side = round(SAMPLE * step)
    pictures = []
    for y in np.linspace(0, max(source.height - side, 0), SAMPLES):
        for x in np.linspace(0, max(source.width - side, 0), SAMPLES):
            box = (int(x), int(y), min(int(x) + side, source.width), min(int(y) + side, source.height))
            pictures.append(np.asarray(_at(source, box, step)))
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    white = np.percentile(pixels, 98, axis=0)
    densities = [optical_density(picture, white) for picture in pictures]
    blue, green = (
        np.concatenate([of(density)[density[..., 1] > STAINED] for density in densities])
        for of in (blueness, lambda density: density[..., 1])
    )
    azure = blue > AZURE * green
    stained = blue[~azure] if np.count_nonzero(azure) > MOST_AZURE * len(blue) else blue
    if not len(stained) or len(stained) < LEAST_RED * len(blue):
        return white, 0.0, BLUER
    usual = float(np.median(stained))
    deviation = 1.4826 * float(np.median(np.abs(stained - usual)))
    # Glass has no colour, and is bluer than some red cells.
    return white, max(usual, 0.0), max(BLUER, DEVIATIONS * deviation)


def _at(source: RegionSource, box: tuple[int, int, int, int], step: float) -> Image.Image:
    size = max(1, round((box[2] - box[0]) / step)), max(1, round((box[3] - box[1]) / step))
    return source.read_region(box, size, strict=False)


def optical_density(picture: "Image.Image | np.ndarray", white: np.ndarray) -> np.ndarray:
    """Optical density of each channel `[h, w, 3]`."""
    return np.log10((white + 1) / (np.asarray(picture, dtype=np.float32) + 1)).astype(np.float32)


def blueness(density: np.ndarray) -> np.ndarray:
    """How much more red and green light is absorbed than blue, `[h, w]`."""
    from scipy.ndimage import uniform_filter

    return uniform_filter((density[..., 0] + density[..., 1]) / 2 - density[..., 2], 3)


def _bodies(mask: np.ndarray, least: float) -> np.ndarray:
    """(x, y) of the middle of each connected part of at least so many pixels `[n, 2]`."""
    from scipy import ndimage

    parts, number = ndimage.label(mask)
    areas = np.bincount(parts.ravel(), minlength=number + 1)[1:]
    large = np.flatnonzero(areas >= least) + 1
    if not len(large):
        return np.zeros((0, 2))
    middle = np.array(ndimage.center_of_mass(mask, parts, large))
    return middle[:, ::-1] + 0.5


__all__ = ["STAINED", "blueness", "find_nuclei", "optical_density"]
