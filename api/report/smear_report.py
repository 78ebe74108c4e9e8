"""The report of one sample: its figures, what was left out, and how it was made."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unihema.errors import RequestError
from unihema.files import json_sha256
from unihema.processing_unihema.class_names import PLATELET, RED_CELL, cell_kind, usual_name
from unihema.processing_unihema.questions import LEVEL
from unihema.result_folder import StoredResult
from unihema.results.calibration import TypeLevel, certainty, left_open
from unihema.results.cell import Cell
from unihema.results.monolayer import outside_monolayer
from unihema.results.odd_cells import is_odd
from unihema.results.smear_result import POOR_QUALITY, SmearResult
from unihema.results.tiles import ESTIMATED
from unihema.version import __version__

from .sample import ReportOptions, sample_figures
from .tables import ReportTables


FORMAT = "unihema-smear-report-1"
PRELIMINARY = "preliminary"
# Images that may be left out of all figures, and why.
UNLIKE, QUALITY = "unlike", "quality"
REASONS = {
    UNLIKE: "unlike the images the model was trained on",
    QUALITY: "blurred, noisy, or badly exposed",
}


@dataclass(frozen=True)
class ReportedImage:
    """An image of a sample.

    Args:
        name (`str`): How it is called in the report.
        result ([`SmearResult`]): What was found, or what a person made of it.
        source (`Path`, *optional*): Where the image lies.
        sha256 (`str`, *optional*): Of the image.
    """

    name: str
    result: SmearResult
    source: Path | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, given: SmearResult | StoredResult, number: int) -> "ReportedImage":
        """What `read_results` or an [`Analyzer`] gave."""
        if isinstance(given, StoredResult):
            return cls(given.name, given.result, given.source, given.image_sha256)
        source = None if given.image is None else Path(given.image)
        name = f"image {number}" if source is None else source.name
        return cls(name, given, source, given.provenance.get("image_sha256"))

    @property
    def shows_one_cell(self) -> bool:
        """Whether it is a crop that was classified as a whole."""
        return self.result.single_cell is not None and not self.result.cells

    @property
    def cells(self) -> list[Cell]:
        """Its cells; of a crop the one that it shows."""
        if not self.shows_one_cell:
            return self.result.cells
        return [self.result.whole_image_cell(1)]

    def relabelled(self, labels: Mapping[int, str]) -> "ReportedImage":
        """The same with other classes of some cells.

        Args:
            labels (`Mapping[int, str]`): Number of a cell -> its class.
        """
        if self.shows_one_cell:
            result = replace(self.result, single_cell={**self.result.single_cell, "label": labels[1]})
        else:
            cells = [replace(cell, label=labels.get(cell.id, cell.label)) for cell in self.result.cells]
            result = replace(self.result, cells=cells)
        return replace(self, result=result)

    @property
    def kinds(self) -> dict[str, str | None]:
        """What kind of cell each class of its cells is of."""
        return {label: cell_kind(label, self.result.class_parents) for label in {cell.label for cell in self.cells}}

    @property
    def problems(self) -> list[str]:
        """Which of `REASONS` hold of it."""
        far = self.result.out_of_distribution
        found = [UNLIKE] if far and far["distance"] > far["limit"] else []
        return found + ([QUALITY] if any(text.startswith(POOR_QUALITY) for text in self.result.warnings) else [])


@dataclass
class SmearReport:
    """The report of one sample, made by [`SmearReport.of`].

    Args:
        sample (`str`): Name of the sample.
        images (`list[ReportedImage]`): Images that are counted.
        figures (`dict`): See [`sample_figures`].
        tables ([`ReportTables`]): The tables.
        options ([`ReportOptions`]): What is known of the sample.
        classifier (`dict`): Class -> `precision`, `recall`, `cells` on the checkpoint's validation data.
        left_out (`list[dict]`): `image` and `why` of each that is not counted.
        to_check (`list[dict]`): `image` and `warnings` of each that is counted, and to be looked at.
        outside_monolayer (`dict`): `red_cells` outside, `of` all, `tiles` outside, `of_tiles`, and names of the `bands`.
        area_mm2 (`float`, *optional*): Area of the fields, where the size of their pixels is known.
        status (`str`): `preliminary`, `final` or `amended`.
        report_version (`int`): From 1, one more with each amendment.
        amends (`int`, *optional*): The version that it stands instead of.
        signatures (`list[dict]`): `who`, `time`, `status` and `why` of each.
        made (`str`): When, in UTC.
        provenance (`dict`): Versions, checkpoint, settings and images with their SHA-256.
    """

    sample: str
    images: list[ReportedImage]
    figures: dict[str, Any]
    tables: ReportTables
    options: ReportOptions
    classifier: dict[str, Any] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)
    to_check: list[dict[str, Any]] = field(default_factory=list)
    outside_monolayer: dict[str, Any] = field(default_factory=dict)
    area_mm2: float | None = None
    status: str = PRELIMINARY
    report_version: int = 1
    amends: int | None = None
    signatures: list[dict[str, Any]] = field(default_factory=list)
    made: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        results: Iterable[SmearResult | StoredResult],
        sample: str = "sample",
        tables: ReportTables | str | Path | None = None,
        options: ReportOptions | None = None,
        *,
        monolayer_bands: str | Path | Mapping[str, Any] | None = None,
        leave_out: Sequence[str] = (),
        keep_types: bool = False,
        failed: Mapping[str, str] | None = None,
        classifier: Mapping[str, Mapping[str, Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
        signatures: Sequence[Mapping[str, Any]] = (),
        in_amendment: bool = False,
        made: datetime | None = None,
    ) -> "SmearReport":
        """The report of the images of one sample.

        Args:
            results (`Iterable[SmearResult | StoredResult]`): Its images: fields, slides, or crops of single cells.
            sample (`str`): Its name.
            tables ([`ReportTables`], `str` or `Path`, *optional*): Tables, or a file of them; those of the package when missing.
            options ([`ReportOptions`], *optional*): What is known of the sample, and how it is to be counted.
            monolayer_bands (`str`, `Path` or `Mapping`, *optional*): Bands by which the monolayer is judged anew.
            leave_out (`Sequence[str]`): Of `unlike` and `quality`: images that are not counted.
            keep_types (`bool`): Count white cells by their types also where these are less certain than the checkpoint's level
                (`typed_from` of its calibration); otherwise these are unidentified.
            failed (`Mapping[str, str]`, *optional*): Image -> why it could not be analysed.
            classifier (`Mapping`, *optional*): See [`classifier_errors`].
            settings (`Mapping`, *optional*): What the images were analysed with, beside what their results say.
            signatures (`Sequence[Mapping]`): Of each `who`, `time`, `status`, `why`; the last says the status.
            in_amendment (`bool`): It is being changed since the last of them: a preliminary report of the next version.
            made (`datetime`, *optional*): When; now when missing.

        Raises:
            RequestError: Nothing to count, or an unknown reason to leave images out.
            InputError: The tables or bands are none.
        """
        unknown = [reason for reason in leave_out if reason not in REASONS]
        if unknown:
            raise RequestError(f"Images are left out for {' or '.join(REASONS)}, not for {unknown[0]!r}.")
        if not isinstance(tables, ReportTables):
            tables = ReportTables.read(tables)
        images = [ReportedImage.of(given, number) for number, given in enumerate(results, 1)]
        if not images:
            raise RequestError(f"{sample}: no results to report.")
        if monolayer_bands is not None:
            images = [_judged_by(image, monolayer_bands) for image in images]
        left_out = [{"image": image, "why": why} for image, why in (failed or {}).items()]
        counted = []
        for image in images:
            reasons = [REASONS[reason] for reason in image.problems if reason in leave_out]
            left_out += [{"image": image.name, "why": ", ".join(reasons)}] if reasons else []
            counted += [] if reasons else [image]
        options = options or ReportOptions()
        opened: list[str] = []
        if not keep_types:
            counted, opened = _with_certain_types(counted)
        pool = _Pool.of(counted)
        figures = sample_figures(
            pool.counts, pool.parents, tables, options, pool.in_monolayer, pool.area_mm2, pool.fields
        )
        figures["notes"] += pool.notes
        figures["notes"] += opened
        figures["notes"] += _notes_on_images(counted, left_out)
        signatures = [dict(signature) for signature in signatures]
        task = "detection" if pool.fields or not pool.crops else "single_cell"
        version = max(1, len(signatures) + in_amendment)
        if in_amendment:
            who = signatures[-1]["who"]
            figures["notes"].append(f"An amendment of version {version - 1}, signed by {who}, is open.")
            # Of what is being changed nobody has signed anything.
            signatures = []
        return cls(
            sample=sample,
            images=counted,
            figures=figures,
            tables=tables,
            options=options,
            classifier=dict((classifier or {}).get(task, {})),
            left_out=left_out,
            to_check=[
                {"image": each.name, "warnings": each.result.warnings} for each in counted if each.result.warnings
            ],
            outside_monolayer=pool.outside,
            area_mm2=pool.area_mm2,
            status=signatures[-1]["status"] if signatures else PRELIMINARY,
            report_version=version,
            amends=version - 1 if version > 1 else None,
            signatures=signatures,
            made=(made or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
            provenance=_provenance(images, settings, figures["notes"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but pictures, as JSON types."""
        return {
            "report": FORMAT,
            "report_version": self.report_version,
            "status": self.status,
            "amends": self.amends,
            "sample": self.sample,
            "made": self.made,
            "images": len(self.images),
            "single_cells": sum(image.shows_one_cell for image in self.images),
            "area_mm2": self.area_mm2,
            **self.figures,
            "level": LEVEL,
            "classifier": self.classifier,
            "left_out": self.left_out,
            "outside_monolayer": self.outside_monolayer,
            "to_check": self.to_check,
            "signatures": self.signatures,
            "tables": self.tables.names,
            "options": vars(self.options),
            "provenance": self.provenance,
        }

    def to_json(self) -> str:
        """[`SmearReport.to_dict`] as text, with its `sha256`. What is no character in the name of a file is an escape."""
        return json.dumps({**self.to_dict(), "sha256": self.sha256}, indent=1, ensure_ascii=True) + "\n"

    @property
    def sha256(self) -> str:
        """Of all that is reported, but when."""
        return json_sha256({name: value for name, value in self.to_dict().items() if name != "made"})

    @property
    def chosen(self) -> dict[str, Any]:
        """The options that differ from what is usual."""
        return {name: value for name, value in vars(self.options).items() if value not in (None, False)}

    def to_html(self) -> str:
        """The report as one page that needs nothing else, see [`report_page`]."""
        from .page import report_page

        return report_page(self)

    def to_fhir(self) -> dict[str, Any]:
        """The report as a FHIR `DiagnosticReport`, see [`diagnostic_report`]."""
        from .fhir import diagnostic_report

        return diagnostic_report(self)

    def save(self, folder: str | Path) -> Path:
        """Writes page, JSON, table and FHIR, named after the sample, see [`write_reports`].

        Args:
            folder (`str` or `Path`): Where; made when missing.

        Returns:
            `Path`: The page.
        """
        from .report_files import write_reports

        return write_reports([self], folder)[0]

    def doubtful(self) -> Iterator[tuple[ReportedImage, Cell]]:
        """All cells, those that a person should look at next first: the odd ones, then the least certain. Plain red cells and
        platelets, of which a report says little, come after all others."""
        kinds = {label: kind for image in self.images for label, kind in image.kinds.items()}
        plain = {label: kind == PLATELET or usual_name(label) == "rbc" for label, kind in kinds.items()}
        cells = [(image, cell) for image in self.images for cell in image.cells]
        return iter(sorted(cells, key=lambda each: (plain[each[1].label], not is_odd(each[1]), certainty(each[1]))))


