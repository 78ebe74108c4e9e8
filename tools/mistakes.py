"""Pictures of what a checkpoint gets wrong, on the val split of data folders.

`python -m tools.mistakes CHECKPOINT DATA... -o FOLDER` writes `DATA_fields.png` for folders with boxes, the field with the
median number of mistakes beside the one with the most, and `DATA_cells.png` for folders of single cells, the wrong answers it is
surest of.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unihema import Analyzer
from unihema.modeling_unihema.configuration_unihema import ancestors
from unihema.processing_unihema.class_names import usual_name
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import Row
from unihema.training.metrics.detection import share_inside

from .red_cells import boxes_of, corners, matches, picture


# Of a picture, in pixels: longest side of a field, side of a crop, height of a line of text.
FIELD, CROP, LINE = 640, 150, 18
COLUMNS, CROPS = 6, 18
# A cell that was missed, one that no person marked, one with another name.
MISSED, EXTRA, MISNAMED = "#d52b1e", "#e69f00", "#0072b2"
RIGHT = "#8a8a8a"


class Mark(NamedTuple):
    """A box, xyxy in pixels of the image, and what is said of it."""

    box: tuple[float, ...]
    color: str
    text: str = ""


def compared(analyzer: Analyzer, row: Row) -> list[Mark]:
    """A mark for each true or found cell of a field; boxes that are to be ignored are no mistake, nor what lies on them."""
    result = analyzer(picture(row), ["detection"])
    objects = row["objects"]
    ignored = objects.get("iscrowd") or [0] * len(objects["bbox"])
    true, found = corners(objects["bbox"]), boxes_of(result.cells)
    pairs = dict(matches(found, true))
    marks = []
    for number, (name, box) in enumerate(zip(objects["category"], true.tolist(), strict=True)):
        if ignored[number]:
            continue
        if number not in pairs:
            marks.append(Mark(tuple(box), MISSED, name))
        elif usual_name(name) not in names_of(called := result.cells[pairs[number]].label, result.class_parents):
            marks.append(Mark(tuple(box), MISNAMED, f"{called}, is {name}"))
        else:
            marks.append(Mark(tuple(box), RIGHT))
    listed = row.get("annotated_classes")
    known = None if listed is None else {usual_name(name) for name in listed}
    crowds = true[np.array(ignored, dtype=bool)]
    on_crowd = (share_inside(found.numpy(), crowds.numpy()) >= 0.5).any(1)
    for number, cell in enumerate(result.cells):
        if on_crowd[number]:
            continue
        if number not in pairs.values() and (known is None or names_of(cell.label, result.class_parents) & known):
            marks.append(Mark(cell.box, EXTRA, cell.label))
    return marks


def names_of(label: str, parents: Mapping[str, str]) -> set[str]:
    """A class and the coarser ones that it belongs to: a neutrophil is right where the truth is a white cell."""
    return {usual_name(name) for name in (label, *ancestors(label, parents))}


def drawn(row: Row, marks: list[Mark]) -> Image.Image:
    """A field with its mistakes and a line that counts them."""
    image = picture(row).convert("RGB")
    scale = FIELD / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    # Mistakes last, so that nothing lies on them.
    for mark in sorted(marks, key=lambda mark: mark.color != RIGHT):
        box = [value * scale for value in mark.box]
        draw.rectangle(box, outline=mark.color, width=1 if mark.color == RIGHT else 2)
        if mark.text:
            draw.text(
                (box[0] + 3, box[1] + 2), mark.text, fill=mark.color, font=font, stroke_width=2, stroke_fill="white"
            )
    count = Counter(mark.color for mark in marks)
    said = f"{count[RIGHT]} right, {count[MISSED]} missed, {count[EXTRA]} too many, {count[MISNAMED]} misnamed"
    return captioned(image, [f"{row['file_name']}: {said}"])


def captioned(image: Image.Image, lines: list[str]) -> Image.Image:
    canvas = Image.new("RGB", (image.width, image.height + LINE * len(lines) + 4), "white")
    canvas.paste(image)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for number, line in enumerate(lines):
        draw.text((2, image.height + 2 + number * LINE), line, fill="black", font=font)
    return canvas


def side_by_side(images: list[Image.Image], columns: int) -> Image.Image:
    width, height = max(image.width for image in images) + 8, max(image.height for image in images) + 8
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (width * min(columns, len(images)), height * rows), "white")
    for number, image in enumerate(images):
        canvas.paste(image, (number % columns * width, number // columns * height))
    return canvas


def of_fields(analyzer: Analyzer, rows: list[Row]) -> Image.Image:
    with click.progressbar(rows, label="fields") as shown:
        fields = [(row, compared(analyzer, row)) for row in shown]
    fields.sort(key=lambda field: sum(mark.color != RIGHT for mark in field[1]))
    return side_by_side([drawn(*fields[len(fields) // 2]), drawn(*fields[-1])], 2)


def of_cells(analyzer: Analyzer, rows: list[Row]) -> tuple[Image.Image | None, str]:
    wrong = []
    with click.progressbar(rows, label="cells") as shown:
        for row in shown:
            cell = analyzer(picture(row), ["single_cell"]).single_cell
            if usual_name(row["label"]) not in names_of(cell["label"], analyzer.model.config.class_parents):
                wrong.append((cell["score"], row, cell["label"]))
    if not wrong:
        return None, f"all of {len(rows)} cells right"
    wrong.sort(key=lambda each: -each[0])
    pairs = Counter((row["label"], label) for _, row, label in wrong)
    crops = [
        captioned(picture(row).convert("RGB").resize((CROP, CROP)), [row["label"], f"called {label} ({score:.0%})"])
        for score, row, label in wrong[:CROPS]
    ]
    said = ", ".join(f"{true} as {label} {count}" for (true, label), count in pairs.most_common(5))
    return side_by_side(crops, COLUMNS), f"{len(wrong)} of {len(rows)} cells wrong; most often {said}"


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder for the pictures.")
@click.option(
    "--most", type=click.IntRange(min=1), default=400, show_default=True, help="Look at no more rows of a folder."
)
def main(checkpoint: Path, data: tuple[Path, ...], output: Path, most: int) -> None:
    """Draw the mistakes of CHECKPOINT on the val split of each DATA folder."""
    analyzer = Analyzer.from_pretrained(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    for folder in data:
        rows = load_folder(folder, "val")
        fields = [row for row in rows.get("detection", ()) if not row.get("from_attributes")]
        cells = list(rows.get("single_cell", ()))
        for kind, of_kind in (("fields", fields), ("cells", cells)):
            if not of_kind:
                continue
            chosen = [
                of_kind[number] for number in np.linspace(0, len(of_kind) - 1, min(most, len(of_kind))).astype(int)
            ]
            if kind == "fields":
                image, said = of_fields(analyzer, chosen), f"{len(chosen)} fields"
            else:
                image, said = of_cells(analyzer, chosen)
            if image is not None:
                image.save(output / f"{folder.name}_{kind}.png", optimize=True)
            click.echo(f"{folder.name}: {said}")


if __name__ == "__main__":
    main()
