"""A report as one page that needs nothing else: no network, no script."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unihema.errors import printable
from unihema.processing_unihema.class_names import (
    PLATELET,
    RED_CELL,
    WHITE_CELL,
    cell_kind,
    is_untyped_white_cell,
    usual_name,
)
from unihema.results.calibration import certainty
from unihema.results.odd_cells import is_odd

from .pictures import field_picture, thumbnails


if TYPE_CHECKING:
    from .smear_report import ReportedImage, SmearReport


TEMPLATES = Path(__file__).with_name("templates")
# What a page shows at most: cells of one class, cells in all, fields, boxes on a field. What it leaves out it says.
MOST_OF_CLASS, MOST_PLAIN, MOST_CELLS, MOST_FIELDS, MOST_BOXES = 24, 12, 300, 8, 1500
# Rows of long lists, such as of images that failed.
MOST_ROWS = 40
# Quiet colours that can be told apart, also by those who see few; red cells and platelets have their own.
COLORS = ("#5b4b8a", "#0072b2", "#b35900", "#00795c", "#a6366b", "#4d6a12", "#7a4a2b", "#33658a")
RED, PLATELETS, OTHER = "#c08a86", "#6d8f9c", "#6b7280"
# The plot of a differential in units of its own: width for 100 %, and height of a row.
PLOT_WIDTH, PLOT_HEIGHT = 200, 16


def report_page(report: "SmearReport") -> str:
    """A report as HTML: differential with a plot, red cells, parasites, platelets, cells, fields and provenance.

    Everything that comes from files is text in it. Pictures are read from where the images lie; where they are gone, the page
    says so.

    Args:
        report ([`SmearReport`]): The report.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters |= {
        "whole": whole_percent,
        "tenth": _tenth,
        "hundredth": _hundredth,
        "number": _number,
        "listed": _listed,
    }
    colors = class_colors(report)
    page = environment.get_template("report.html.jinja").render(
        report=report,
        figures=report.figures,
        plot=_Plot(report),
        colors=colors,
        white=report.figures["white_cells"],
        gallery=list(_gallery(report)),
        has_odd=any(cell.odd is not None for image in report.images for cell in image.cells),
        fields=list(_fields(report, colors)),
        most_rows=MOST_ROWS,
        pieces=_pieces,
    )
    # What is no character in the name of a file cannot be written.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def class_colors(report: "SmearReport") -> dict[str, str]:
    """A colour for each class."""
    found: dict[str, str] = {}
    number = 0
    for image in report.images:
        parents = image.result.class_parents
        for name in (*image.result.classes, *(cell.label for cell in image.cells)):
            if name in found:
                continue
            kind = cell_kind(name, parents)
            if usual_name(name) in ("rbc", "wbc") or kind == PLATELET:
                found[name] = {RED_CELL: RED, PLATELET: PLATELETS}.get(kind or "", OTHER)
            else:
                found[name] = COLORS[number % len(COLORS)]
                number += 1
    return found


class _Plot:
    """The plot beside the differential, a small picture for each row, all to one scale."""

    width, height = PLOT_WIDTH, PLOT_HEIGHT

    def __init__(self, report: "SmearReport"):
        highest = max(
            (row["high"] or 0 for row in report.figures["white_cells"]["rows"] if not row["hidden"]), default=0
        )
        self.end = next(end for end in (10, 25, 50, 75, 100) if highest <= end)
        step = {10: 5, 25: 5, 50: 10, 75: 25, 100: 25}[self.end]
        self.ticks = [(tick, self.at(tick)) for tick in range(0, self.end + 1, step)]

    def at(self, percent: float | None) -> float:
        """Where a per cent lies."""
        return round(PLOT_WIDTH * (percent or 0) / self.end, 1)


def _gallery(report: "SmearReport") -> Iterator[dict[str, Any]]:
    """Classes with the pictures of their odd and least certain cells, in the order of the differential."""
    order = [row["name"] for row in report.figures["white_cells"]["rows"]]
    of_class: dict[str, list[tuple[ReportedImage, Any]]] = {}
    for image, cell in report.doubtful():
        of_class.setdefault(cell.label, []).append((image, cell))
    parents = {child: parent for image in report.images for child, parent in image.result.class_parents.items()}

    def place(name: str) -> tuple[int, int]:
        kind = cell_kind(name, parents)
        plain = kind == PLATELET or usual_name(name) == "rbc"
        return 2 * plain + (kind != WHITE_CELL), order.index(name) if name in order else len(order)

    left = MOST_CELLS
    for name in sorted(of_class, key=place):
        cells = of_class[name]
        most = MOST_PLAIN if place(name)[0] > 1 else MOST_OF_CLASS
        shown = cells[: min(most, left)]
        left -= len(shown)
        pictures = thumbnails(shown)
        yield {
            "name": name,
            "unidentified": is_untyped_white_cell(name),
            "count": len(cells),
            "more": len(cells) - len(shown),
            "cells": [
                {
                    "picture": picture,
                    "score": certainty(cell),
                    "odd": is_odd(cell),
                    "id": cell.id,
                    "image": image.name,
                }
                for (image, cell), picture in zip(shown, pictures, strict=True)
            ],
        }


def _fields(report: "SmearReport", colors: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Fields with their cells, those with most white cells first."""
    images = [image for image in report.images if not image.shows_one_cell]

    def white(image: "ReportedImage") -> int:
        kinds = image.kinds
        return -sum(kinds[cell.label] == WHITE_CELL for cell in image.cells)

    for image in islice(sorted(images, key=white), MOST_FIELDS):
        boxes, kinds = [], image.kinds
        for cell in image.cells[:MOST_BOXES]:
            left, top, right, bottom = (round(value, 1) for value in cell.box)
            plain = kinds[cell.label] in (RED_CELL, PLATELET)
            boxes.append(
                {
                    "x": left,
                    "y": top,
                    "width": round(right - left, 1),
                    "height": round(bottom - top, 1),
                    "color": colors[cell.label],
                    "label": "" if plain else cell.label,
                }
            )
        yield {
            "name": image.name,
            "width": image.result.width,
            "height": image.result.height,
            "unit": max(image.result.width, image.result.height) / 400,
            "picture": field_picture(image),
            "boxes": boxes,
            "more": max(0, len(image.cells) - MOST_BOXES),
        }


def _pieces(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings and versions as lines of a table: a mapping within them of plain values in one line, others by dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and any(isinstance(each, Mapping) for each in value.values()):
            yield from _pieces(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            if value:
                yield f"{prefix}{name}", ", ".join(f"{key} {each}" for key, each in value.items())
        elif value not in (None, "", [], False):
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _shown(value: Any) -> Any:
    """Text as it reads, whatever a file was called."""
    return printable(value) if type(value) is str else value


def _listed(values: Sequence[str], between: str = ", ") -> str:
    return printable(between.join(values))


def whole_percent(value: float | None) -> str:
    """A share as laboratories write it: what is there is never 0, and what is not all never 100."""
    if value is None:
        return "–"
    if 0 < value < 1:
        return "< 1"
    return "> 99" if 99 < value < 100 else f"{math.floor(value + 0.5)}"


def _tenth(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _hundredth(value: float | None) -> str:
    """A share of which a few of very many are not none."""
    if value is None:
        return "–"
    return (
        f"{value:.2f}"
        if value == 0 or value >= 0.1
        else np.format_float_positional(value, 2, fractional=False, trim="-")
    )


def _number(value: float | None) -> str:
    """A number with narrow blanks between its thousands."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"
    return text.replace(",", "\u202f")


__all__ = ["class_colors", "report_page"]
