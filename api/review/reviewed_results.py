"""The samples of a results folder as a report takes them: predictions, with what a person has changed and signed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unihema.checkpoint_files import local_folder
from unihema.errors import InputError, UniHemaError
from unihema.files import SETTINGS_FILE, read_json_object
from unihema.report.classifier_errors import classifier_errors
from unihema.report.samples import check_samples, read_samples, sample_of
from unihema.result_folder import StoredResult, failed_images, read_results

from .state import AMENDING, LOG_FILE, Review, ReviewedCell, ReviewedImage, ReviewedSample


SINCE_SIGNED = "analysed since the sample was signed; open an amendment to take it in"


@dataclass
class SampleResults:
    """One sample.

    Args:
        name (`str`): Its name.
        results (`list[StoredResult]`): Its images, cells as they stand.
        details (`dict`): Everything else of [`SmearReport.of`] that the folder says.
    """

    name: str
    results: list[StoredResult] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def reviewed_samples(
    folder: str | Path, sample_by: str | None = None, checkpoint: str | Path | None = None
) -> list[SampleResults]:
    """The samples of a results folder, in the order of their names.

    Args:
        folder (`str` or `Path`): The results folder.
        sample_by (`str`, *optional*): See [`sample_of`]; as they were reviewed when missing.
        checkpoint (`str` or `Path`, *optional*): What made the results; where it was then when missing.

    Raises:
        InputError: No results folder, or nothing in it.
    """
    folder = Path(folder)
    found: dict[str, SampleResults] = {}
    late: dict[str, list[str]] = {}
    if (folder / LOG_FILE).is_file():
        with Review(folder, sample_by, read_only=True) as review:
            for sample in review.samples.values():
                # A crop whose only cell was deleted shows nothing to count.
                shown = [image for image in sample.images if not image.shows_one_cell or any(_present(image))]
                results = [_as_reviewed(image) for image in shown or sample.images]
                details = {"signatures": _signatures(sample), "in_amendment": sample.status == AMENDING}
                found[sample.name] = SampleResults(sample.name, results, details)
            late, sample_by = review.late, review.sample_by
    else:
        table, images = read_samples(sample_by), list(read_results(folder))
        check_samples(images, sample_by, table)
        for stored in images:
            name = sample_of(stored, folder, sample_by, table)
            found.setdefault(name, SampleResults(name)).results.append(stored)
    if not found:
        raise InputError(f"{folder}: no results of its settings. Run `unihema predict` again.")
    settings = read_json_object(folder / SETTINGS_FILE, InputError, "Analyse the images again.")
    shared = {"settings": settings, "classifier": _errors(checkpoint, settings)}
    failed = failed_images(folder)
    for sample in found.values():
        # Of one sample alone they are, whatever the folder was called then.
        alone = sample_by is None and len(found) == 1
        left_out = (failed if alone else _failed_of(failed, sample, folder, sample_by)) | dict.fromkeys(
            late.get(sample.name, ()), SINCE_SIGNED
        )
        sample.details |= shared | {"failed": left_out}
    return [found[name] for name in sorted(found)]


def _as_reviewed(image: ReviewedImage) -> StoredResult:
    """The result of an image with its cells as they stand."""
    result = image.stored.result
    present = list(_present(image))
    if image.shows_one_cell:
        alone = None
        if present and result.single_cell:
            alone = {**result.single_cell, "label": present[0].label}
            if image.is_certain(present[0]):
                alone["probability"] = 1.0
                alone.pop("odd", None)
        return image.stored._replace(result=replace(result, single_cell=alone))
    cells = [
        # What a person has looked at is certain.
        replace(
            cell.original,
            label=cell.label,
            **({"probability": 1.0, "odd": None} if image.is_certain(cell) else {}),
        )
        for cell in present
    ]
    # A field without any cell is no picture of one.
    return image.stored._replace(result=replace(result, cells=cells, single_cell=result.single_cell if cells else None))


def _present(image: ReviewedImage) -> Iterator[ReviewedCell]:
    return (cell for cell in image.cells.values() if cell.present)


def _signatures(sample: ReviewedSample) -> list[dict[str, Any]]:
    """Who signed a sample, each time."""
    return [{key: each[key] for key in ("who", "time", "status", "why")} for each in sample.signatures]


def _errors(checkpoint: str | Path | None, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    source = checkpoint or settings.get("checkpoint")
    if not isinstance(source, (str, Path)):
        return {}
    try:
        where = local_folder(source, local_files_only=True)
    except UniHemaError:
        return {}
    return classifier_errors(where, settings.get("checkpoint_sha256") or {})


def _failed_of(failed: Mapping[str, str], sample: SampleResults, folder: Path, sample_by: str | None) -> dict[str, str]:
    """Of the images that could not be analysed those of a sample, as far as their paths say."""
    if not failed:
        return {}
    table, found = read_samples(sample_by), {}
    for image, why in failed.items():
        try:
            stored = sample.results[0]._replace(name=Path(image).stem, source=Path(image))
            if sample_of(stored, folder, sample_by, table) == sample.name:
                found[image] = why
        except UniHemaError:
            continue
    return found


__all__ = ["SampleResults", "reviewed_samples"]
