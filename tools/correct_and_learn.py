"""Corrects fields by their ground truth, as a person would, and learns from that.

`python -m tools.correct_and_learn DATA BASE_DATA -o FOLDER` goes on where it was: it analyses fields of DATA's training split,
corrects them through the server of a review, writes the corrections, trains an adapter, and measures what base and adapter find
in val fields of DATA, in tiles where needed.
"""

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from fastapi.testclient import TestClient

from unihema import Analyzer
from unihema.files import write_json
from unihema.processing_unihema.class_names import PLATELET, RED_CELL, WHITE_CELL, cell_kind, usual_name
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
LEAST_SCORE = 0.1
KINDS = (RED_CELL, WHITE_CELL, PLATELET)


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


def measure(checkpoint: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Cells of fields as `unihema predict` finds them, against the truth: for each kind of cell the true, found and right ones
    (IoU 0.5), recall and precision, and AP50 of all with a score of `LEAST_SCORE`, whatever the thresholds."""
    analyzer = Analyzer.from_pretrained(checkpoint)
    parents = analyzer.model.config.label_parents or {}
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    predicted, references = [], []
    for row in rows:
        boxes = torch.tensor(row["objects"]["bbox"], dtype=torch.float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        kinds = [cell_kind(label, parents) for label in row["objects"]["category"]]
        cells = analyzer(row["image"], tasks=["detection"]).cells
        for kind, count in counts.items():
            found = torch.tensor([cell.box for cell in cells if cell_kind(cell.label, parents) == kind]).reshape(-1, 4)
            true = boxes[torch.tensor([each == kind for each in kinds], dtype=torch.bool)]
            count.update(true=len(true), found=len(found), right=len(matches(found, true)))
        cells = analyzer(row["image"], tasks=["detection"], threshold=LEAST_SCORE).cells
        cells = [cell for cell in cells if cell_kind(cell.label, parents) in KINDS]
        labels = [KINDS.index(cell_kind(cell.label, parents)) for cell in cells]
        found = torch.tensor([cell.box for cell in cells]).reshape(-1, 4)
        predicted.append({"boxes": found.numpy(), "scores": [cell.score for cell in cells], "labels": labels})
        references.append({"boxes": boxes.numpy(), "labels": [KINDS.index(kind) for kind in kinds]})
    precision = mean_average_precision(predicted, references, KINDS)["per_class"]
    return {
        kind: {
            **count,
            "recall": count["right"] / count["true"],
            "precision": count["right"] / max(count["found"], 1),
            "AP50": precision[kind]["AP50"],
        }
        for kind, count in counts.items()
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
    """Correct fields of DATA, learn from them, and measure what is found before and after, there and on BASE_DATA."""
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
    val = load_folder(data, "val", tasks=["detection"])["detection"][::every]
    figures = {name: measure(folder, val) for name, folder in (("before", base), ("after", learned))}
    click.echo(json.dumps({"fields": len(val), **figures}, indent=1))
    write_json(output / "figures.json", figures)


if __name__ == "__main__":
    main()
