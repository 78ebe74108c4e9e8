"""The results folder of many images: resumable, and nothing lost when it is stopped at any moment.

Each image ends as one record, `records/<name>.json`, written last and atomically: a record says that all the image's
files are there. The tables (`cells.csv`, `counts.csv`, `results.json`) are made from the records at the end of a run,
also of one that is interrupted; after a kill the next run makes them.
"""

import csv
import hashlib
import io
import json
import logging
import os
import unicodedata
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from unihema.errors import InputError, OutputError, RequestError, UniHemaError
from unihema.files import (
    SETTINGS_FILE,
    append_line,
    claim_folder,
    exclusive,
    find_images,
    is_results_folder,
    json_sha256,
    read_json_object,
    read_lines,
    real_path,
    write_atomically,
    write_text,
)
from unihema.inference.int8 import is_int8
from unihema.processing_unihema.class_names import NUCLEUS
from unihema.progress import OnProgress
from unihema.result_shards import Shard, link_or_copy, names_within, write_shard
from unihema.results.export import (
    FORMATS,
    as_file,
    cell_columns,
    cell_row,
    import_roifile,
    label_studio_config,
    table_text,
)
from unihema.results.shapes import can_measure
from unihema.results.smear_result import FORMAT, Cell, SmearResult
from unihema.slides import RegionSource, image_sha256, open_regions
from unihema.version import __version__


if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from unihema.analyzer import Analyzer
    from unihema.request import Request
    from unihema.results.tiles import TileStore


logger = logging.getLogger(__name__)

ANSWER_COLUMNS = ["image", "question", "answer", "source", "cells", "text", "disagreement", "note"]
COUNT_COLUMNS = ["image", "label", "count", "percent_of_white_cells", "differential", "warnings"]
# Images are held back until a batch of one size is full: so many batches of them at most.
HELD_BATCHES = 4
# Bytes of a name, to which `_overlay.png` is added: file systems take 255.
NAME_BYTES = 200
# Names that Windows keeps for devices, whatever their ending.
DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{number}" for name in ("com", "lpt") for number in range(1, 10))}
# The line of results.json after which its images come.
_IMAGES = ' "images": [\n'
# Of a record: a slide of half a million cells has some 100 MB.
MOST_RECORD_BYTES = 1 << 29
# What is wrong with one image, and no reason to stop.
FAILURES = (OSError, ValueError, RuntimeError, MemoryError)


@dataclass
class BatchReport:
    """What became of the images of one run.

    Args:
        analysed (`list[Path]`): Images analysed in this run.
        skipped (`list[Path]`): Images whose results were there already.
        failed (`dict[str, str]`): Image or input -> what was wrong with it.
        totals (`dict[str, int]`): Cells of each class over all images in the tables.
        images (`int`): Images in the tables.
        other_settings (`int`): Records in the folder made with another checkpoint or other settings; the tables leave
            them out.
        gone (`list[str]`): Images of earlier runs that are in the tables, and no longer where they were.
    """

    analysed: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    images: int = 0
    other_settings: int = 0
    gone: list[str] = field(default_factory=list)


class StoredResult(NamedTuple):
    """An image of a results folder.

    Args:
        name (`str`): Of its files in the folder.
        source (`Path`): Where the image was when it was analysed.
        image_sha256 (`str`): Of the image, see [`image_sha256`].
        record_sha256 (`str`): Of all that was stored.
        result ([`SmearResult`]): What was found.
    """

    name: str
    source: Path
    image_sha256: str
    record_sha256: str
    result: SmearResult


class CurrentRecord(NamedTuple):
    """The record of an image in a results folder.

    Args:
        path (`Path`): The file.
        image_sha256 (`str`): Of the image, see [`image_sha256`].
    """

    path: Path
    image_sha256: str


