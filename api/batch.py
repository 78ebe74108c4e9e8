"""Many images analysed, one at a time: resumable, and nothing lost when it is stopped at any moment.

Each image ends as one record, `records/<name>.json`, written last and atomically: a record says that all the image's
files are there. The tables (`cells.csv`, `counts.csv`, `results.json`) are made from the records at the end of a run,
also of one that is interrupted; after a kill the next run makes them.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import fingerprint, load_checkpoint, set_image_sizes
from .files import find_images, sha256, write_atomically, write_text
from .int8 import to_int8
from .lookahead import ahead, in_buckets
from .predict import OpenedImage, analyze_opened, check_request, check_threshold, open_image
from .results.export import cell_columns, cell_row
from .results.smear_result import SmearResult
from .version import __version__


if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


COUNT_COLUMNS = ["image", "label", "count", "percent_of_white_cells", "differential", "warnings"]
# Images that are read before they are needed, and results that wait to be written, at most.
READ_AHEAD = WRITE_BEHIND = 2
# What is wrong with one image, and no reason to stop.
_FAILURES = (OSError, ValueError, RuntimeError, MemoryError)


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
    """

    analysed: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    images: int = 0
    other_settings: int = 0


def predict_files(
    checkpoint: str | Path,
    inputs: Sequence[str | Path],
    output: str | Path,
    tasks: Sequence[str] | None = None,
    prompt: str | Sequence[str] | None = None,
    questions: Sequence[str] = (),
    threshold: float | None = None,
    geojson: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    batch_size: int = 1,
    int8: bool = False,
    image_sizes: Mapping[str, int] | None = None,
    on_image: Callable[[int, int, Path, SmearResult | str | None], None] | None = None,
) -> BatchReport:
    """Analyses files, folders and glob patterns into a results folder.

    Images that were analysed with the same checkpoint and settings, and have not changed since, are skipped. A file
    that cannot be read is reported and the rest goes on.

    Args:
        checkpoint (`str` or `Path`): Checkpoint folder.
        inputs (`Sequence[str | Path]`): Image files, folders (with subfolders) and glob patterns.
        output (`str` or `Path`): Folder for the results; made when missing.
        tasks, prompt, questions, threshold: As for [`analyze`].
        geojson (`bool`): Also write a GeoJSON file for QuPath for each image.
        overwrite (`bool`): Analyse every image again.
        device (`str`, *optional*): As for [`load_checkpoint`].
        batch_size (`int`): Images of one size that are analysed together: faster on a GPU, with the same results up to
            float rounding. Files are read ahead and written behind in any case.
        int8 (`bool`): Quantise the model, see [`to_int8`]: faster answers on the CPU at some cost in accuracy.
        image_sizes (`Mapping[str, int]`, *optional*): Task -> longest edge in pixels at which the model sees images, instead of
            the checkpoint's: for another magnification, see [`set_image_sizes`].
        on_image (`Callable`, *optional*): Called after each image with its number from 1, the number of images, its
            path, and its result, an error message, or `None` when it was skipped.

    Returns:
        [`BatchReport`]

    Raises:
        CheckpointError: The checkpoint cannot be used, or lacks a head that is asked for.
        ValueError: Unknown task, a threshold outside 0..1, an image size that cannot be, a text that is too long, a batch of
            no images, an output folder that holds an image to analyse, or a model that cannot be quantised.
        OSError: The output folder cannot be written.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: the output must be a folder, and this is a file.")
    check_threshold(threshold)
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")
    images, problems = find_images(inputs, exclude=output)
    beside = next((image for image in images if image.resolve().parent == output.resolve()), None)
    if beside is not None:
        raise ValueError(
            f"{output}: this folder holds {beside.name}, an image to analyse; name another one for results."
        )
    files = fingerprint(checkpoint)
    model, processor = load_checkpoint(checkpoint, "cpu" if int8 and device is None else device)
    set_image_sizes(processor, image_sizes or {})
    tasks = check_request(model, processor, tasks, prompt, questions, threshold)
    if int8:
        model = to_int8(model)
    settings = {
        "unihema": __version__,
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": files,
        "tasks": list(tasks),
        "prompt": prompt if isinstance(prompt, str) or prompt is None else list(prompt),
        "questions": list(questions),
        "threshold": threshold,
        "geojson": geojson,
    }
    # Only where they are given: results made before these settings existed stay current.
    if int8:
        settings["int8"] = True
    if image_sizes:
        settings["image_sizes"] = dict(image_sizes)
    records = Records(output, settings)
    report = BatchReport(failed=dict(problems))
    attributes = list(model.config.morphology) if "detection" in tasks else []
    run = _Run(model, processor, records, report, (tasks, prompt, questions, threshold), files, overwrite)
    try:
        with closing(run.outcomes(images, batch_size)) as outcomes:
            for number, (path, outcome) in enumerate(outcomes, 1):
                if on_image:
                    on_image(number, len(images), path, outcome)
    finally:
        records.write_tables(attributes, report)
    return report


@dataclass
class _Work:
    """An image on its way: what was read, and what came of it."""

    path: Path
    name: str
    digest: str = ""
    opened: OpenedImage | None = None
    outcome: SmearResult | str | None = None


class _Run:
    """Reads ahead, analyses and writes behind, each at the same time as the others."""

    def __init__(self, model, processor, records: "Records", report: BatchReport, request, files, overwrite: bool):
        self.model, self.processor, self.request = model, processor, request
        self.records, self.report, self.files, self.overwrite = records, report, files, overwrite

    def outcomes(self, images: Sequence[Path], batch_size: int) -> Iterator[tuple[Path, SmearResult | str | None]]:
        """Each image and its result (once that is written), an error message, or `None` when it was there already."""
        works = (_Work(path, name) for path, name in self.records.names(images).items())
        # What an executor has started is finished when it is left, also after an interrupt.
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            read = ahead(reader, self._read, works, waiting=batch_size + READ_AHEAD)
            groups = in_buckets(read, self._size, batch_size)
            analysed = (work for group in groups for work in self._analyse(group))
            for work in ahead(writer, self._write, analysed, waiting=WRITE_BEHIND):
                yield work.path, work.outcome

    def _read(self, work: _Work) -> _Work:
        try:
            work.digest = sha256(work.path)
            if self.overwrite or not self.records.is_current(work.name, work.digest):
                work.opened = open_image(work.path)
        except _FAILURES as error:
            work.outcome = _one_line(error, work.path)
        return work

    @staticmethod
    def _size(work: _Work) -> object:
        # The size in pixels decides the size after resizing, and so the padding. What is not analysed waits for nothing.
        return work.opened.pixels.size if work.opened else None

    def _analyse(self, group: list[_Work]) -> list[_Work]:
        waiting = [work for work in group if work.opened]
        if not waiting:
            return group
        try:
            results = analyze_opened(self.model, self.processor, [work.opened for work in waiting], *self.request)
        except _FAILURES as error:
            if len(waiting) > 1:
                return [work for one in group for work in self._analyse([one])]
            results = [_one_line(error, work.path) for work in waiting]
        for work, outcome in zip(waiting, results, strict=True):
            work.outcome = outcome
        return group

    def _write(self, work: _Work) -> _Work:
        # Where results cannot be written, no further image needs analysing: that is raised.
        if work.outcome is None:
            self.report.skipped.append(work.path)
        elif isinstance(work.outcome, str):
            self.report.failed[str(work.path)] = work.outcome
        else:
            work.outcome.provenance |= {"checkpoint_sha256": self.files, "image_sha256": work.digest}
            self.records.write(work.name, work.path, work.digest, work.outcome, work.opened.pixels)
            self.report.analysed.append(work.path)
        work.opened = None
        return work


def _one_line(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(f"{path}: ")


class Records:
    """The records of a results folder, and the tables made from them.

    Args:
        folder (`Path`): The results folder.
        settings (`dict`): Everything that decides a result; records made with other settings are not current.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.settings_sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def names(self, images: Sequence[Path]) -> dict[Path, str]:
        """A name for the files of each image: its stem, with its folder's name or a hash where stems meet.

        An image keeps the name it has in the folder, whatever else is given with it later.
        """
        owners = {path.stem.lower(): record["source"] for path, record in self._read_all()}
        names = {}
        for image in images:
            source = image.resolve()
            candidates = [
                image.stem,
                f"{source.parent.name}_{image.stem}",
                f"{image.stem}_{hashlib.sha256(str(source).encode()).hexdigest()[:12]}",
            ]
            owned = [name for name in candidates if owners.get(name.lower()) == str(source)]
            free = [name for name in candidates if name.lower() not in owners]
            names[image] = (owned or free)[0]
            owners[names[image].lower()] = str(source)
        return names

    def is_current(self, name: str, image_sha256: str) -> bool:
        """Whether the image's results are there, made from the same bytes with the same settings."""
        record = self._read(self._record(name))
        return (
            record is not None
            and record["settings_sha256"] == self.settings_sha256
            and record["image_sha256"] == image_sha256
            and all((self.folder / file).is_file() for file in record["files"])
        )

    def write(self, name: str, path: Path, image_sha256: str, result: SmearResult, pixels: "PILImage") -> None:
        """Writes an image's files, the record last."""
        from PIL import Image

        overlay = result.overlay(pixels)
        # At the usual level packing the overlay takes longer than finding the cells; this one makes files a quarter larger.
        files = {f"{name}_overlay.png": lambda file: overlay.save(file, "PNG", compress_level=1)}
        if result.mask is not None:
            mask = Image.fromarray(result.mask * 255)
            files[f"{name}_mask.png"] = lambda file: mask.save(file, "PNG")
        if self.settings["geojson"]:
            text = json.dumps(result.to_geojson(), ensure_ascii=False)
            files[f"{name}.geojson"] = lambda file: file.write(text.encode("utf-8"))
        for file, write in files.items():
            write_atomically(self.folder / file, write)
        record = {
            "source": str(path.resolve()),
            "image_sha256": image_sha256,
            "settings_sha256": self.settings_sha256,
            "files": list(files),
            "result": result.to_dict(),
        }
        write_text(self._record(name), [json.dumps(record, ensure_ascii=False)])

    def write_tables(self, attributes: Sequence[str], report: BatchReport) -> None:
        """Writes `cells.csv`, `counts.csv` and `results.json` from the records, and completes the report."""
        failed = {str(Path(item).resolve()) for item in report.failed}
        totals: dict[str, int] = {}
        current = []
        for path, record in self._read_all():
            if record["settings_sha256"] != self.settings_sha256:
                report.other_settings += 1
            elif record["source"] not in failed:
                current.append(path)
                for label, count in record["result"]["counts"].items():
                    totals[label] = totals.get(label, 0) + count
        report.totals, report.images = totals, len(current)
        columns = cell_columns(attributes)
        write_text(self.folder / "cells.csv", _csv(columns, self._cell_rows(current, attributes)))
        write_text(
            self.folder / "counts.csv",
            _csv(COUNT_COLUMNS, self._counts(current)),
        )
        write_text(self.folder / "results.json", self._json(current, report))

    def _results(self, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for path in paths:
            yield self._read(path)["result"]

    def _cell_rows(self, paths: Sequence[Path], attributes: Sequence[str]) -> Iterator[list[Any]]:
        for values in self._results(paths):
            result = SmearResult.from_dict(values | {"mask": None})
            for cell in result.cells:
                yield list(cell_row(result, cell, attributes).values())

    def _counts(self, paths: Sequence[Path]) -> Iterator[list[Any]]:
        for values in self._results(paths):
            result = SmearResult.from_dict(values | {"mask": None})
            warnings = " ".join(result.warnings) or None
            for label, count in result.counts.items():
                percent = result.percent_of_white_cells(label)
                percent = None if percent is None else round(percent, 1)
                yield [result.image, label, count, percent, result.place_in_differential(label), warnings]

    def _json(self, paths: Sequence[Path], report: BatchReport) -> Iterator[str]:
        head = {"unihema": __version__, "settings": self.settings, "totals": report.totals, "failed": report.failed}
        yield json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}") + ',\n "images": ['
        for number, result in enumerate(self._results(paths)):
            yield (",\n" if number else "\n") + json.dumps(result, ensure_ascii=False)
        yield "\n ]\n}\n"

    def _record(self, name: str) -> Path:
        return self.folder / "records" / f"{name}.json"

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A record, or None where there is none or it is not one of this format."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            SmearResult.from_dict(record["result"] | {"mask": None})
            return record if {"source", "image_sha256", "settings_sha256", "files"} <= record.keys() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _read_all(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in sorted((self.folder / "records").glob("*.json")):
            record = self._read(path)
            if record is not None:
                yield path, record


def _csv(columns: Sequence[str], rows: Iterator[list[Any]]) -> Iterator[str]:
    """The lines of a CSV file, as they are read from `rows`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in chain([columns], rows):
        writer.writerow(row)
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()


__all__ = ["BatchReport", "predict_files"]
