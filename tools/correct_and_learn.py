"""Corrects fields by their ground truth, as a person would, and learns from that.

`python -m tools.correct_and_learn DATA BASE_DATA -o FOLDER` goes on where it was: it analyses fields of DATA's training split,
corrects them through the server of a review, writes the corrections, trains an adapter, and measures base and adapter on the
val splits of DATA and of BASE_DATA, in tiles where needed.
"""

import json
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import torch
from fastapi.testclient import TestClient

from unihema import Analyzer
from unihema.files import write_json
from unihema.processing_unihema.class_names import is_white_cell, usual_name
from unihema.review.server import review_app
from unihema.review.state import LOG_FILE, Review
from unihema.shipped import lay_down_checkpoint
from unihema.training.data.curation.corrections import write_corrections
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import Row
from unihema.training.metrics.detection import mean_average_precision
from unihema.training.studies.adapt import adapt

from .red_cells import matches


PORT, TOKEN = 8000, "correct-and-learn"
ORIGIN = f"http://127.0.0.1:{PORT}"
KINDS = ("red cells", "white cells", "platelets")


def chosen_fields(data: Path, number: int, seed: int) -> list[Row]:
    """Fields of a training split, one of each group of pictures that show the same."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in load_folder(data, "train", tasks=["detection"])["detection"]:
        groups[row.get("source_image", row["file_name"])].append(row)
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    return [groups[name][0] for name in names[:number]]


def correct(results: Path, truth: dict[str, Row]) -> dict[str, int]:
    """Corrects all fields as their truth says, through the server of the review; how often each thing was done."""
    done: dict[str, int] = defaultdict(int)
    with Review(results) as review:
        client = TestClient(review_app(review, TOKEN, PORT), base_url=ORIGIN, headers={"Origin": ORIGIN})
        client.get("/", params={"token": TOKEN}).raise_for_status()
        sample = client.get("/api/samples/0").json()
        names = {usual_name(row["name"]): row["name"] for row in sample["classes"]}

        def ask(what: str, **body: Any) -> None:
            client.post(f"/api/samples/0/{what}", json={"who": "ground truth", **body}).raise_for_status()
            done[body.get("kind", what)] += len(body.get("cells", "1"))

        for place, (file, *_) in sample["files"].items():
            row, image = truth[file], int(place)
            cells = [cell for cell in sample["cells"] if cell[0] == image]
            boxes = torch.tensor(row["objects"]["bbox"], dtype=torch.float).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            found = torch.tensor([cell[9] for cell in cells], dtype=torch.float).reshape(-1, 4)
            pairs = {there: true for true, there in matches(found, boxes)}
            labels = [names.get(usual_name(label), label) for label in row["objects"]["category"]]
            for number, cell in enumerate(cells):
                targets = [{"image": image, "cell": cell[1], "revision": cell[3]}]
                if number not in pairs:
                    ask("changes", kind="delete", cells=targets)
                elif cell[2] != labels[pairs[number]]:
                    ask("changes", kind="class", cells=targets, label=labels[pairs[number]])
            for true in sorted(set(range(len(labels))) - set(pairs.values())):
                ask("draw", image=image, box=boxes[true].tolist(), label=labels[true])
            (revision,) = [row[2] for row in client.get("/api/samples/0").json()["images"] if row[0] == image]
            ask("through", image=image, revision=revision)
    return dict(done)


def measure(checkpoint: Path, data: Path, every: int, threshold: float = 0.01) -> dict[str, Any]:
    """mAP50 of every so-many-th val field, seen as `unihema predict` sees it, of kinds of cells and of all classes there."""
    analyzer = Analyzer.from_pretrained(checkpoint)
    rows = load_folder(data, "val", tasks=["detection"])["detection"][::every]
    names = list(dict.fromkeys(usual_name(name) for row in rows for name in row["objects"]["category"]))
    parents = analyzer.model.config.label_parents or {}

    def kind(label: str) -> str:
        usual = usual_name(label)
        return {"rbc": "red cells", "platelet": "platelets"}.get(usual) or (
            "white cells" if is_white_cell(label, parents) else usual
        )

    found, true = {"kinds": [], "classes": []}, {"kinds": [], "classes": []}
    for row in rows:
        cells = analyzer(row["image"], threshold=threshold, tasks=["detection"]).cells
        boxes = torch.tensor(row["objects"]["bbox"], dtype=torch.float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        for of, classes, name in (("kinds", KINDS, kind), ("classes", names, usual_name)):
            kept = [cell for cell in cells if name(cell.label) in classes]
            labels = [name(label) for label in row["objects"]["category"]]
            there = [number for number, label in enumerate(labels) if label in classes]
            found[of].append(
                {
                    "boxes": torch.tensor([cell.box for cell in kept]).reshape(-1, 4).numpy(),
                    "scores": [cell.score for cell in kept],
                    "labels": [classes.index(name(cell.label)) for cell in kept],
                }
            )
            true[of].append(
                {"boxes": boxes[there].numpy(), "labels": [classes.index(labels[number]) for number in there]}
            )
    kinds = mean_average_precision(found["kinds"], true["kinds"], KINDS)
    classes = mean_average_precision(found["classes"], true["classes"], names)
    return {
        "fields": len(rows),
        "kinds": {name: figures["AP50"] for name, figures in kinds["per_class"].items()},
        "mAP50 of kinds": kinds["mAP50"],
        "mAP50 of classes": classes["mAP50"],
    }


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("base_data", type=click.Path(path_type=Path, exists=True))
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True)
@click.option("--fields", default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--every", default=3, show_default=True, help="Measure every so-many-th val field.")
@click.option("--max-steps", type=int)
@click.option("--until", type=click.Choice(["corrections", "adapter", "figures"]), default="figures", show_default=True)
def main(
    data: Path, base_data: Path, output: Path, fields: int, seed: int, every: int, max_steps: int | None, until: str
) -> None:
    """Correct fields of DATA, learn from them, and measure on DATA and on BASE_DATA."""
    base, results, learned = lay_down_checkpoint(output / "base"), output / "results", output / "adapter"
    rows = chosen_fields(data, fields, seed)
    smears = output / "smears"
    smears.mkdir(parents=True, exist_ok=True)
    truth = {Path(row["image"]).name: row for row in rows}
    for name, row in truth.items():
        shutil.copyfile(row["image"], smears / name)
    Analyzer.from_pretrained(base).analyze_files([smears], results, tasks=["detection"])
    if not (results / LOG_FILE).exists():
        write_json(output / "corrected.json", correct(results, truth))
    if not (output / "data").exists():
        click.echo(str(write_corrections(results, output / "data")))
    if until == "corrections":
        return
    if not (learned / "before_after.json").exists():
        steps = {} if max_steps is None else {"optimisation.max_steps": max_steps}
        adapt(
            base, output / "data", "detection", learned, base_data=base_data, overrides=steps, resume=learned.exists()
        )
    if until == "adapter":
        return
    figures = {}
    for name, checkpoint in (("before", base), ("after", learned)):
        for split, folder in ((data.name, data), (base_data.name, base_data)):
            figures[f"{name}, {split}"] = found = measure(checkpoint, folder, every)
            click.echo(f"{name}, {split} val: {json.dumps(found)}")
    write_json(output / "figures.json", figures)


if __name__ == "__main__":
    main()
