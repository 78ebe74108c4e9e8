"""Duplicate photographs: in two splits (a leak), in two data sets, or twice in one.

Two files are the same photograph if their bytes are equal, or if one is the other re-encoded, scaled, mirrored or turned.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

from unihema.errors import DatasetError, UnreadableImageError
from unihema.files import sha256, shortened
from unihema.processing_unihema.image_io import image_size, load_image


THUMBNAIL = 64
# Smears look alike when blurred, so hashes only propose pairs, and the pixels decide.
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
    """Reads an image and its fingerprint.

    Raises:
        DatasetError: It cannot be read.
    """
    try:
        height, width = image_size(path)
        grey = load_image(path, max_pixels=(4 * THUMBNAIL) ** 2).convert("L")
        digest = sha256(Path(path))
    except Exception as error:
        # PIL's readers raise anything on bytes that were damaged on purpose.
        known = isinstance(error, UnreadableImageError)
        raise DatasetError(str(error) if known else f"{path}: not a readable image ({shortened(error)}).") from error
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


@dataclass
class CheckedImage:
    """An image of the data folders that are checked.

    Args:
        dataset (`str`): Its data set.
        split (`str`): Its split.
        file_name (`str`): As its rows name it.
        path (`str`): The file.
        tasks (`set[str]`): Of the rows that use it.
        groups (`dict[str, str]`): Patient, slide and source image, as far as known.
        fingerprint (`Fingerprint`, *optional*): None for a file that cannot be read.
    """

    dataset: str
    split: str
    file_name: str
    path: str
    tasks: set[str] = field(default_factory=set)
    groups: dict[str, str] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None

    @property
    def place(self) -> str:
        """Data set and split."""
        return f"{self.dataset}/{self.split}"


@dataclass
class Repeat:
    """One photograph in several files.

    Args:
        kind (`"exact"` or `"near"`): Whether all files have the same bytes.
        similarity (`float`): Of the least similar of the pairs that were found, 1 for the same bytes.
        places (`list[str]`): `data set/split` of each file.
        files (`list[str]`): Each file.
        digests (`list[str]`): SHA-256 of each file.
        leak (`bool`): Whether the files lie in different splits.
    """

    kind: Literal["exact", "near"]
    similarity: float
    places: list[str]
    files: list[str]
    digests: list[str]
    leak: bool


def find_repeats(
    images: Sequence[CheckedImage], near: bool, max_distance: int, min_similarity: float, progress: bool
) -> list[Repeat]:
    """Photographs with more than one file, leaks first.

    Args:
        images (`Sequence[CheckedImage]`): Those without a fingerprint are passed over.
        near (`bool`): Also look for the same photograph in other bytes.
        max_distance (`int`): See [`near_pairs`].
        min_similarity (`float`): See [`near_pairs`].
        progress (`bool`): Show a bar.
    """
    from tqdm.auto import tqdm

    by_digest: dict[str, list[CheckedImage]] = {}
    for image in images:
        if image.fingerprint is not None:
            by_digest.setdefault(image.fingerprint.digest, []).append(image)
    different = [_one_for_all_tasks(same) for same in by_digest.values()]
    pairs = []
    if near:
        with tqdm(total=len(different), desc="comparing", unit="image", disable=not progress) as bar:
            pairs = near_pairs([same[0].fingerprint for same in different], max_distance, min_similarity, bar.update)

    group = _connected(len(different), pairs)
    similarity: dict[int, float] = {}
    for first, _, value in pairs:
        similarity[group[first]] = min(value, similarity.get(group[first], 1.0))
    members: dict[int, list[CheckedImage]] = {}
    for index, same in zip(group, different):
        members.setdefault(index, []).extend(same)
    repeats = [
        Repeat(
            kind="near" if index in similarity else "exact",
            similarity=similarity.get(index, 1.0),
            places=[image.place for image in found],
            files=[image.path for image in found],
            digests=[image.fingerprint.digest for image in found],
            leak=len({image.split for image in found}) > 1,
        )
        for index, found in members.items()
        if len(found) > 1
    ]
    return sorted(repeats, key=lambda repeat: (not repeat.leak, repeat.kind, repeat.files))


def _connected(number: int, pairs: Sequence[tuple[int, int, float]]) -> list[int]:
    """The connected component of each of `number` items that `pairs` link."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    links = coo_array(([1] * len(pairs), (first, second)), shape=(number, number))
    return connected_components(links, directed=False)[1].tolist()


def _one_for_all_tasks(same: list[CheckedImage]) -> list[CheckedImage]:
    """Drops copies in one place that serve different tasks, such as a crop beside the same image with its mask."""
    kept: list[CheckedImage] = []
    tasks: list[set[str]] = []
    for image in same:
        for index, other in enumerate(kept):
            if other.place == image.place and not tasks[index] & image.tasks:
                tasks[index] |= image.tasks
                break
        else:
            kept.append(image)
            tasks.append(set(image.tasks))
    return kept


def count_by_places(repeats: Sequence[Repeat]) -> dict[tuple[str, str], Counter]:
    """How many photographs two places share: (place, place) -> numbers of `exact` (the same bytes) and `near`.

    The entry of a place with itself counts photographs that it has twice.
    """
    counts: dict[tuple[str, str], Counter] = {}
    for repeat in repeats:
        digests: dict[str, list[str]] = {}
        for place, digest in zip(repeat.places, repeat.digests):
            digests.setdefault(place, []).append(digest)
        names = sorted(digests)
        for index, first in enumerate(names):
            if len(digests[first]) > 1:
                kind = "exact" if len(set(digests[first])) < len(digests[first]) else "near"
                counts.setdefault((first, first), Counter())[kind] += 1
            for second in names[index + 1 :]:
                kind = "exact" if set(digests[first]) & set(digests[second]) else "near"
                counts.setdefault((first, second), Counter())[kind] += 1
    return counts
