"""Photographs that are there more than once: in two splits (a leak), in two data sets, or twice in one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from unihema.training.data.curation.fingerprints import Fingerprint, near_pairs


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
        recorded_size (`tuple[int, int]`, *optional*): Width and height that its boxes refer to, pixels.
        fingerprint (`Fingerprint`, *optional*): None for a file that cannot be read.
    """

    dataset: str
    split: str
    file_name: str
    path: str
    tasks: set[str] = field(default_factory=set)
    groups: dict[str, str] = field(default_factory=dict)
    recorded_size: tuple[int, int] | None = None
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
    """A number for each of so many things, the same for those that pairs lead from one to the other."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    links = coo_array(([1] * len(pairs), (first, second)), shape=(number, number))
    return connected_components(links, directed=False)[1].tolist()


def _one_for_all_tasks(same: list[CheckedImage]) -> list[CheckedImage]:
    """The files, without copies in one place that serve different tasks: a crop beside the same image with its mask."""
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

    A place with itself: photographs that are there twice.
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
