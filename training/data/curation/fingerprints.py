"""What makes two image files the same photograph: their bytes, or looks that survive re-encoding, scaling and turning."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

from unihema.errors import DatasetError, UnreadableImageError
from unihema.processing_unihema.image_io import image_size, load_image


THUMBNAIL = 64
# Fields and crops of smears look alike when blurred, so a hash only proposes pairs; the pixels decide.
HASH_DISTANCE = 10
SIMILARITY = 0.8
_SIDE = 8
_BLOCK = 512


@dataclass
class Fingerprint:
    """An image's fingerprint.

    Args:
        digest (`str`): SHA-256 of the file.
        size (`tuple[int, int]`): Width and height, pixels, upright.
        thumbnail (`np.ndarray`): uint8 `[64, 64]`, grey.
    """

    digest: str
    size: tuple[int, int]
    thumbnail: np.ndarray


def fingerprint(path: str | Path) -> Fingerprint:
    """Reads an image once for all that is compared.

    Raises:
        DatasetError: It cannot be read.
    """
    try:
        height, width = image_size(path)
        grey = load_image(path, max_pixels=(4 * THUMBNAIL) ** 2).convert("L")
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (UnreadableImageError, OSError) as error:
        raise DatasetError(str(error)) from error
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return Fingerprint(digest, (width, height), np.asarray(small, np.uint8))


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Hashes of the eight orientations of each image.

    The signs of the lowest frequencies of the cosine transform, without the mean. Mirroring an image changes the sign of
    its odd frequencies and transposing it exchanges the axes, so one transform gives all eight.

    Args:
        thumbnails (`np.ndarray`): `[n, 64, 64]`.

    Returns:
        `np.ndarray`: uint64 `[n, 8]`; the first is that of the image as it is.
    """
    low = dctn(thumbnails.astype(np.float32), axes=(1, 2), norm="ortho")[:, :_SIDE, :_SIDE]
    odd = np.where(np.arange(_SIDE) % 2, -1.0, 1.0).astype(np.float32)
    hashes = []
    for transposed in (low, low.transpose(0, 2, 1)):
        for rows in (1, odd[:, None]):
            for columns in (1, odd):
                bits = (transposed * rows * columns > 0).reshape(len(low), -1)
                bits[:, 0] = False
                hashes.append(np.packbits(bits, axis=1).view(np.uint64)[:, 0])
    return np.stack(hashes, axis=1)


def oriented(thumbnail: np.ndarray, orientation: int) -> np.ndarray:
    """The image turned as in column `orientation` of [`perceptual_hashes`]."""
    turned = thumbnail.T if orientation >= 4 else thumbnail
    turned = turned[::-1] if orientation & 2 else turned
    return turned[:, ::-1] if orientation & 1 else turned


def near_pairs(
    fingerprints: Sequence[Fingerprint],
    max_distance: int = HASH_DISTANCE,
    min_similarity: float = SIMILARITY,
    report: Callable[[int], object] | None = None,
) -> list[tuple[int, int, float]]:
    """Pairs of images that show the same photograph, whatever its file type, size or orientation.

    Cropped and shifted copies are not found.

    Args:
        fingerprints (`Sequence[Fingerprint]`): Of different files.
        max_distance (`int`): Bits, of 63, in which the hashes of a pair may differ.
        min_similarity (`float`): Smallest correlation, -1..1, of the details of the two thumbnails.
        report (`Callable`, *optional*): Gets the number of images done since its last call.

    Returns:
        `list[tuple[int, int, float]]`: Indices, the smaller first, and their similarity.
    """
    if len(fingerprints) < 2:
        return []
    thumbnails = np.stack([one.thumbnail for one in fingerprints])
    hashes = perceptual_hashes(thumbnails)
    pairs = []
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK, 0]
        candidates: dict[tuple[int, int], list[int]] = {}
        for orientation in range(8):
            differing = np.bitwise_count(block[:, None] ^ hashes[None, start:, orientation])
            for first, second in np.argwhere(differing <= max_distance).tolist():
                if second > first:
                    candidates.setdefault((start + first, start + second), []).append(orientation)
        needed = sorted({index for pair in candidates for index in pair})
        details = dict(zip(needed, _details(thumbnails[needed]))) if needed else {}
        for (first, second), orientations in sorted(candidates.items()):
            similarity = max(
                float((details[first] * oriented(details[second], orientation)).mean()) for orientation in orientations
            )
            if similarity >= min_similarity:
                pairs.append((first, second, round(similarity, 4)))
        if report:
            report(len(block))
    return pairs


def upright_similarity(first: Fingerprint, second: Fingerprint) -> float:
    """Correlation, -1..1, of the details of two images as they are, neither mirrored nor turned."""
    one, other = _details(np.stack([first.thumbnail, second.thumbnail]))
    return float((one * other).mean())


def _details(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails without their coarse brightness, of mean 0 and variance 1: float32 `[n, 64, 64]`."""
    pixels = thumbnails.astype(np.float32)
    pixels -= gaussian_filter(pixels, sigma=(0, 4, 4), mode="reflect")
    pixels -= pixels.mean(axis=(1, 2), keepdims=True)
    deviation = pixels.std(axis=(1, 2), keepdims=True)
    # An empty field has no details to be told apart by.
    return np.where(deviation > 0.5, pixels / np.maximum(deviation, 1e-6), 0.0)