def read_results(folder: str | Path) -> Iterator[StoredResult]:
    """The results of a folder that `analyze_into` wrote, one after another: those of its settings, as in its tables.

    Args:
        folder (`str` or `Path`): The results folder.

    Raises:
        InputError: It is none, or a result in it was changed to what is never written.
    """
    folder = Path(folder)
    if not is_results_folder(folder):
        raise InputError(
            f"{folder}: no results folder. `unihema predict` writes one, with results.json and records in it."
        )
    settings = read_json_object(folder / SETTINGS_FILE, InputError, "Analyse the images again.")
    return ResultFolder(folder, settings).results()


def failed_images(folder: str | Path) -> dict[str, str]:
    """Images of a results folder that could not be analysed -> what was wrong with them, as its `results.json` says.

    Args:
        folder (`str` or `Path`): The results folder.

    Raises:
        InputError: The file was changed by hand.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        return {}
    head = []
    # What comes before the images: those of a slide may be too long to read.
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line == _IMAGES:
                break
            head.append(line)
    try:
        failed = json.loads("".join(head).rstrip().removesuffix(",") + "}")["failed"]
        return {str(image): str(why) for image, why in failed.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: changed by hand ({error!r}). Run `unihema predict` again.") from error


def analyze_into(
    output: str | Path,
    analyzer: "Analyzer",
    inputs: Sequence[str | Path],
    request: "Request",
    formats: Sequence[str] = (),
    overwrite: bool = False,
    batch_size: int = 1,
    on_image: Callable[[int, int, Path, SmearResult | str | None], None] | None = None,
    on_progress: OnProgress | None = None,
    shard: Shard | None = None,
) -> BatchReport:
    """Analyses files into a results folder; see [`Analyzer.analyze_files`].

    Args:
        output (`str` or `Path`): The results folder.
        analyzer ([`Analyzer`]): Analyses.
        inputs (`Sequence[str | Path]`): Image files, folders and glob patterns.
        request ([`Request`]): Of [`Analyzer.request`].
        formats, overwrite, batch_size, on_image, on_progress, shard: As there.

    Returns:
        [`BatchReport`]
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: the output must be a folder, and this is a file.")
    if batch_size < 1:
        raise RequestError(f"batch_size must be 1 or more, got {batch_size}.")
    unknown = [form for form in formats if form not in FORMATS]
    if unknown:
        raise RequestError(f"Unknown format {unknown[0]!r}; formats are {', '.join(FORMATS)}.")
    if "imagej" in formats:
        import_roifile()
    images, problems = find_images(inputs, exclude=output)
    beside = next((image for image in images if real_path(image).parent == real_path(output)), None)
    if beside is not None:
        raise RequestError(
            f"{output}: this folder holds {beside.name}, an image to analyse; name another one for results."
        )
    named = names_within(images, inputs)
    given = {"images": len(named), "sha256": json_sha256(sorted(named))}
    if shard is not None:
        named = {name: image for name, image in named.items() if shard.holds(name)}
        images, output = list(named.values()), output / shard.folder
    settings = _settings(analyzer, request, formats)
    report = BatchReport(failed=dict(problems))
    attributes, groups = cell_table(analyzer, request)
    with exclusive(output, ["records"]):
        # Not before: another run's settings are its own.
        claim_folder(output, settings, overwrite=overwrite)
        folder = ResultFolder(output, settings)
        tables = {"attributes": attributes, "groups": groups}
        if shard is not None:
            write_shard(output, shard, named, report.failed, tables, given)
        run = _Run(analyzer, folder, report, request, overwrite, on_progress)
        try:
            run.all(images, batch_size, on_image)
        finally:
            # Repeated where the images have been moved to, or are mounted elsewhere.
            listed = {str(real_path(image)) for image in images}
            others = folder.forget_moved(listed, gone=shard is None)
            report.gone = sorted(source for source in others if not os.path.exists(source))
            folder.write_tables(attributes, report, groups)
            if shard is not None:
                write_shard(output, shard, named, report.failed, tables, given)
    return report


