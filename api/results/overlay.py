"""A result drawn on its image."""

import colorsys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unihema.files import printable, shortened

from ..processing_unihema.class_names import UNIDENTIFIED


if TYPE_CHECKING:
    from .smear_result import SmearResult


Color = tuple[int, int, int]

# The drawn image's longer side: small images are enlarged so that labels do not cover the cells.
LONGEST_SIDE = 2048
SMALLEST_LONG_SIDE = 1280
_MAX_ENLARGEMENT = 4

# Dark enough to stand out on a pale pink smear, and told apart by the colour-blind as far as eight can be.
_PALETTE: tuple[Color, ...] = (
    (213, 43, 30),
    (0, 114, 178),
    (0, 135, 90),
    (148, 0, 148),
    (201, 96, 0),
    (0, 0, 0),
    (99, 72, 30),
    (0, 140, 160),
)
# Of the legend: a row more than fits is counted, a name longer than that is cut.
MOST_ROWS, LONGEST_ROW = 100, 80
# Cells that are labelled: of more there is no room for, and looking for it takes time.
MOST_LABELS = 1000
_MASK_COLOR: Color = (0, 200, 200)
_WARNING_COLOR: Color = (230, 180, 0)


def class_colors(names: Iterable[str]) -> dict[str, Color]:
    """A colour for each class, by its place in the list.

    Args:
        names (`Iterable[str]`): Class names.
    """
    return {name: _color(index) for index, name in enumerate(names)}


def _color(index: int) -> Color:
    if index < len(_PALETTE):
        return _PALETTE[index]
    hue = (index * 0.61803398875) % 1  # the golden ratio keeps neighbours apart
    red, green, blue = (int(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.9, 0.7))
    return red, green, blue


def draw_overlay(result: "SmearResult", image: Image.Image) -> Image.Image:
    """See [`SmearResult.overlay`]."""
    canvas = _resized(image)
    if result.mask is not None:
        canvas = _tinted(canvas, result.mask)
    colors = class_colors(result.counts)
    _tint_cells(canvas, result, colors)
    _draw_cells(canvas, result, colors)
    return _with_legend(canvas, result, colors)


def _resized(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest > LONGEST_SIDE:
        scale = LONGEST_SIDE / longest
    elif longest < SMALLEST_LONG_SIDE:
        scale = min(SMALLEST_LONG_SIDE / longest, _MAX_ENLARGEMENT)
    else:
        scale = 1
    width, height = (max(1, round(side * scale)) for side in image.size)
    size = (width, height)
    image = image.convert("RGB")
    return image.copy() if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2)


def _tinted(canvas: Image.Image, mask: np.ndarray) -> Image.Image:
    inside = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(canvas.size, Image.Resampling.NEAREST)) > 0
    return Image.composite(Image.new("RGB", canvas.size, _MASK_COLOR), canvas, _tint(inside, 77))


def _tint(inside: np.ndarray, core_weight: int) -> Image.Image:
    """How much a mask colours each pixel, 0 to 255: its edge nearly whole, the rest as said."""
    padded = np.pad(inside, 2)
    height, width = inside.shape
    core = inside.copy()
    for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4)):
        core &= padded[dy : dy + height, dx : dx + width]
    return Image.fromarray(np.where(inside, np.where(core, core_weight, 242), 0).astype(np.uint8))


