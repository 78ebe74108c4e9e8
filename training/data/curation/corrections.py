"""A data folder of what a person has confirmed or corrected, in the page of a review or in another program."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from unihema.errors import DatasetError, InputError
from unihema.files import contents, json_sha256, scratch_folder, whole_folder, write_json
from unihema.processing_unihema.image_io import IMAGE_SUFFIXES
from unihema.result_folder import StoredResult, read_results
from unihema.results.edits import UNCLASSIFIED, images_of, read_json
from unihema.results.export import geojson_id
from unihema.results.smear_result import SmearResult
from unihema.review.state import LOG_FILE, WHOLE_IMAGE, Review
from unihema.slides import RegionSource, image_sha256, open_regions
from unihema.training.data.curation.prepare import write_split
from unihema.training.data.readers import DESCRIPTION_FILE
from unihema.training.data.rows import BadRows, Row


# Of an image that is seen in tiles, or too large to be held: its windows, pixels along a side where nothing says it.
WINDOW = 1024
# An image is cut where it is wider or higher than so many of its tiles.
CUT_FROM = 1.5
# A cell is that of a window where this share of its box lies in it.
LEAST_INSIDE = 0.5


@dataclass
class CorrectedCell:
    """A cell after a person was there.

    Args:
        box (`tuple[float, float, float, float]`): x_min, y_min, x_max, y_max in pixels of the image.
        label (`str`): Class.
        looked_at (`bool`): A person has confirmed, changed or drawn it, and said what it is.
        attributes (`dict[str, str]`): Those that a person has given.
    """

    box: tuple[float, float, float, float]
    label: str
    looked_at: bool
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass
class CorrectedImage:
    """An image after a person was there.

    Args:
        stored ([`StoredResult`]): What had been predicted.
        sample (`str`, *optional*): The sample that it is of, where there are several.
        cells (`list[CorrectedCell]`): Its cells.
        looked_through (`bool`): A person has said that these are all, and right.
        touched (`bool`): A person was there, if only to delete cells.
        single_cell (`str`, *optional*): Class of the only cell in the picture, as a person has confirmed it.
    """

    stored: StoredResult
    sample: str | None = None
    cells: list[CorrectedCell] = field(default_factory=list)
    looked_through: bool = False
    touched: bool = False
    single_cell: str | None = None


@dataclass
class Corrections:
    """What was written.

    Args:
        folder (`Path`): The data folder.
        fields (`int`): Images with cells that a person has looked at.
        whole_fields (`int`): Of these, those that were looked through.
        cells (`int`): Cells to learn from.
        ignored (`int`): Cells that nobody has looked at, or that were drawn without a class.
        crops (`int`): Pictures of one cell.
    """

    folder: Path
    fields: int = 0
    whole_fields: int = 0
    cells: int = 0
    ignored: int = 0
    crops: int = 0


def write_corrections(
    results: str | Path, output: str | Path, edited: Sequence[str | Path] = (), whole_fields: bool = False
) -> Corrections:
    """Writes what a person has confirmed or corrected as a data folder, all of it in the split `train`.

    Cells that a person has confirmed, moved or drawn are boxes to learn from, and all cells of a field that was looked through.
    Deleted ones are background. A cell that nobody has looked at becomes an ignored region (`iscrowd`) of every class: neither
    target nor background. An image that was seen in tiles is cut into windows of their size, so that its cells have the size at
    which the model saw them. Pictures of one cell become `crops/`.

    Args:
        results (`str` or `Path`): The results folder, with the log of its review.
        output (`str` or `Path`): The data folder; not there yet.
        edited (`Sequence[str | Path]`): Files that another program has saved, and folders of them: GeoJSON named after the image,
            COCO, JSON of Label Studio. They count instead of the log.
        whole_fields (`bool`): Who edited these has looked through their images.

    Returns:
        [`Corrections`]

    Raises:
        InputError: Nothing was corrected, a file cannot be read, or an image is not the one that was analysed.
        OutputError: The folder is there, or cannot be written.
        BadRowsError: A class cannot be written, or an image not be copied.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not contents(output)):
        raise DatasetError(f"{output} is there already. Name another folder, or delete it.")
    images, said = edited_images(results, edited, whole_fields) if edited else reviewed_images(results)
    images = [image for image in images if image.touched]
    if not images:
        raise InputError(
            f"{results}: nobody has confirmed or corrected a cell yet. `unihema review {results}` shows them."
        )
    done = Corrections(output)
    bad = BadRows()
    with whole_folder(output) as folder, scratch_folder(output.absolute().parent) as scratch:
        rows = list(_Rows(images, scratch, done).all())
        write_split(folder / "train", rows, bad)
        bad.settle("error")
        counts = {"fields": done.fields, "looked_through": done.whole_fields, "cells": done.cells, "crops": done.crops}
        about = {"name": output.name, "source": f"corrections of {Path(results).name}", "licence": ""}
        write_json(folder / DESCRIPTION_FILE, {**about, "corrections": {**said, **counts, "ignored": done.ignored}})
    return done


