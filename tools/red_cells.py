"""Measures whether counts hold on any width and magnification: `python -m tools.red_cells fields|mosaics|magnified DATA...`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

from unihema import Analyzer
from unihema.processing_unihema.class_names import RED_CELL, cell_kind
from unihema.processing_unihema.image_io import load_image
from unihema.results.cell_size import KnownSize
from unihema.results.smear_result import Cell, SmearResult
from unihema.results.tiles import TileDetector, see_in_tiles
from unihema.shipped import lay_down_checkpoint
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import Row
from unihema.training.data.shards import readable
from unihema.training.metrics.detection import MAX_DETECTIONS, mean_average_precision
from unihema.training.studies.corruptions import CORRUPTIONS, shifted_rows


OVERLAP = 0.5
# A cell is at a seam of a mosaic if its box is within so many pixels of it.
AT_SEAM = 8
# The least score of a box that counts for average precision.
LEAST_SCORE = 0.01


class Records:
    """What was measured, a line each, so that a run that is stopped goes on.

    Args:
        file (`Path`, *optional*): JSON lines; nothing is kept without it.
    """

    def __init__(self, file: Path | None):
        self.file = file
        lines = file.read_text().splitlines() if file and file.exists() else []
        self.known = {record["key"]: record for record in map(json.loads, lines)}

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under a key, measured where there is none."""
        if key not in self.known:
            self.known[key] = {"key": key} | measure()
            if self.file:
                with self.file.open("a") as out:
                    out.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]


def matches(found: torch.Tensor, true: torch.Tensor) -> list[tuple[int, int]]:
    """Pairs of true boxes xyxy `[m, 4]` and found ones `[n, 4]`, each in one pair, those that overlap most first."""
    overlap = box_iou(true, found)
    pairs, taken = [], (set(), set())
    for place in overlap.flatten().argsort(descending=True).tolist() if overlap.numel() else ():
        pair = divmod(place, len(found))
        if overlap[pair] < OVERLAP:
            break
        if pair[0] not in taken[0] and pair[1] not in taken[1]:
            pairs.append(pair)
            for side in (0, 1):
                taken[side].add(pair[side])
    return pairs


def boxes_of(cells: Sequence[Cell]) -> torch.Tensor:
    return torch.tensor([cell.box for cell in cells]).reshape(-1, 4).float()


def corners(boxes: Sequence[Sequence[float]]) -> torch.Tensor:
    """Boxes x, y, width, height as xyxy `[n, 4]`."""
    boxes = torch.tensor(boxes).reshape(-1, 4).float()
    return torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)


def rows_of(folder: Path, part: str, every: int) -> list[Row]:
    return list(load_folder(folder, part)["detection"])[::every]


def picture(row: Row) -> Image.Image:
    """The image of a row, as it is or magnified."""
    return load_image(readable(row["image"]))