def _with_certain_types(images: Sequence[ReportedImage]) -> tuple[list[ReportedImage], list[str]]:
    """Images whose white cells have a type only where that is certain enough, and a sentence on the others."""
    found, opened, typed, levels = [], 0, 0, []
    for image in images:
        level = TypeLevel.of(image.result, image.shows_one_cell)
        labels = {}
        if level is not None:
            levels.append(level)
            types = level.types(image.kinds)
            white = [cell for cell in image.cells if cell.label in types]
            labels = {cell.id: level.untyped for cell in white if level.leaves_open(certainty(cell))}
            opened, typed = opened + len(labels), typed + len(white)
        found.append(image.relabelled(labels) if labels else image)
    return found, left_open(opened, typed, levels)


@dataclass
class _Pool:
    """The cells of a sample together."""

    counts: dict[str, int]
    in_monolayer: dict[str, int]
    parents: dict[str, str]
    fields: int
    crops: int
    area_mm2: float | None
    outside: dict[str, Any]
    notes: list[str]

    @classmethod
    def of(cls, images: Sequence[ReportedImage]) -> "_Pool":
        counts: Counter[str] = Counter()
        inside: Counter[str] = Counter()
        classes: dict[str, None] = {}
        parents: dict[str, str] = {}
        for image in images:
            classes |= dict.fromkeys([*image.result.classes, *(cell.label for cell in image.cells)])
            parents |= image.result.class_parents
            out = outside_monolayer(image.result.monolayer, image.cells)
            counts.update(cell.label for cell in image.cells)
            inside.update(cell.label for cell, away in zip(image.cells, out, strict=True) if not away)
        fields = [image.result for image in images if not image.shows_one_cell]
        crops = len(images) - len(fields)
        notes = []
        if crops:
            notes.append(f"{crops} images show one cell each: shares are of the cells that somebody chose.")
        whole = not crops and all(of.um_per_pixel and "white_cells" not in (of.tiling or {}) for of in fields)
        estimated = sum(of.um_source == ESTIMATED for of in fields)
        area = sum(of.width * of.height * (of.um_per_pixel or 0) ** 2 for of in fields) / 1e6
        if whole and estimated:
            notes.append(f"The size of a pixel was estimated by red cells in {estimated} of {len(fields)} images.")
        if told := [most for of in fields if (most := _most_false_positives(of)) is not None]:
            notes.append(
                f"Infected red cells were looked for in crops, in {len(told)} of {len(fields)} images. Of the red cells of "
                f"healthy people up to {max(told):.2%} are called infected as well, and perhaps more on a microscope that the "
                "checkpoint has never seen: a share no larger than that shows no infection. Stages are "
                "not told, so gametocytes count, too. Let a person look at the cells."
            )
        red = {name for name in classes if cell_kind(name, parents) == RED_CELL}
        tiles = [
            tile for of in fields if of.monolayer for tile in of.monolayer["tiles"] if len(of.monolayer["tiles"]) > 1
        ]
        outside = {
            "red_cells": sum(counts[name] - inside[name] for name in red),
            "of": sum(counts[name] for name in red),
            "tiles": sum(bool(tile["outside"]) for tile in tiles),
            "of_tiles": len(tiles),
            "bands": sorted({of.monolayer["bands"]["name"] for of in fields if of.monolayer}),
        }
        return cls(
            {name: counts[name] for name in classes},
            {name: inside[name] for name in classes},
            parents,
            len(fields),
            crops,
            area if whole and area else None,
            outside,
            notes,
        )