def reviewed_images(results: str | Path) -> tuple[list[CorrectedImage], dict[str, Any]]:
    """The images of a results folder as its review has them, and which state of the log that is.

    Raises:
        InputError: No results folder, or nobody has reviewed it.
        OutputError: The log is damaged.
    """
    if not (Path(results) / LOG_FILE).is_file():
        # A folder that is none is told first.
        read_results(results)
        raise InputError(f"{results}: nobody has reviewed it. `unihema review {results}` shows its cells.")
    found = []
    with Review(results, read_only=True) as review:
        number, digest = review.log.head
        several = len(review.samples) > 1
        for image in review.images.values():
            through = image.looked_through
            corrected = CorrectedImage(image.stored, image.sample if several else None, looked_through=through)
            if image.shows_one_cell:
                cell = image.cells[WHOLE_IMAGE]
                corrected.touched = cell.present and (cell.looked_at or through)
                corrected.single_cell = cell.label
            else:
                corrected.touched = through or any(cell.looked_at for cell in image.cells.values())
                corrected.cells = [
                    CorrectedCell(cell.original.box, cell.label, cell.looked_at or through)
                    for cell in image.cells.values()
                    if cell.present
                ]
            found.append(corrected)
    return found, {"log": {"number": number, "hash": digest}}


def edited_images(
    results: str | Path, edited: Sequence[str | Path], whole_fields: bool
) -> tuple[list[CorrectedImage], dict[str, Any]]:
    """The images of a results folder as files of other programs have them, and the SHA-256 of what these said.

    Args:
        results (`str` or `Path`): The results folder.
        edited (`Sequence[str | Path]`): Files, and folders of files.
        whole_fields (`bool`): All cells of these images were looked at.

    Raises:
        InputError: No results folder, a file that is none of these or of no image, one that may be of several images, or two that
            are of one.
    """
    stored = {each.name: each for each in read_results(results)}
    found: dict[str, SmearResult] = {}
    said_by: dict[str, Path] = {}
    digests = {}
    for path in _files(edited):
        content, name = read_json(path, str(path))
        digests[Path(name).name] = json_sha256(content)
        used = _read_edited(stored, content, path)
        if not used:
            raise InputError(f"{path}: no image of {results} is in it, by its name.")
        twice = next((each for each in used if each in found), None)
        if twice is not None:
            raise InputError(
                f"{path}: {twice} is in {said_by[twice]}, too. Give one file that says what its cells are."
            )
        found |= used
        said_by |= dict.fromkeys(used, path)
    images = [_edited(each, found[name], whole_fields) for name, each in stored.items() if name in found]
    return images, {"edited": digests}


def _files(edited: Sequence[str | Path]) -> Iterator[Path]:
    for each in map(Path, edited):
        if each.is_dir():
            yield from sorted(path for path in each.iterdir() if path.suffix.lower() in (".json", ".geojson"))
        else:
            yield each


def _read_edited(stored: Mapping[str, StoredResult], content: Any, path: Path) -> dict[str, SmearResult]:
    """The results of the images that a file is about, by their names, as it has their cells.

    Raises:
        InputError: It cannot be read, or may be about several images of one name.
    """
    is_coco = isinstance(content, dict) and "images" in content
    if not is_coco and not (
        isinstance(content, list) and any(isinstance(each, dict) and "data" in each for each in content)
    ):
        owner = _of_geojson(stored, content, path)
        return {} if owner is None else {owner: stored[owner].result.with_geojson(content)}
    # Last part of a path -> images that end so, with all parts.
    ends: dict[str, list[tuple[str, list[str]]]] = {}
    for name, each in stored.items():
        for own in {each.source.as_posix(), str(each.result.image or "").replace("\\", "/")}:
            parts = own.split("/")
            ends.setdefault(parts[-1], []).append((name, parts))
    entries: dict[str, list[int]] = {}
    for number, places in enumerate(images_of(content)):
        owners = _owners(ends, places)
        if len(owners) > 1:
            raise InputError(
                f"{path}: {'images' if is_coco else ''}[{number}]: it may be of {' or '.join(owners[:3])}. Put the folder of the "
                "image before its name."
            )
        for owner in owners:
            entries.setdefault(owner, []).append(number)
    found = {}
    for owner, numbers in entries.items():
        result = stored[owner].result
        if is_coco:
            # By the name that the file has for it: others may end likewise.
            image = content["images"][numbers[0]]["file_name"]
            found[owner] = replace(replace(result, image=image).with_coco(content), image=result.image)
        else:
            found[owner] = result.with_label_studio([content[number] for number in numbers])
    return found