def mosaic(fields: Sequence[Image.Image], columns: int, gap: int) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Fields of one size side by side, row by row, with a gap of bright glass between them, and where each begins."""
    width, height = fields[0].size
    places = [(number % columns * (width + gap), number // columns * (height + gap)) for number in range(len(fields))]
    pixels = np.concatenate([np.asarray(field)[::8, ::8].reshape(-1, 3) for field in fields])
    brightness = pixels.sum(1, dtype=int)
    glass = np.median(pixels[brightness >= np.percentile(brightness, 90)], 0)
    canvas = Image.new("RGB", (places[-1][0] + width, places[-1][1] + height), tuple(int(value) for value in glass))
    for field, place in zip(fields, places, strict=True):
        canvas.paste(field, place)
    return canvas, places


def of_mosaic(analyzer: Analyzer, fields: Sequence[Image.Image], columns: int, gap: int) -> dict[str, Any]:
    """Cells of fields alone and of a mosaic of them: their numbers, also apart from its seams, and how many are the same."""
    image, places = mosaic(fields, columns, gap)
    alone: list[Cell] = []
    for field, (x, y) in zip(fields, places, strict=True):
        for cell in analyzer(field, ["detection"]).cells:
            cell.box = tuple(value + shift for value, shift in zip(cell.box, (x, y, x, y), strict=True))
            alone.append(cell)
    result = analyzer(image, ["detection"])
    width, height = fields[0].size
    lines = [
        {start + add for start in {place[axis] for place in places} for add in (0, (width, height)[axis])}
        for axis in (0, 1)
    ]
    lines = [axis_lines - {0, side} for axis_lines, side in zip(lines, image.size, strict=True)]

    def apart(cell: Cell) -> bool:
        return not any(
            cell.box[axis] - AT_SEAM < line < cell.box[axis + 2] + AT_SEAM for axis in (0, 1) for line in lines[axis]
        )

    pairs = [(alone[i], result.cells[j]) for i, j in matches(boxes_of(result.cells), boxes_of(alone))]
    read = [
        (values["value"], other.attributes[name]["value"])
        for one, other in pairs
        for name, values in one.attributes.items()
        if name in other.attributes
    ]
    return {
        "alone": len(alone),
        "mosaic": len(result.cells),
        "alone_apart": sum(map(apart, alone)),
        "mosaic_apart": sum(map(apart, result.cells)),
        "matched": len(pairs),
        "same_type": sum(one.label == other.label for one, other in pairs),
        "attributes": len(read),
        "same_attributes": sum(one == other for one, other in read),
        "scale": result.tiling and result.tiling["scale"],
    }


class Ranked:
    """Cells of images with every score, as average precision needs them, of the classes that a data set annotates.

    Args:
        analyzer ([`Analyzer`]): Finds them.
        classes (`Sequence[str]`): The classes.
    """

    def __init__(self, analyzer: Analyzer, classes: Sequence[str]):
        self.model, self.processor = analyzer.model, analyzer.processor
        self.asked = torch.tensor([name in classes for name in self.model.config.class_names])
        self.text = dict(self.processor(text=self.processor.default_prompts["detection"], task="detection"))

    def __call__(self, images: Sequence[Image.Image]) -> list[SmearResult]:
        return [self.look(image) for image in images]

    @torch.inference_mode()
    def look(self, image: Image.Image) -> SmearResult:
        """Of one image."""
        batch = self.processor.image_processor([image], task="detection")
        output = self.model(task="detection", **batch, **self.text)
        output.logits = output.logits.masked_fill(~self.asked, float("-inf"))
        found = self.processor.image_processor.post_process_object_detection(
            output,
            threshold=LEAST_SCORE,
            target_sizes=[image.size[::-1]],
            top_k=MAX_DETECTIONS,
            one_class_per_query=False,
        )[0]
        names = self.model.config.class_names
        result = SmearResult(*image.size, class_parents=dict(self.model.config.label_parents or {}))
        values = zip(*(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
        result.cells = [Cell(number, box, names[label], score) for number, (box, label, score) in enumerate(values, 1)]
        return result


def of_magnified(analyzer: Analyzer, row: Row, tiles: str) -> dict[str, Any]:
    """All cells of a field with their scores, at the scale at which the analyzer sees it."""
    image, config = picture(row), analyzer.model.config
    ranked = Ranked(analyzer, row["annotated_classes"] or config.class_names)
    result = ranked.look(image)
    tiling = analyzer(image, ["detection"]).tiling if tiles == "auto" else None
    if tiling:
        edge = analyzer.processor.image_processor.task_sizes["detection"]["longest_edge"]
        known = KnownSize(*config.trained.red_cell_diameter)
        um_per_pixel = known.um_per_pixel / tiling["scale"]
        see_in_tiles(image, result, TileDetector(ranked, edge, known), um_per_pixel=um_per_pixel)
    return {
        "boxes": [[round(value, 2) for value in cell.box] for cell in result.cells],
        "labels": [config.class_names.index(cell.label) for cell in result.cells],
        "scores": [round(cell.score, 5) for cell in result.cells],
        "tiled": tiling is not None,
    }


def of_field(analyzer: Analyzer, row: Row, tiles: str) -> dict[str, Any]:
    """How many red cells of a field are found, and how many of what is found are."""
    result = analyzer(picture(row), ["detection"], tiles=tiles)
    names = zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)
    true = corners([box for box, name in names if cell_kind(name) == RED_CELL])
    found = boxes_of([cell for cell in result.cells if cell_kind(cell.label, result.class_parents) == RED_CELL])
    right = len(matches(found, true))
    return {"right": right, "found": len(found), "true": len(true), "tiled": result.tiling is not None}


@click.group(help=__doc__)
@click.option("--checkpoint", help="The one that comes with the package by default.")
@click.option("--part", default="val", show_default=True, help="Part of the data sets.")
@click.option("--every", default=1, show_default=True, help="Take every n-th field.")
@click.option("--records", type=click.Path(path_type=Path), help="File to keep what is measured, to go on from.")
@click.pass_context
def main(context: click.Context, checkpoint: str | None, part: str, every: int, records: Path | None) -> None:
    if checkpoint is None:
        folder = context.with_resource(TemporaryDirectory())
        checkpoint = str(lay_down_checkpoint(Path(folder) / "unihema"))
    context.obj = Analyzer.from_pretrained(checkpoint), part, every, Records(records)


folders = click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))


@main.command(name="fields", help="Recall and precision of red cells of fields, seen whole and in tiles.")
@folders
@click.pass_obj
def measure_fields(options, folders: tuple[Path, ...]) -> None:
    analyzer, part, every, records = options
    for folder in folders:
        rows = rows_of(folder, part, every)
        for tiles in ("off", "auto"):
            found = [
                records.get(
                    f"field {folder.name} {row['file_name']} {tiles}",
                    lambda row=row, tiles=tiles: of_field(analyzer, row, tiles),
                )
                for row in rows
            ]
            right, seen, true, tiled = (
                sum(each[name] for each in found) for name in ("right", "found", "true", "tiled")
            )
            click.echo(
                f"{folder.name}, {len(rows)} fields, tiles {tiles}: recall {right / max(true, 1):.3f}, precision "
                f"{right / max(seen, 1):.3f} of {true} red cells; {tiled} fields in tiles"
            )


@main.command(name="mosaics", help="Cells of mosaics of fields against those of the fields alone.")
@folders
@click.option("--shapes", default="2x1,1x2,2x2,3x2,4x4", show_default=True, help="Columns x rows.")
@click.option("--number", default=4, show_default=True, help="Mosaics of each shape and data set.")
@click.option("--gap", default=0, show_default=True, help="Pixels of glass between fields.")
@click.pass_obj
def measure_mosaics(options, folders: tuple[Path, ...], shapes: str, number: int, gap: int) -> None:
    analyzer, part, every, records = options
    for folder in folders:
        rows = rows_of(folder, part, every)
        # Fields of the most usual size.
        sizes = [tuple(row["size"]) for row in rows]
        rows = [row for row, size in zip(rows, sizes, strict=True) if size == max(set(sizes), key=sizes.count)]
        for shape in shapes.split(","):
            columns, lines = map(int, shape.split("x"))
            found = []
            for seed in range(number):
                rng = np.random.default_rng([seed, columns, lines])
                # Each field once before one comes again.
                turns = -(-columns * lines // len(rows))
                drawn = np.concatenate([rng.permutation(len(rows)) for _ in range(turns)])[: columns * lines]
                found.append(
                    records.get(
                        f"mosaic {folder.name} {part} {every} {shape} {gap} {seed}",
                        lambda drawn=drawn, columns=columns, rows=rows: of_mosaic(
                            analyzer, [picture(rows[place]) for place in drawn], columns, gap
                        ),
                    )
                )
            total = {name: sum(each[name] for each in found) for name in found[0] if name not in ("key", "scale")}
            more, apart = (
                100 * (total[f"mosaic{where}"] / max(total[f"alone{where}"], 1) - 1) for where in ("", "_apart")
            )
            click.echo(
                f"{folder.name}, {number} of {shape}: {total['alone']} cells alone, {more:+.1f} % in the mosaic, {apart:+.1f} % "
                f"apart from seams ({total['alone_apart']}); {total['matched'] / max(total['alone'], 1):.3f} are found again, of "
                f"these {total['same_type'] / max(total['matched'], 1):.3f} with the same type, "
                f"{total['same_attributes'] / max(total['attributes'], 1):.3f} of {total['attributes']} attributes the same"
            )


@main.command(name="magnified", help="mAP50 of all data sets together, magnified, seen whole and in tiles.")
@folders
@click.option("--magnifications", default="1,0.55,2", show_default=True, help="Among those of `unihema stress`.")
@click.pass_obj
def measure_magnified(options, folders: tuple[Path, ...], magnifications: str) -> None:
    analyzer, part, every, records = options
    plain = [(folder.name, row) for folder in folders for row in rows_of(folder, part, every)]
    names = analyzer.model.config.class_names
    for amount in map(float, magnifications.split(",")):
        kind = CORRUPTIONS["smaller_cells" if amount < 1 else "larger_cells"]
        severity = 0 if amount == 1 else 1 + kind.amounts.index(amount)
        rows = shifted_rows([row for _, row in plain], kind, severity)
        truth = [
            {
                "boxes": corners(row["objects"]["bbox"]).numpy(),
                "labels": np.array([names.index(name) for name in row["objects"]["category"]], dtype=int),
                "annotated_classes": row["annotated_classes"]
                and [names.index(name) for name in row["annotated_classes"]],
            }
            for row in rows
        ]
        for tiles in ("off", "auto"):
            found = [
                records.get(
                    f"magnified {name} {row['file_name']} {amount:g} {tiles}",
                    lambda row=row, tiles=tiles: of_magnified(analyzer, row, tiles),
                )
                for (name, _), row in zip(plain, rows, strict=True)
            ]
            figures = mean_average_precision(found, truth, names)
            classes = {name: of["AP50"] for name, of in figures["per_class"].items() if of["AP50"] is not None}
            click.echo(
                f"x{amount:g}, {len(rows)} fields, tiles {tiles}: mAP50 {figures['mAP50']:.4f} ("
                + ", ".join(f"{name} {value:.3f}" for name, value in classes.items())
                + f"); {sum(each['tiled'] for each in found)} fields in tiles"
            )


if __name__ == "__main__":
    main()