def _most_false_positives(of: SmearResult) -> float | None:
    """The most red cells of healthy people that are called infected; `None` where parasites were not looked for in crops."""
    known = of.provenance.get("parasites")
    most = known.get("false_positives") if isinstance(known, dict) else None
    return float(most) if isinstance(most, (int, float)) and 0 <= most <= 1 else None


def _notes_on_images(counted: Sequence[ReportedImage], left_out: Sequence[Mapping[str, str]]) -> list[str]:
    notes = [] if counted else ["Every image was left out."]
    if left_out:
        notes.append(f"Images left out: {len(left_out)}, named below.")
    for reason, why in REASONS.items():
        number = sum(reason in image.problems for image in counted)
        if number:
            notes.append(f"{number} of {len(counted)} images are {why}: see their warnings below.")
    return notes


def _judged_by(image: ReportedImage, bands: str | Path | Mapping[str, Any]) -> ReportedImage:
    if image.result.monolayer is None:
        return image
    result = replace(image.result, warnings=list(image.result.warnings))
    result.judge_monolayer(bands)
    return replace(image, result=result)


def _provenance(
    images: Sequence[ReportedImage], settings: Mapping[str, Any] | None, notes: list[str]
) -> dict[str, Any]:
    told = [{key: value for key, value in each.result.provenance.items() if key != "image_sha256"} for each in images]
    if any(each != told[0] for each in told):
        notes.append("The images were not all analysed with the same checkpoint and settings.")
    return {
        "unihema": __version__,
        "analysed_with": told[0],
        "settings": dict(settings or {}),
        "images": [{"image": each.name, "sha256": each.sha256} for each in images],
    }


__all__ = ["FORMAT", "PRELIMINARY", "REASONS", "ReportedImage", "SmearReport"]
