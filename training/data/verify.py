"""Reads every file that rows list, before a run starts: a bad one would stop it hours later."""

import os
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from unihema.errors import DatasetError
from unihema.files import shortened
from unihema.processing_unihema.image_io import MAX_PIXELS, load_image
from unihema.training.data.layouts.files import LARGEST_IMAGE, image_size
from unihema.training.data.layouts.masks import read_mask
from unihema.training.data.rows import BadRows, Row, same_shape, single_cell_names, witnesses
from unihema.training.data.shards import JoinedRows, LazyRows, ListedRows, joined


# Images of more than MAX_PIXELS are decoded one at a time.
_one_large = threading.Lock()


@dataclass
class _Seen:
    """What a file turned out to be: width and height, upright, or what is wrong with it."""

    size: tuple[int, int] = (0, 0)
    problem: str | None = None
    full: bool = False


def verify_rows(
    rows_by_task: Mapping[str, Sequence[Row]],
    bad: BadRows,
    text_only: Collection[str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Sequence[Row]]:
    """Reads all images and masks whole, each once, and compares their sizes, upright, with what rows say.

    Args:
        rows_by_task (`Mapping[str, Sequence[Row]]`): Task (or another name of a group) -> rows of any task. Those of shards are
            given back as they are: they were read when the shards were written.
        bad (`BadRows`): Gets a message for each file and row that cannot be used, and notes.
        text_only (`Collection[str]`): Groups whose images will not be opened.
        workers (`int`, *optional*): Threads; as many as cores, at most 8, when not given.
        progress (`bool`): Show a bar, on a terminal.

    Returns:
        `dict[str, Sequence[Row]]`: The same without the bad rows, and without groups that have none left.
    """
    listed = {
        task: [row for part in _parts(rows) if not isinstance(part, LazyRows) for row in part]
        for task, rows in rows_by_task.items()
        if task not in text_only
    }
    images = dict.fromkeys(_files(listed.values(), "image"))
    masks = dict.fromkeys(_files(listed.values(), "mask"))
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        total = len(images) + len(masks)
        with tqdm(total=total, desc="reading images", unit="file", disable=None if progress else True) as bar:
            for found, look in ((images, _look_at_image), (masks, _look_at_mask)):
                for path, seen in zip(list(found), pool.map(look, list(found))):
                    found[path] = seen
                    bar.update()
    return _good_rows(rows_by_task, listed, images, masks, bad)


def _good_rows(rows_by_task, listed, images: dict[str, _Seen], masks: dict[str, _Seen], bad: BadRows):
    users = Counter(_files(listed.values(), "image")) + Counter(_files(listed.values(), "mask"))
    for path, seen in (*images.items(), *masks.items()):
        if seen.problem:
            rows = f" ({users[path]} rows)" if users[path] > 1 else ""
            bad.messages.append(f"{seen.problem}{rows}")
    scaled: list[str] = []
    full: list[str] = []
    kept = {}
    for task, rows in rows_by_task.items():
        parts: list[Any] = []
        for part in _parts(rows):
            if isinstance(part, LazyRows) or task not in listed:
                parts.append(part)
                continue
            good = []
            for row in part:
                with bad.collecting():
                    if _fits(row, images, masks, scaled, full):
                        good.append(row)
            parts.append(good)
        if any(len(part) for part in parts):
            kept[task] = joined(parts)
        elif len(rows):
            bad.note(f"{task}: no row is left.")
        labels = single_cell_names(witnesses(kept.get(task, ())))
        if len(labels) == 1:
            bad.note(f"{task}: single cells of one class only, {labels[0]}: there is nothing to tell apart.")
    if scaled:
        bad.note(f"{scaled[0]} {len(scaled)} rows are of that kind: boxes or masks are scaled.")
    if full:
        bad.note(f"{full[0]}: all of it is cell, as in {len(full)} masks. Is its background another level than 0?")
    return kept


def _parts(rows: Sequence[Row]) -> list[Any]:
    if not isinstance(rows, LazyRows):
        return [rows]
    parts = rows.parts if isinstance(rows, JoinedRows) else [rows]
    return [part.rows if isinstance(part, ListedRows) else part for part in parts]


def _files(groups: Any, key: str) -> Iterator[str]:
    for rows in groups:
        for row in rows:
            if isinstance(row.get(key), (str, Path)):
                yield str(row[key])


def _checked_size(path: str) -> tuple[int, int]:
    """Width and height of an image.

    Raises:
        DatasetError: It is too large.
    """
    size = image_size(path)
    if size[0] * size[1] > LARGEST_IMAGE:
        raise DatasetError(f"{path}: {size[0]}x{size[1]} pixels are more than {LARGEST_IMAGE}. Cut it into fields.")
    return size


def _look_at_image(path: str) -> _Seen:
    try:
        size = _checked_size(path)
        if size[0] * size[1] > MAX_PIXELS:
            with _one_large:
                load_image(path)
        else:
            load_image(path)
    except Exception as error:
        # PIL's readers raise anything on bytes that were damaged on purpose.
        return _Seen(
            problem=str(error) if path in str(error) else f"{path}: not a readable image ({shortened(error)})."
        )
    return _Seen(size)


def _look_at_mask(path: str) -> _Seen:
    try:
        _checked_size(path)
        mask = read_mask(path)
    except DatasetError as error:
        return _Seen(problem=str(error))
    return _Seen(mask.shape[::-1], full=bool(mask.all()))


def _fits(
    row: Row, images: Mapping[str, _Seen], masks: Mapping[str, _Seen], scaled: list[str], full: list[str]
) -> bool:
    """Whether a row's files can be read.

    Raises:
        DatasetError: Its boxes or its mask belong to an image of another shape, or a box lies outside.
    """
    image = images.get(str(row["image"]))
    if image is None:
        # Not from a file.
        return True
    if image.problem:
        return False
    width, height = image.size
    recorded = row.get("size")
    if recorded and tuple(recorded) != image.size:
        if not same_shape(recorded, image.size):
            turned = (
                " They were drawn before its EXIF turn: turn image and boxes, and export both."
                if tuple(recorded) == (height, width)
                else " Export image and boxes together."
            )
            raise DatasetError(
                f"{row['image']}: its boxes refer to {recorded[0]}x{recorded[1]} pixels, but the image has {width}x{height}."
                f"{turned}"
            )
        scaled.append(
            f"{row['image']}: its boxes refer to {recorded[0]}x{recorded[1]} pixels, but the image has {width}x{height}."
        )
    if not recorded:
        for x, y, w, h in row["objects"]["bbox"] if row["task"] == "detection" else ():
            if x >= width or y >= height or x + w <= 0 or y + h <= 0:
                raise DatasetError(
                    f"{row['image']}: box {[x, y, w, h]} lies outside the image of {width}x{height} pixels."
                )
    mask = masks.get(str(row["mask"])) if "mask" in row else None
    if mask is not None:
        if mask.problem:
            return False
        if not same_shape(mask.size, image.size):
            raise DatasetError(
                f"{row['mask']}: {mask.size[0]}x{mask.size[1]} pixels, but its image {row['image']} has {width}x{height}."
            )
        if mask.size != image.size:
            scaled.append(
                f"{row['mask']}: {mask.size[0]}x{mask.size[1]} pixels, but its image {row['image']} has {width}x{height}."
            )
        if mask.full:
            full.append(str(row["mask"]))
    return True
