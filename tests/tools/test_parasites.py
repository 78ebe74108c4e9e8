"""The tool that measures how infected red cells are told, and fits the threshold."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_checkpoint import save_lively

from tools.parasites import Looked, figures, fit_threshold, main
from unihema import Analyzer
from unihema.errors import InputError


def looked(probabilities, infected, true, red_cells, counted=None):
    counted = [True] * len(probabilities) if counted is None else counted
    return Looked(np.array(probabilities), np.array(infected), np.array(counted), true, red_cells)


# Of the second field an infected cell is not found, and a cell that nobody is sure of is not counted.
FIELDS = [
    looked([0.9, 0.8, 0.1, 0.2], [True, False, False, True], 2, 4),
    looked([0.95, 0.3, 0.99, 0.1, 0.2], [True, False, False, False, False], 2, 8, [True, True, False, True, True]),
    looked([0.1, 0.2], [False, False], 0, 2),
]


def test_figures_by_hand():
    told = figures(FIELDS, 0.5)
    assert (told["recall"], told["precision"]) == (2 / 4, 2 / 3)
    # Called infected: 2 of 4, 1 of 4; true: 2 of 4, 2 of 8.
    assert told["error"] == 0 and (told["infected"], told["fields"]) == (4, 2)
    told = figures(FIELDS, 0.85)
    assert (told["recall"], told["precision"], told["error"]) == (2 / 4, 1, pytest.approx(0.25))


def test_the_threshold_of_the_best_mean_of_recall_and_precision():
    threshold = fit_threshold(FIELDS)
    assert 0.8 < threshold < 0.9
    assert figures(FIELDS, threshold)["precision"] == 1
    with pytest.raises(InputError, match="nothing to fit"):
        fit_threshold(FIELDS[2:])


def write_fields(folder, image, cells, names, category):
    (folder / "images").mkdir(parents=True)
    image.save(folder / "images" / "a.png")
    boxes = [[cell.box[0], cell.box[1], cell.box[2] - cell.box[0], cell.box[3] - cell.box[1]] for cell in cells]
    annotations = [
        {"id": number, "image_id": 0, "category_id": category(number), "bbox": box, "iscrowd": 0}
        for number, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 0, "file_name": "a.png", "width": 96, "height": 72}],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }
    (folder / "val.json").write_text(json.dumps(content))
    return folder


def test_a_threshold_is_fitted_on_boxed_cells_and_stored(tmp_path):
    parents = {"ring": "infected red cell", "normal": "uninfected red cell"}
    parents |= {"infected red cell": "RBC", "uninfected red cell": "RBC"}
    checkpoint = save_lively(
        tmp_path / "model",
        1,
        id2label={0: "RBC", 1: "WBC"},
        single_cell_labels=["neutrophil", "ring", "normal"],
        single_cell_parents=parents,
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 96, 3), np.uint8))
    result = Analyzer.from_pretrained(checkpoint, device="cpu")(image, "detection")
    cells = [cell for cell in result.cells if cell.label == "RBC"]
    ill = write_fields(tmp_path / "ill", image, cells, ["RBC", "ring"], lambda number: number % 2)
    well = write_fields(tmp_path / "well", image, cells, ["RBC"], lambda number: 0)
    done = CliRunner().invoke(main, [str(checkpoint), str(ill), "--healthy", str(well), "--write"])
    assert done.exit_code == 0, done.output
    stored = json.loads((checkpoint / "config.json").read_text())["trained"]["parasites"]
    assert (
        f"fitted {stored['threshold']:.4f}: recall {stored['recall']:.3f} of {len(cells) // 2} infected" in done.output
    )
    assert f"of {len(cells)} red cells of healthy people" in done.output
    again = Analyzer.from_pretrained(checkpoint, device="cpu")
    found = again(image, "detection", parasites=True)
    called = sum(cell.label == "infected red cell" for cell in found.cells)
    assert f"well: {called} of {len(cells)} red cells" in done.output