def _owners(ends: Mapping[str, Sequence[tuple[str, list[str]]]], places: Sequence[str]) -> list[str]:
    """The images that lie at one of these places: of that name, and with as many folders above it alike as any."""
    alike: dict[str, int] = {}
    for place in places:
        given = place.split("/")
        for name, own in ends.get(given[-1], ()):
            alike[name] = max(alike.get(name, 0), _same_end(own, given))
    return [name for name, number in alike.items() if number == max(alike.values())]


def _same_end(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts at the end of two paths are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other))))


def _of_geojson(stored: Mapping[str, StoredResult], content: Any, path: Path) -> str | None:
    """The image that a file of QuPath is about, which is called after it, with or without the suffix of that."""
    owners = [
        name
        for name, each in stored.items()
        if path.stem in {name, each.source.name, each.source.stem, *_names(each.result.image)}
    ]
    if len(owners) > 1:
        features = content.get("features") if isinstance(content, dict) else content
        ids = {each.get("id") for each in features if isinstance(each, dict)} if isinstance(features, list) else set()
        # Cells keep their ids in QuPath.
        own = [
            name
            for name in owners
            if any(geojson_id(stored[name].result, cell.id) in ids for cell in stored[name].result.cells)
        ]
        owners = own or [name for name in owners if name == path.stem] or owners
    if len(owners) > 1:
        raise InputError(
            f"{path}: it may be of {', '.join(owners[:3])}. Call it {owners[0]}.geojson, or whichever it is."
        )
    return owners[0] if owners else None


def _names(image: str | None) -> set[str]:
    """Name of an image with its suffix, and without."""
    return set() if image is None else {Path(image).name, Path(image).stem}


def _edited(stored: StoredResult, result: SmearResult, whole: bool) -> CorrectedImage:
    changes: dict[int, list[dict[str, Any]]] = {}
    for change in result.changes[len(stored.result.changes) :]:
        changes.setdefault(change["cell"], []).append(change)
    cells = []
    for cell in result.cells:
        of_cell = changes.get(cell.id, ())
        given = [
            change["what"].removeprefix("attribute ") for change in of_cell if change["what"].startswith("attribute ")
        ]
        attributes = {name: cell.attributes[name]["value"] for name in given if name in cell.attributes}
        # What was drawn, and not named, teaches nothing.
        named = cell.label != UNCLASSIFIED or UNCLASSIFIED in stored.result.classes
        cells.append(CorrectedCell(cell.box, cell.label, named and (whole or bool(of_cell)), attributes))
    return CorrectedImage(stored, None, cells, whole, touched=whole or bool(changes))


