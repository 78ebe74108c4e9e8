"""Synthetic smears, a small model trained on them, and what it says of fields it never saw: `make demo-train`.

The whole package in a few minutes, without real data.
"""

import argparse
import json
import shutil
from itertools import islice
from pathlib import Path

from PIL import Image

from unihema.analyzer import Analyzer
from unihema.training.data.synthetic.fields import WHITE_CELLS, SyntheticSmears
from unihema.training.data.synthetic.folder import write_synthetic
from unihema.training.evaluation.report import figures_text
from unihema.training.run.config import AugmentationSettings, DataConfig, LoggingConfig, OptimisationConfig, RunConfig
from unihema.training.run.loop import train


FIELDS, VALIDATION_FIELDS, SHOWN_FIELDS = 240, 20, 4
# Few, large cells and many white ones among them: most to learn from each step of a training of minutes.
APPEARANCE = {
    "red_radius": (0.075, 0.092),
    "coverage": (0.1, 0.3),
    "white_cells": (0.05, 0.15, 0.25, 0.25, 0.2, 0.1),
}
TASK_WEIGHTS = {
    "detection": 0.62,
    "segmentation": 0.07,
    "single_cell": 0.11,
    "question_answering": 0.13,
    "cloze": 0.07,
}
# Minutes from nothing, and smears of one microscope: no colours and framings of others.
ONE_MICROSCOPE = {
    "detection": {"colour": 0.0, "optics": 0.0},
    "segmentation": {"colour": 0.0, "optics": 0.0},
    "single_cell": {"colour": 0.0, "optics": 0.0, "framing": 0.0, "zoom": 0.5, "zoom_min": 0.8},
}
# Crops show one cell, so small images and large batches teach the most in a minute.
EDGES = {"detection": 256, "segmentation": 256, "single_cell": 96, "question_answering": 96, "cloze": 96}
BATCHES = {"detection": 8, "segmentation": 4, "single_cell": 16, "question_answering": 16, "cloze": 16}


def demo_train(folder: Path, minutes: float = 7.5, fields: int = FIELDS) -> None:
    """Trains the tiny model on synthetic smears and uses it.

    Args:
        folder (`Path`): Where everything is written.
        minutes (`float`): Minutes of training.
        fields (`int`): Synthetic training fields.
    """
    print("1/4 Painting synthetic smears")
    data = write_synthetic(folder / "data", fields, VALIDATION_FIELDS, seed=1, **APPEARANCE)

    print(f"2/4 Training the tiny model for {minutes:g} minutes")
    checkpoint = folder / "unihema"
    shutil.rmtree(checkpoint, ignore_errors=True)
    report = train(
        RunConfig(
            output_dir=str(checkpoint),
            data=DataConfig(
                folders=[str(data)],
                task_weights=TASK_WEIGHTS,
                image_sizes={task: {"longest_edge": edge} for task, edge in EDGES.items()},
                batch_size=BATCHES,
                workers=0,
            ),
            optimisation=OptimisationConfig(
                time_limit_minutes=minutes, learning_rate=4e-4, ema_decay=0.99, mixed_precision="bf16"
            ),
            augmentation=AugmentationSettings(overrides=ONE_MICROSCOPE),
            logging=LoggingConfig(checkpoint_minutes=None),
        )
    )
    shutil.rmtree(checkpoint / "checkpoints", ignore_errors=True)

    print("3/4 Analysing fields that were not trained on")
    smears = SyntheticSmears(seed=2, **APPEARANCE)
    (folder / "smears").mkdir(exist_ok=True)
    with_white_cells = (index for index in range(1000) if set(WHITE_CELLS) & set(smears[index].labels))
    for index in islice(with_white_cells, SHOWN_FIELDS):
        Image.fromarray(smears[index].image).save(folder / "smears" / f"field_{index:02d}.png")
    crop = smears.single_cell(0, label="neutrophil")
    Image.fromarray(crop.image).save(folder / "smears" / "cell.png")
    results = folder / "results"
    fields_shown = sorted((folder / "smears").glob("field_*.png"))
    analyzer = Analyzer.from_pretrained(checkpoint)
    batch = analyzer.analyze_files(fields_shown, results, overwrite=True)
    print(f"Cells in {batch.images} fields: " + ", ".join(f"{k} {v}" for k, v in batch.totals.items()))

    print("4/4 Asking about a cell")
    question = "What type of white blood cell is this?"
    print(f"{question} {analyzer.ask(folder / 'smears' / 'cell.png', question)} (painted: {crop.label})")
    print("Measured on synthetic validation fields:")
    for task, figures in json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8")).items():
        print(f"  {task}: {figures_text(figures)}")
    print(f"Checkpoint {checkpoint}, results {results} ({len(report)} tasks).")


def main() -> None:
    """Trains the tiny model on synthetic smears and uses it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-train"), help="Where everything is written.")
    parser.add_argument("--minutes", type=float, default=7.5, help="Minutes of training.")
    parser.add_argument("--fields", type=int, default=FIELDS, help="Synthetic training fields.")
    given = parser.parse_args()
    demo_train(given.folder, given.minutes, given.fields)


if __name__ == "__main__":
    main()