def _tint_cells(canvas: Image.Image, result: "SmearResult", colors: dict[str, Color]) -> None:
    """Colours each cell that has a mask."""
    scale_x, scale_y = canvas.width / result.width, canvas.height / result.height
    for cell in result.cells:
        if cell.mask is None or not cell.mask.any():
            continue
        height, width = cell.mask.shape
        left, top = round(cell.origin[0] * scale_x), round(cell.origin[1] * scale_y)
        right, bottom = round((cell.origin[0] + width) * scale_x), round((cell.origin[1] + height) * scale_y)
        # Of a slide a cell is less than a pixel.
        size = max(1, right - left), max(1, bottom - top)
        inside = np.asarray(Image.fromarray(cell.mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
        canvas.paste(colors[cell.label], (left, top), _tint(inside, 25))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_on(color: Color) -> str:
    red, green, blue = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"


def _draw_cells(canvas: Image.Image, result: "SmearResult", colors: dict[str, Color]) -> None:
    draw = ImageDraw.Draw(canvas)
    scale_x, scale_y = canvas.width / result.width, canvas.height / result.height
    line = max(2, round(max(canvas.size) / 640))
    font = _font(max(12, round(max(canvas.size) / 80)))
    boxes = []
    for cell in result.cells:
        x_min, y_min, x_max, y_max = cell.box
        left, top = round(x_min * scale_x), round(y_min * scale_y)
        boxes.append((left, top, max(left, round(x_max * scale_x) - 1), max(top, round(y_max * scale_y) - 1)))
        # Of a slide a cell is a few pixels large.
        smallest = min(boxes[-1][2] - left, boxes[-1][3] - top)
        draw.rectangle(boxes[-1], outline=colors[cell.label], width=min(line, max(1, smallest // 4)))
    # Text last, best cells first: a label is shortened to the score, or left out, rather than laid over another label.
    taken: list[tuple[int, int, int, int]] = []
    for cell, box in list(zip(result.cells, boxes, strict=True))[:MOST_LABELS]:
        for text in (printable(f"{cell.label} {cell.score:.2f}"), f"{cell.score:.2f}"):
            place = _free_place(draw, text, font, box, canvas.size, taken)
            if place:
                taken.append(place)
                draw.rectangle(place, fill=colors[cell.label])
                draw.text((place[0] + 3, place[1] + 1), text, fill=_text_on(colors[cell.label]), font=font, anchor="lt")
                break


def _free_place(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    box: Sequence[int],
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int] | None:
    """Where a label fits: above its box, else below, else inside its upper edge, clear of other labels."""
    _, _, width, height = draw.textbbox((0, 0), text, font=font, anchor="lt")
    width, height = int(width) + 6, int(height) + 4
    left = min(max(0, box[0]), max(0, size[0] - width))
    for top in (box[1] - height, box[3] + 1, box[1] + 2):
        place = (left, top, left + width, top + height)
        fits = top >= 0 and place[2] <= size[0] and place[3] <= size[1]
        if fits and not any(
            place[0] < other[2] and other[0] < place[2] and place[1] < other[3] and other[1] < place[3]
            for other in taken
        ):
            return place
    return None


def _legend_rows(result: "SmearResult", colors: dict[str, Color]) -> list[tuple[Color | None, str, str]]:
    rows: list[tuple[Color | None, str, str]] = []
    if result.classes or result.cells:
        # Without detection there is no count to report, not even zero.
        rows.append((None, f"{len(result.cells)} cells", ""))
    for label, count in result.counts.items():
        percent, place = result.percent_of_white_cells(label), result.place_in_differential(label)
        untyped = f", {place}" if place == UNIDENTIFIED else ""
        value = str(count) if percent is None else f"{count}  ({percent:.0f} % of white cells{untyped})"
        rows.append((colors[label], printable(label), value))
    if result.mask is not None:
        rows.append(
            (_MASK_COLOR, printable(result.mask_label or "mask"), f"{100 * result.mask.mean():.1f} % of the image")
        )
    if result.single_cell is not None:
        rows.append(
            (None, printable(f"single cell: {result.single_cell['label']}"), f"{result.single_cell['score']:.2f}")
        )
    if result.warnings:
        rows.append((_WARNING_COLOR, "warnings", str(len(result.warnings))))
    return rows or [(None, "nothing was looked for", "")]


def _with_legend(canvas: Image.Image, result: "SmearResult", colors: dict[str, Color]) -> Image.Image:
    rows = [(color, shortened(name, LONGEST_ROW), value) for color, name, value in _legend_rows(result, colors)]
    if len(rows) > MOST_ROWS:
        rows = [*rows[:MOST_ROWS], (None, f"and {len(rows) - MOST_ROWS} more", "")]
    margin = swatch = max(16, round(max(canvas.size) / 80))
    font = _font(margin)
    measure = ImageDraw.Draw(canvas)
    row_height = int(1.7 * margin)
    names = max(measure.textlength(name, font=font) + (swatch + margin // 2 if color else 0) for color, name, _ in rows)
    values = max(measure.textlength(value, font=font) for _, _, value in rows)
    width = int(names + values) + 3 * margin
    framed = Image.new(
        "RGB", (canvas.width + width, max(canvas.height, row_height * len(rows) + 2 * margin)), (250, 250, 250)
    )
    framed.paste(canvas)
    draw = ImageDraw.Draw(framed)
    for index, (color, name, value) in enumerate(rows):
        x, middle = canvas.width + margin, margin + index * row_height + row_height // 2
        if color:
            draw.rectangle((x, middle - swatch // 2, x + swatch, middle + swatch // 2), fill=color)
            x += swatch + margin // 2
        draw.text((x, middle), name, fill="black", font=font, anchor="lm")
        draw.text((canvas.width + width - margin, middle), value, fill="black", font=font, anchor="rm")
    return framed


__all__ = ["class_colors", "draw_overlay"]