class _Rows:
    """Rows of corrected images.

    Args:
        images (`Sequence[CorrectedImage]`): The images.
        scratch (`Path`): Where windows are written before they are copied.
        done ([`Corrections`]): Counts.
    """

    def __init__(self, images: Sequence[CorrectedImage], scratch: Path, done: Corrections):
        self.images, self.scratch, self.done = images, scratch, done
        # Numbers of the cells of the image at hand that some window shows.
        self.shown: set[int] = set()
        parents: dict[str, str] = {}
        classes: dict[str, None] = {}
        for image in images:
            if image.single_cell is None:
                classes |= dict.fromkeys(image.stored.result.classes)
                parents |= image.stored.result.class_parents
        for image in images:
            classes |= dict.fromkeys(cell.label for cell in image.cells if cell.looked_at)
        self.classes = list(classes)
        # A region that is ignored for a class is ignored for its finer ones, too.
        self.roots = [name for name in classes if parents.get(name) not in classes]

    def all(self) -> Iterator[Row]:
        """The rows, image by image."""
        for image in self.images:
            stored = image.stored
            if not stored.source.is_file():
                raise InputError(f"{stored.source}: no such file. It was there when it was analysed; put it back.")
            if image_sha256(stored.source) != stored.image_sha256:
                raise InputError(f"{stored.source}: not the image that was analysed. Put that back.")
            suffix = stored.source.suffix.lower()
            if image.single_cell is not None:
                self.done.crops += 1
                row = self._row(image, stored.source, f"{stored.name}{suffix}", "single_cell")
                yield row | {"label": image.single_cell}
                continue
            self.done.fields += 1
            self.done.whole_fields += image.looked_through
            self.shown.clear()
            size = stored.result.width, stored.result.height
            tile = _tile(stored.result)
            with open_regions(stored.source) as source:
                if tile is None and not source.streams and suffix in IMAGE_SUFFIXES:
                    yield self._field(image, stored.source, f"{stored.name}{suffix}", (0, 0, *size))
                else:
                    yield from self._windows(image, source, tile or (WINDOW, WINDOW))
            self.done.cells += len(self.shown)
            self.done.ignored += sum(not cell.looked_at for cell in image.cells)

    def _windows(self, image: CorrectedImage, source: RegionSource, tile: tuple[int, int]) -> Iterator[Row]:
        width, height = source.size
        looked_at = [cell for cell in image.cells if cell.looked_at]
        places = {
            (int((cell.box[1] + cell.box[3]) / 2 // tile[1]), int((cell.box[0] + cell.box[2]) / 2 // tile[0]))
            for cell in looked_at
        }
        if image.looked_through and not source.streams:
            places |= {(row, column) for row in range(-(-height // tile[1])) for column in range(-(-width // tile[0]))}
        for row, column in sorted(places):
            # The last ones are as large as the others.
            left, top = (
                max(0, min(place * side, whole - side))
                for place, side, whole in zip((column, row), tile, (width, height))
            )
            window = left, top, min(left + tile[0], width), min(top + tile[1], height)
            path = self.scratch / f"{image.stored.name}_{left}_{top}.png"
            source.read_region(window).save(path)
            yield self._field(image, path, path.name, window) | {"source_image": image.stored.name}

    def _field(self, image: CorrectedImage, path: Path, name: str, window: tuple[int, int, int, int]) -> Row:
        left, top, right, bottom = window
        objects: dict[str, list[Any]] = {"bbox": [], "category": [], "morphology": [], "iscrowd": []}

        def add(box: Sequence[float], label: str, crowd: bool, attributes: dict[str, str]) -> None:
            objects["bbox"].append([box[0] - left, box[1] - top, box[2] - box[0], box[3] - box[1]])
            objects["category"].append(label)
            objects["morphology"].append(attributes)
            objects["iscrowd"].append(int(crowd))

        for number, cell in enumerate(image.cells):
            inside = max(cell.box[0], left), max(cell.box[1], top), min(cell.box[2], right), min(cell.box[3], bottom)
            width, height = inside[2] - inside[0], inside[3] - inside[1]
            if width <= 1 or height <= 1:
                continue
            area = (cell.box[2] - cell.box[0]) * (cell.box[3] - cell.box[1])
            if cell.looked_at and width * height >= LEAST_INSIDE * area:
                add(inside, cell.label, False, cell.attributes)
                self.shown.add(number)
            else:
                for root in self.roots:
                    add(inside, root, True, {})
        row = self._row(image, path, name, "detection")
        return row | {"objects": objects, "annotated_classes": self.classes, "size": (right - left, bottom - top)}

    def _row(self, image: CorrectedImage, path: Path, name: str, task: str) -> Row:
        row: Row = {"image": str(path), "file_name": name, "dataset": self.done.folder.name, "task": task}
        return row | ({"slide": image.sample} if image.sample is not None else {})


def _tile(result: SmearResult) -> tuple[int, int] | None:
    """Width and height of the tiles in which an image was seen, in its pixels; `None` where it was seen whole or nearly so."""
    if result.tiling is None:
        return None
    width, height = (round(side) for side in result.tiling["tile"])
    if result.width <= CUT_FROM * width and result.height <= CUT_FROM * height:
        return None
    return max(1, width), max(1, height)


__all__ = ["CorrectedCell", "CorrectedImage", "Corrections", "edited_images", "reviewed_images", "write_corrections"]
