"""Measures what a second look gains on the typed boxes of data folders, and fits the rule that puts two opinions together.

`python -m tools.second_look CHECKPOINT DATA...` says of each data folder how often the type of a nucleated cell is right by
detection alone, by its crop alone, by the checkpoint's rule, and by the rule that is fitted on the folders of `--fit` (all of
them when missing).
"""

from pathlib import Path

import click
import numpy as np
import torch
from torchvision.ops import box_iou

from unihema import Analyzer
from unihema.errors import CheckpointError, InputError
from unihema.files import read_json_object, write_json
from unihema.processing_unihema.class_names import usual_name
from unihema.results.second_look import Rule, cell_types, crop_of, detection_logits, fit_rule, is_looked_at
from unihema.slides import open_regions
from unihema.training.data.readers import load_folder


# Smallest score of a cell that is looked at, and smallest overlap with the true box.
SCORE, IOU = 0.05, 0.5
# Of the logarithm of a probability.
LEAST = 1e-9


def opinions(analyzer: Analyzer, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """What detection and crops say of the typed cells of a data folder.

    Args:
        analyzer ([`Analyzer`]): Of the checkpoint.
        folder (`Path`): The data folder.
        split (`str`): Its split.

    Returns:
        `tuple`: Logits of detection `[n, types]`, logarithms of the crops' probabilities `[n, types]`, the true types `[n]`, and
        the number of typed boxes, found or not.
    """
    config = analyzer.model.config
    types = cell_types(config.single_cell_labels, config.label_parents)
    numbers = {usual_name(name): number for number, name in enumerate(types)}
    request = analyzer.request(["detection"], tiles="off", threshold=SCORE, second_look=False)
    detection, crops, true, boxes = [], [], [], 0
    for row in load_folder(folder, split, tasks=["detection"]).get("detection", ()):
        names = [usual_name(name) for name in row["objects"]["category"]]
        typed = [place for place, name in enumerate(names) if name in numbers]
        if not typed or row.get("from_attributes"):
            continue
        boxes += len(typed)
        with open_regions(row["image"]) as source:
            (result,) = analyzer.run(request, [source])
            cells = [cell for cell in result.cells if is_looked_at(cell, config.label_parents)]
            if not cells:
                continue
            xywh = torch.tensor([row["objects"]["bbox"][place] for place in typed], dtype=torch.float)
            overlap = box_iou(
                torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1), torch.tensor([c.box for c in cells])
            )
            found = [(place, int(best)) for place, best in enumerate(overlap.argmax(1)) if overlap[place, best] >= IOU]
            if not found:
                continue
            chosen = [cells[best] for _, best in found]
            probabilities = analyzer.crops.probabilities(request, [crop_of(source, cell) for cell in chosen], types)
        detection.append(detection_logits(chosen, types))
        crops.append(probabilities.clamp(min=LEAST).log().cpu().numpy())
        true += [numbers[names[typed[place]]] for place, _ in found]
    if not true:
        raise InputError(f"{folder}: detection finds no cell whose type is known in split {split!r}.")
    return np.concatenate(detection), np.concatenate(crops), np.array(true), boxes


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--fit", multiple=True, type=click.Path(path_type=Path, exists=True), help="Data folder to fit on.")
@click.option("--split", default="val", show_default=True)
@click.option("--write", is_flag=True, help="Store the rule in config.json: the checkpoint then looks again by itself.")
def main(checkpoint: Path, data: tuple[Path, ...], fit: tuple[Path, ...], split: str, write: bool) -> None:
    """Measure a second look, and fit its rule."""
    analyzer = Analyzer.from_pretrained(checkpoint)
    fitted_on = fit or data
    said = {folder: opinions(analyzer, folder, split) for folder in dict.fromkeys([*data, *fitted_on])}
    rule = fit_rule(*(np.concatenate([said[folder][part] for folder in fitted_on]) for part in range(3)))
    stored = Rule(**(analyzer.model.config.trained.second_look or {}))
    rules = {"detection alone": Rule(0.0, 1.0, 1.0), "crop alone": Rule(1.0, 1.0, 1.0)}
    rules |= {f"now: {stored}": stored, f"fitted: {rule}": rule}
    for folder in data:
        detection, crops, true, boxes = said[folder]
        click.echo(f"{folder.name}: {len(true)} of {boxes} typed boxes are found")
        for name, each in rules.items():
            right = each.probabilities(detection, crops).argmax(1) == true
            click.echo(f"  {right.mean():.3f} {name}")
    if write:
        path = checkpoint / "config.json"
        fields = read_json_object(path, CheckpointError, "Copy the checkpoint again.")
        write_json(path, {**fields, "trained": {**fields["trained"], "second_look": rule._asdict()}})
        click.echo(f"Written to {path}.")


if __name__ == "__main__":
    main()
