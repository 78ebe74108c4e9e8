"""Measures how well infected red cells are told from the crops of what detection finds, and fits the probability that it takes.

`python -m tools.parasites CHECKPOINT DATA... --healthy DATA...` says of fields whose infected cells are boxed how many are found,
how many of those called infected are, and how far the share of infected cells of a field is from the true one; and of fields of
healthy people how many red cells are called infected.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torchvision.ops import box_iou

from unihema import Analyzer
from unihema.errors import CheckpointError, InputError
from unihema.files import read_json_object, write_json
from unihema.processing_unihema.class_names import INFECTED, RED_CELL, UNINFECTED, cell_kind, is_infected
from unihema.processing_unihema.questions import exact_limits
from unihema.results.second_look import CROPS_AT_ONCE, crop_of, is_looked_at_for_parasites
from unihema.slides import open_regions
from unihema.training.data.readers import load_folder


# Smallest overlap with the true box.
IOU = 0.5


class Looked(NamedTuple):
    """What was seen of the red cells of a field.

    Args:
        probabilities (`np.ndarray`): Of being infected, of each red cell that was found `[n]`.
        infected (`np.ndarray`): Whether it is `[n]`; false for what is no boxed cell.
        counted (`np.ndarray`): False for cells whose annotation is not sure `[n]`.
        true (`int`): Infected cells of the field, found or not.
        red_cells (`int`): All its red cells.
    """

    probabilities: np.ndarray
    infected: np.ndarray
    counted: np.ndarray
    true: int
    red_cells: int


def looked_at(analyzer: Analyzer, folder: Path, split: str) -> Iterator[Looked]:
    """The red cells of each field of a data folder.

    Args:
        analyzer ([`Analyzer`]): Of the checkpoint.
        folder (`Path`): The data folder.
        split (`str`): Its split.
    """
    parents = analyzer.model.config.class_parents
    request = analyzer.request(["detection"], second_look=False)
    for row in load_folder(folder, split, tasks=["detection"]).get("detection", ()):
        with open_regions(row["image"]) as source:
            (result,) = analyzer.run(request, [source])
            cells = [cell for cell in result.cells if is_looked_at_for_parasites(cell, parents)]
            groups = [cells[start : start + CROPS_AT_ONCE] for start in range(0, len(cells), CROPS_AT_ONCE)]
            crops = [[crop_of(source, cell) for cell in group] for group in groups]
            seen = [analyzer.crops.probabilities(request, group, (INFECTED, UNINFECTED))[:, 0] for group in crops]
        yield _matched(row["objects"], cells, torch.cat(seen).numpy() if seen else np.zeros(0))


def _matched(objects: dict[str, Any], cells: list[Any], probabilities: np.ndarray) -> Looked:
    names = objects["category"]
    sure = ~np.array(objects.get("iscrowd") or [0] * len(names), dtype=bool)
    red = np.array([cell_kind(name) == RED_CELL for name in names], dtype=bool)
    ill = np.array([is_infected(name) for name in names], dtype=bool)
    infected, counted = np.zeros(len(cells), dtype=bool), np.ones(len(cells), dtype=bool)
    if cells and names:
        xywh = torch.tensor(objects["bbox"], dtype=torch.float)
        overlap = box_iou(
            torch.tensor([cell.box for cell in cells]), torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1)
        ).numpy()
        unsure = np.where(~sure[None], overlap, 0).max(1) >= IOU
        overlap[:, ~sure] = 0
        taken = np.zeros(len(names), dtype=bool)
        for cell in np.argsort(-overlap.max(1)).tolist():
            best = int(np.where(taken, 0, overlap[cell]).argmax())
            if overlap[cell, best] >= IOU and not taken[best]:
                taken[best], infected[cell] = True, ill[best]
            else:
                counted[cell] = not unsure[cell]
    return Looked(probabilities, infected, counted, int((ill & sure).sum()), int((red & sure).sum()))


def figures(fields: list[Looked], threshold: float) -> dict[str, float]:
    """Recall, precision, and the median error of a field's share of infected cells, relative to it.

    Args:
        fields (`list[Looked]`): The fields.
        threshold (`float`): Probability from which a cell is called infected.
    """
    called = [field.counted & (field.probabilities >= threshold) for field in fields]
    right = sum(int((each & field.infected).sum()) for each, field in zip(called, fields, strict=True))
    all_called, true = sum(int(each.sum()) for each in called), sum(field.true for field in fields)
    errors = [
        abs(each.sum() / max(1, field.counted.sum()) / (field.true / field.red_cells) - 1)
        for each, field in zip(called, fields, strict=True)
        if field.true
    ]
    return {
        "recall": right / true if true else 0.0,
        "precision": right / all_called if all_called else 0.0,
        "error": float(np.median(errors)) if errors else float("nan"),
        "infected": true,
        "fields": len(errors),
    }


def fit_threshold(fields: list[Looked]) -> float:
    """The threshold of the best harmonic mean of recall and precision, in the middle between two probabilities."""
    seen = np.unique(np.concatenate([field.probabilities[field.counted] for field in fields]))
    if not any(field.true for field in fields) or not len(seen):
        raise InputError(
            "No infected cell is boxed, or no red cell is found: there is nothing to fit the threshold on."
        )
    steps = [*((seen[1:] + seen[:-1]) / 2)[-500:].tolist(), float(seen[-1])]

    def quality(threshold: float) -> float:
        told = figures(fields, threshold)
        return 2 * told["recall"] * told["precision"] / max(told["recall"] + told["precision"], 1e-9)

    return max(steps, key=quality)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--healthy", multiple=True, required=True, type=click.Path(path_type=Path, exists=True), help="Without any."
)
@click.option("--split", default="val", show_default=True)
@click.option(
    "--write", is_flag=True, help="Store threshold and figures in config.json, for `unihema predict --parasites`."
)
def main(checkpoint: Path, data: tuple[Path, ...], healthy: tuple[Path, ...], split: str, write: bool) -> None:
    """Measure how infected red cells are told, and fit the threshold."""
    analyzer = Analyzer.from_pretrained(checkpoint)
    fields = [field for folder in data for field in looked_at(analyzer, folder, split)]
    fitted = fit_threshold(fields)
    for threshold in (0.5, 0.8, 0.9, fitted):
        told = figures(fields, threshold)
        click.echo(
            f"{'fitted ' if threshold == fitted else ''}{threshold:.4f}: recall {told['recall']:.3f} of {told['infected']} "
            f"infected cells, precision {told['precision']:.3f}, median error of a field's share {told['error']:.3f} "
            f"({told['fields']} fields)"
        )
    called = of = 0
    for folder in healthy:
        seen = np.concatenate([field.probabilities for field in looked_at(analyzer, folder, split)])
        click.echo(
            f"{folder.name}: {(seen >= fitted).sum()} of {len(seen)} red cells of healthy people are called infected"
        )
        called, of = called + int((seen >= fitted).sum()), of + len(seen)
    if not of:
        raise InputError("No red cell of healthy people is found: nobody knows how many would be called infected.")
    most = exact_limits(called, of)[1] / 100
    click.echo(f"At most {most:.2%} of them (95 %), on microscopes such as these.")
    if write:
        path = checkpoint / "config.json"
        config = read_json_object(path, CheckpointError, "Copy the checkpoint again.")
        told = figures(fields, fitted)
        stored = {
            "threshold": round(fitted, 4),
            "recall": round(told["recall"], 3),
            "precision": round(told["precision"], 3),
            "false_positives": round(most, 5),
        }
        write_json(path, {**config, "trained": {**config["trained"], "parasites": stored}})
        click.echo(f"Written to {path}.")


if __name__ == "__main__":
    main()
