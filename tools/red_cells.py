"""How many red cells of a data set's fields are found, seen whole and in tiles: `python -m tools.red_cells DATA... --every 3`."""

from pathlib import Path

import click
import numpy as np
import torch
from torchvision.ops import box_iou

from unihema import Analyzer
from unihema.processing_unihema.class_names import cell_kind
from unihema.shipped import lay_down_checkpoint
from unihema.training.data.readers import load_folder


KIND, OVERLAP = "red blood cell", 0.5


def matches(found: torch.Tensor, true: torch.Tensor) -> int:
    """True boxes xyxy `[m, 4]` that have a found one `[n, 4]` of their own, best score first."""
    overlap = box_iou(found, true)
    free = torch.ones(len(true), dtype=torch.bool)
    number = 0
    for row in overlap:
        best, place = (row * free).max(0) if len(true) else (torch.tensor(0.0), 0)
        if best >= OVERLAP:
            free[place] = False
            number += 1
    return number


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", help="The one that comes with the package by default.")
@click.option("--every", default=1, show_default=True, help="Take every n-th field of val.")
def main(folders: tuple[Path, ...], checkpoint: str | None, every: int) -> None:
    if checkpoint is None:
        checkpoint = str(lay_down_checkpoint(Path("unihema")))
    analyzer = Analyzer.from_pretrained(checkpoint)
    for folder in folders:
        rows = list(load_folder(folder, "val")["detection"])[::every]
        for tiles in ("off", "auto"):
            counts, tiled = np.zeros(3), 0
            for row in rows:
                result = analyzer(str(row["image"]), ["detection"], tiles=tiles)
                objects = row["objects"]
                boxes = torch.tensor(
                    [
                        [x, y, x + w, y + h]
                        for (x, y, w, h), name in zip(objects["bbox"], objects["category"], strict=True)
                        if cell_kind(name) == KIND
                    ]
                ).reshape(-1, 4)
                red = [cell.box for cell in result.cells if cell_kind(cell.label, result.class_parents) == KIND]
                found = torch.tensor(red).reshape(-1, 4)
                counts += matches(found.float(), boxes.float()), len(found), len(boxes)
                tiled += result.tiling is not None
            right, found, true = counts
            click.echo(
                f"{folder.name}, {len(rows)} fields, tiles {tiles}: recall {right / max(true, 1):.3f}, precision "
                f"{right / max(found, 1):.3f} of {true:.0f} red cells; {tiled} fields in tiles"
            )


if __name__ == "__main__":
    main()