def cell_table(analyzer: "Analyzer", request: "Request") -> tuple[list[str], tuple[bool, bool, bool]]:
    """What the columns of a request's cells follow from, see [`cell_columns`]: attributes, and the groups that are there."""
    config = analyzer.model.config
    attributes = list(config.morphology) if "detection" in request.tasks else []
    shapes = "detection" in request.tasks and config.trained.cell_masks
    if shapes and not can_measure():
        logger.warning("The table of cells has no shapes: scikit-image is not installed. pip install 'unihema[shapes]'")
        shapes = False
    return attributes, (shapes, NUCLEUS in request.texts, request.looks_at_crops)


def analyze_each(
    analyzer: "Analyzer",
    request: "Request",
    opened: Sequence[RegionSource],
    stores: "Sequence[TileStore | None]" = (),
    on_progress: OnProgress | None = None,
) -> list[SmearResult | str]:
    """Analyses images together; of each its result, or what is wrong with it, which the others do not suffer from.

    Args:
        analyzer ([`Analyzer`]): Analyses.
        request, opened, stores, on_progress: As of [`Analyzer.run`].
    """
    if not opened:
        return []
    try:
        return list(analyzer.run(request, opened, stores, on_progress))
    except FAILURES as error:
        if len(opened) == 1:
            return [one_line(error, opened[0].name)]
    return [
        analyze_each(analyzer, request, [source], stores[number : number + 1], on_progress)[0]
        for number, source in enumerate(opened)
    ]


def count_rows(result: SmearResult) -> Iterator[dict[str, Any]]:
    """Rows of `counts.csv`, one a class."""
    warnings = " ".join(result.warnings) or None
    for label, count in result.counts.items():
        percent = result.percent_of_white_cells(label)
        percent = None if percent is None else round(percent, 1)
        values = result.image, label, count, percent, result.place_in_differential(label), warnings
        yield dict(zip(COUNT_COLUMNS, values, strict=True))


def _settings(analyzer: "Analyzer", request: "Request", formats: Sequence[str]) -> dict[str, Any]:
    """Everything that decides a result."""
    processor = analyzer.processor.image_processor
    return {
        "unihema": __version__,
        "checkpoint": analyzer.source or analyzer.model.config.name_or_path or None,
        "checkpoint_sha256": analyzer.weights_sha256(),
        "adapters": list(getattr(analyzer.model, "adapters_in_use", ())),
        "dtype": "int8" if is_int8(analyzer.model) else str(analyzer.model.dtype).removeprefix("torch."),
        "tasks": list(request.tasks),
        "prompt": request.prompt if isinstance(request.prompt, str | None) else list(request.prompt),
        "questions": list(request.questions),
        "threshold": request.threshold,
        "tiles": request.tiles,
        "um_per_pixel": request.um_per_pixel,
        "white_cells": request.white_cells,
        "labels": None if request.labels is None else list(request.labels),
        "framing": request.framing,
        "second_look": request.second_look,
        "parasites": request.parasites,
        "image_sizes": {task: dict(processor.task_sizes[task]) for task in request.heads},
        "formats": [form for form in FORMATS if form in formats],
    }


@dataclass
class Work:
    """An image on its way: what was read, and what came of it.

    Args:
        path (`Path`): The file.
        name (`str`): Of its files in the results folder.
        digest (`str`): See [`image_sha256`].
        opened ([`RegionSource`], *optional*): The image, while it is open.
        outcome ([`SmearResult`] or `str`, *optional*): Its result, or what is wrong with it.
    """

    path: Path
    name: str
    digest: str = ""
    opened: RegionSource | None = None
    outcome: SmearResult | str | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height, which decide the size after resizing and so the padding; `None` of what is not to be analysed."""
        return self.opened.pixels.size if self.opened else None

    def close(self) -> None:
        """Closes the image, where it is open."""
        if self.opened is not None:
            self.opened.close()
        self.opened = None


class _Run:
    """One run over images: reads, analyses and writes each."""

    def __init__(
        self,
        analyzer: "Analyzer",
        folder: "ResultFolder",
        report: BatchReport,
        request: "Request",
        overwrite: bool,
        on_progress: OnProgress | None = None,
    ):
        self.analyzer, self.request, self.on_progress = analyzer, request, on_progress
        self.folder, self.report, self.overwrite = folder, report, overwrite

    def all(
        self,
        images: Sequence[Path],
        batch_size: int,
        on_image: Callable[[int, int, Path, SmearResult | str | None], None] | None,
    ) -> None:
        """Analyses and writes all images, and says what became of each: its result, an error message, or `None` when it was there
        already. No result stays in memory: that of a slide is large."""
        works = (self._read(Work(path, name)) for path, name in self.folder.names(images).items())
        number = 0
        for group in in_buckets(works, attrgetter("size"), batch_size):
            self._analyse(group)
            for work in group:
                self._write(work)
                number += 1
                if on_image:
                    on_image(number, len(images), work.path, work.outcome)

    def _read(self, work: Work) -> Work:
        try:
            work.digest = image_sha256(work.path)
            if self.overwrite or not self.folder.is_current(work.name, work.digest):
                work.opened = open_regions(work.path)
                # What cannot be read at all is known from here.
                work.opened.pixels.load()
            else:
                self.folder.part(work.name, work.digest).remove()
        except FAILURES as error:
            work.outcome = one_line(error, work.path)
            work.close()
        return work

    def _analyse(self, group: list[Work]) -> None:
        waiting = [work for work in group if work.opened]
        stores = [self.folder.part(work.name, work.digest) for work in waiting]
        opened = [work.opened for work in waiting]
        outcomes = analyze_each(self.analyzer, self.request, opened, stores, self.on_progress)
        for work, outcome in zip(waiting, outcomes, strict=True):
            work.outcome = outcome

    def _write(self, work: Work) -> None:
        # Where results cannot be written, no further image needs analysing: that is raised.
        if work.outcome is None:
            self.report.skipped.append(work.path)
        elif isinstance(work.outcome, str):
            self.report.failed[str(work.path)] = work.outcome
        else:
            files = self.folder.settings["checkpoint_sha256"]
            work.outcome.provenance |= {"checkpoint_sha256": files, "image_sha256": work.digest}
            self.folder.write(work.name, work.path, work.digest, work.outcome, work.opened.pixels)
            self.folder.part(work.name, work.digest).remove()
            self.report.analysed.append(work.path)
        work.close()


def in_buckets(items: Iterable[Work], key: Callable[[Work], object], size: int) -> Iterator[list[Work]]:
    """Groups of up to `size` items with the same key; in order where `size` is 1.

    At most `HELD_BATCHES * size` items are held back until their group is full; then the group that waits longest goes as it is.

    Args:
        items (`Iterable`): Read no further than needed.
        key (`Callable`): What the items of a group share.
        size (`int`): Items in a group at most.
    """
    buckets: OrderedDict[object, list[Work]] = OrderedDict()
    held = 0
    for item in items:
        bucket = buckets.setdefault(key(item), [])
        bucket.append(item)
        held += 1
        if len(bucket) == size or held > HELD_BATCHES * size:
            full = key(item) if len(bucket) == size else next(iter(buckets))
            group = buckets.pop(full)
            held -= len(group)
            yield group
    yield from buckets.values()


def one_line(error: Exception, path: str | Path | None) -> str:
    """What was wrong with an image, as its row says it."""
    # As it was raised: shown, a name is as it can be printed.
    text = str(error.args[0] if isinstance(error, UniHemaError) and error.args else error).removeprefix(f"{path}: ")
    return " ".join(text.split()) or type(error).__name__


class PartOfSlide:
    """The tiles of an image that are done: a line for each group, by which a run that was stopped goes on within the image.

    It is a [`TileStore`]. What was kept is taken only if the image, the settings and the layout of the tiles are the same.

    Args:
        path (`Path`): The file.
        identity (`dict`): What image, and with what settings.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self.identity = path, identity

    def begin(self, layout: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
        """See [`TileStore`]."""
        head = json.loads(json.dumps({**self.identity, "layout": layout}))
        lines = read_lines(self.path)
        if next(lines, None) == head:
            yield from lines
            return
        lines.close()
        self.remove()
        append_line(self.path, head)

    def append(self, seen: list[dict[str, Any]]) -> None:
        """See [`TileStore`]."""
        append_line(self.path, seen)

    def remove(self) -> None:
        """Removes it; the image is done, or is to be seen anew."""
        self.path.unlink(missing_ok=True)


class ResultFolder:
    """The records of a results folder, and the tables made from them.

    Args:
        folder (`Path`): The results folder.
        settings (`dict`): Everything that decides a result; records made with other settings are not current.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.settings_sha256 = json_sha256(settings)

    def names(self, images: Sequence[Path], resolve: bool = True) -> dict[Path, str]:
        """A name for the files of each image: its stem, with its folder's name or a hash where stems meet.

        An image keeps the name it has in the folder, whatever else is given with it later.

        Args:
            images (`Sequence[Path]`): The images.
            resolve (`bool`): Follow links; False for paths of records, where they were followed on the machine that wrote them.
        """
        had = {record["source"]: path.stem for path, record in self._read_all()}
        taken = {same_file(name) for name in had.values()}
        names = {}
        for image in images:
            source = real_path(image) if resolve else image
            if str(source) not in had:
                digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
                stems = [image.stem, f"{source.parent.name}_{image.stem}", f"{image.stem}_{digest}"]
                candidates = [file_name(stem, digest) for stem in stems]
                had[str(source)] = next(name for name in candidates if same_file(name) not in taken)
                taken.add(same_file(had[str(source)]))
            names[image] = had[str(source)]
        return names

    def is_current(self, name: str, image_sha256: str) -> bool:
        """Whether the image's results are there, made from the same bytes with the same settings."""
        record = self._read(self._record(name))
        return (
            record is not None
            and record["settings_sha256"] == self.settings_sha256
            and record["image_sha256"] == image_sha256
            and self._has_files(record)
        )

    def _has_files(self, record: dict[str, Any]) -> bool:
        # One of another size is not what was written.
        return all(_size(self.folder / file) == size for file, size in record["files"].items())

    def part(self, name: str, image_sha256: str) -> PartOfSlide:
        """What is kept of an image while its tiles are being seen."""
        identity = {"settings_sha256": self.settings_sha256, "image_sha256": image_sha256}
        return PartOfSlide(self.folder / "records" / f"{name}.tiles", identity)

    def write(self, name: str, path: Path, image_sha256: str, result: SmearResult, pixels: "PILImage") -> None:
        """Writes an image's files, the record last."""
        from PIL import Image

        overlay = result.overlay(pixels)
        # At the usual level packing the overlay takes longer than finding the cells; this one makes files a quarter larger.
        files: dict[str, Callable[[IO[bytes]], Any]] = {}
        files[f"{name}_overlay.png"] = lambda file: overlay.save(file, "PNG", compress_level=1)
        if result.mask is not None:
            mask = Image.fromarray(result.mask * 255)
            files[f"{name}_mask.png"] = lambda file: mask.save(file, "PNG")
        for form in self.settings["formats"]:
            try:
                ending, content = as_file(result, form)
            except RequestError as error:
                # One image too large for a form is no reason to stop.
                result.warnings.append(f"Not written as {form}: {error}")
                continue
            files[f"{name}{ending}"] = partial(_write_bytes, content)
        former = self._read(self._record(name))
        for file in former["files"].keys() - files.keys() if former is not None else ():
            # Of other settings: it would show what is no longer said.
            (self.folder / file).unlink(missing_ok=True)
        for file, write in files.items():
            write_atomically(self.folder / file, write)
        record = {
            "source": str(real_path(path)),
            "image_sha256": image_sha256,
            "settings_sha256": self.settings_sha256,
            "files": {file: _size(self.folder / file) for file in files},
            "result": result.to_dict(with_cells=False),
        }
        self._write_record(name, record, lambda: (cell.to_dict() for cell in result.cells))

    def _write_record(self, name: str, record: dict[str, Any], cells: Callable[[], Iterable[Any]]) -> None:
        digest = _record_sha256(record, cells())
        write_text(self._record(name), _with_cells({"record_sha256": digest, **record}, cells(), ensure_ascii=False))

    def write_tables(self, attributes: Sequence[str], report: BatchReport, groups: Sequence[bool]) -> None:
        """Writes `cells.csv`, `counts.csv` and `results.json` from the records, where there were questions `answers.csv`, with
        the format of Label Studio `label_studio.xml`, and completes the report."""
        failed = {str(real_path(item)) for item in report.failed}
        totals: dict[str, int] = {}
        current = []
        for path, record in self._read_all():
            if record["settings_sha256"] != self.settings_sha256:
                report.other_settings += 1
            elif record["source"] not in failed:
                current.append(path)
                for label, count in _counts_of(record["result"]).items():
                    totals[label] = totals.get(label, 0) + count
        report.totals, report.images = totals, len(current)
        columns = cell_columns(attributes, *groups)
        write_text(self.folder / "cells.csv", csv_lines(columns, self._cell_rows(current, attributes, groups)))
        write_text(
            self.folder / "counts.csv",
            csv_lines(COUNT_COLUMNS, self._counts(current)),
        )
        if self.settings.get("questions"):
            write_text(self.folder / "answers.csv", csv_lines(ANSWER_COLUMNS, self._answers(current)))
        else:
            (self.folder / "answers.csv").unlink(missing_ok=True)
        write_text(self.folder / "results.json", self._json(current, report))
        if "label_studio" in self.settings["formats"]:
            write_text(self.folder / "label_studio.xml", label_studio_config(totals))
        else:
            (self.folder / "label_studio.xml").unlink(missing_ok=True)

    def results(self) -> Iterator[StoredResult]:
        """The results that are current, in the order of their names; none of an image that can no longer be analysed.

        Raises:
            InputError: One was damaged, or changed to what is never written.
        """
        failed = {str(real_path(image)) for image in failed_images(self.folder)}
        for path in sorted((self.folder / "records").glob("*.json")):
            record = self._read(path)
            if record is None:
                self._check_not_damaged(path)
                continue
            if record["settings_sha256"] == self.settings_sha256 and record["source"] not in failed:
                try:
                    result = SmearResult.from_dict(record["result"])
                except InputError as error:
                    raise InputError(f"{path}: {error}") from error
                digest = _record_sha256(record, record["result"]["cells"])
                yield StoredResult(path.stem, Path(record["source"]), record["image_sha256"], digest, result)

    def current(self) -> dict[str, CurrentRecord]:
        """Source of each image -> its record, of those whose files are all there."""
        return {
            record["source"]: CurrentRecord(path, record["image_sha256"])
            for path, record in self._read_all()
            if record["settings_sha256"] == self.settings_sha256 and self._has_files(record)
        }

    def forget_moved(self, sources: Collection[str], digests: Collection[str] = (), gone: bool = False) -> list[str]:
        """Removes results of images that were analysed where they lay before, and would count twice.

        Args:
            sources (`Collection[str]`): Where the images lie now. A result of the same bytes from any other place is removed.
            digests (`Collection[str]`): SHA-256 of images among them whose results are not here yet.
            gone (`bool`): Only where nothing lies at that other place any more: copies of an image may be meant.

        Returns:
            `list[str]`: Where the other images lay whose results stay.
        """
        known, others = set(digests), []
        for path, record in self._read_all():
            if record["settings_sha256"] != self.settings_sha256:
                continue
            if record["source"] in sources:
                known.add(record["image_sha256"])
            else:
                others.append((path, record["source"], record["image_sha256"], list(record["files"])))
        moved = [each for each in others if each[2] in known and not (gone and os.path.exists(each[1]))]
        for path, _, _, files in moved:
            # The record first: one says that all its files are there.
            path.unlink()
            for file in files:
                (self.folder / file).unlink(missing_ok=True)
        if moved:
            logger.warning(
                "%s: results of %d images are removed that were analysed at another place before.",
                self.folder,
                len(moved),
            )
        return [source for path, source, _, _ in others if path.exists()]

    def adopt(self, name: str, path: Path) -> None:
        """Takes an image over from another results folder of the same settings.

        Args:
            name (`str`): Of its files here.
            path (`Path`): Its record there.

        Raises:
            OutputError: It was damaged meanwhile.
        """
        record = self._read(path)
        if record is None:
            raise OutputError(f"{path}: damaged. Repeat the command of this shard.")
        had = self._read(self._record(name))
        if had is not None and had | {"files": None} == record | {"files": None} and self._has_files(had):
            return
        there, files = path.parent.parent, {}
        for file, size in record["files"].items():
            # As `write` names them: the name, and what it adds.
            own = name + file.removeprefix(path.stem)
            link_or_copy(there / file, self.folder / own)
            files[own] = size
        self._write_record(name, record | {"files": files}, lambda: record["result"]["cells"])

    def _results(self, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for path in paths:
            yield self._read(path)["result"]

    def _cell_rows(
        self, paths: Sequence[Path], attributes: Sequence[str], groups: Sequence[bool]
    ) -> Iterator[list[Any]]:
        for values in self._results(paths):
            result = SmearResult.from_dict(values | {"mask": None, "cells": []})
            if _shows_one_cell(values):
                yield list(cell_row(result, result.whole_image_cell(1), attributes, *groups).values())
            # One at a time: a slide has hundreds of thousands.
            for cell in values["cells"]:
                yield list(cell_row(result, Cell.from_dict(cell), attributes, *groups).values())

    def _counts(self, paths: Sequence[Path]) -> Iterator[list[Any]]:
        for values in self._results(paths):
            result = SmearResult.from_dict(values | {"mask": None, "cells": []})
            if _shows_one_cell(values):
                result.cells.append(result.whole_image_cell(1))
            # One cell stands for all of its class.
            of_class: dict[str, Cell] = {}
            for cell in map(Cell.from_dict, values["cells"]):
                result.cells.append(of_class.setdefault(cell.label, cell))
            yield from (list(row.values()) for row in count_rows(result))

    def _answers(self, paths: Sequence[Path]) -> Iterator[list[Any]]:
        for values in self._results(paths):
            for entry in values["answers"]:
                row = {**entry, "image": values["image"], "cells": " ".join(map(str, entry.get("cells", ()))) or None}
                yield [row.get(name) for name in ANSWER_COLUMNS]

    def _json(self, paths: Sequence[Path], report: BatchReport) -> Iterator[str]:
        head = {"unihema": __version__, "settings": self.settings, "totals": report.totals, "failed": report.failed}
        yield json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}") + ",\n" + _IMAGES.rstrip()
        for number, result in enumerate(self._results(paths)):
            yield (",\n" if number else "\n") + json.dumps(result, ensure_ascii=False)
        yield "\n ]\n}\n"

    def _record(self, name: str) -> Path:
        return self.folder / "records" / f"{name}.json"

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A record, or None where there is none, it is not one of this format, or it is not what was written."""
        try:
            record = read_json_object(path, OutputError, "", MOST_RECORD_BYTES)
        except OutputError:
            return None
        digest, result = record.pop("record_sha256", None), record.get("result")
        if not isinstance(result, dict) or result.get("format") != FORMAT or not isinstance(result.get("cells"), list):
            return None
        if digest != _record_sha256(record, result["cells"]):
            return None
        # Of another image, copied to this name.
        return record if _is_record(record, path.stem) and f"{path.stem}_overlay.png" in record["files"] else None

    def _check_not_damaged(self, path: Path) -> None:
        """Checks that a record which is not one of ours is of another version, or of another image.

        Raises:
            InputError: It is neither.
        """
        record = read_json_object(path, InputError, "Run `unihema predict` again.", MOST_RECORD_BYTES)
        digest, result = record.pop("record_sha256", None), record.get("result")
        of_ours = isinstance(result, dict) and result.get("format") == FORMAT and isinstance(result.get("cells"), list)
        if of_ours and digest != _record_sha256(record, result["cells"]):
            raise InputError(f"{path}: not what was written. Run `unihema predict` again.")

    def _read_all(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in sorted((self.folder / "records").glob("*.json")):
            record = self._read(path)
            if record is not None:
                yield path, record


def _shows_one_cell(result: Mapping[str, Any]) -> bool:
    """Whether an image was classified as a whole, and no cells were looked for in it."""
    return bool(result.get("single_cell")) and not result["cells"] and not result["counts"]


def _counts_of(result: Mapping[str, Any]) -> dict[str, int]:
    """Cells of each class in a record; the one cell of a crop is a cell."""
    return {result["single_cell"]["label"]: 1} if _shows_one_cell(result) else result["counts"]


def _is_record(record: dict[str, Any], name: str) -> bool:
    """Whether a record, which may come from elsewhere, has what is read of it; its files lie in its folder."""
    files, counts = record.get("files"), record["result"].get("counts")
    return (
        all(isinstance(record.get(key), str) for key in ("source", "image_sha256", "settings_sha256"))
        and isinstance(files, dict)
        and all(file.startswith(name) and not {"/", "\\", "\0"} & set(file) for file in files)
        and isinstance(counts, dict)
        and all(type(count) is int for count in counts.values())
    )


def _write_bytes(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _with_cells(record: dict[str, Any], cells: Iterable[Any], **options: Any) -> Iterator[str]:
    """A record as JSON in pieces, of a slide it is large, with cells in its result."""
    place = uuid.uuid4().hex
    text = json.dumps({**record, "result": {**record["result"], "cells": [place]}}, **options)
    before, after = text.split(f'"{place}"')
    yield before
    for number, cell in enumerate(cells):
        yield (", " if number else "") + json.dumps(cell, **options)
    yield after


def _record_sha256(record: dict[str, Any], cells: Iterable[Any]) -> str:
    """What [`json_sha256`] gives, without all of the text at once."""
    digest = hashlib.sha256()
    for piece in _with_cells(record, cells, sort_keys=True):
        digest.update(piece.encode())
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def file_name(stem: str, digest: str) -> str:
    """A stem as the name of files on every system; one that had to be changed ends with a hash of its path."""
    name = "".join("_" if not each.isprintable() or each in '<>:"/\\|?*' else each for each in stem)
    # A leading dot hides a file, and one of dots only is a folder.
    bare = name.lstrip(".")
    name = "_" * (len(name) - len(bare)) + bare
    of_device = name.split(".")[0].strip().lower() in DEVICES
    if name == stem and len(name.encode()) <= NAME_BYTES and not of_device:
        return name
    return f"{name.encode()[: NAME_BYTES - 13].decode(errors='ignore')}_{digest}"


def same_file(name: str) -> str:
    """Equal for names that some file system takes for one: of other case, or composed otherwise."""
    return unicodedata.normalize("NFC", name.casefold())


def csv_lines(columns: Sequence[str], rows: Iterator[list[Any]]) -> Iterator[str]:
    """The lines of a CSV file, as they are read from `rows`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in chain([columns], rows):
        writer.writerow([table_text(value) for value in row])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()


__all__ = [
    "BatchReport",
    "CurrentRecord",
    "ResultFolder",
    "StoredResult",
    "Work",
    "analyze_each",
    "analyze_into",
    "cell_table",
    "count_rows",
    "csv_lines",
    "failed_images",
    "file_name",
    "in_buckets",
    "one_line",
    "read_results",
    "same_file",
]
