"""What `unihema evaluate` counts in fields is what `unihema predict` shows, also where a second look gives the types."""

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import save_lively

from unihema import Analyzer
from unihema.training.evaluation import evaluate_model


TYPES = ["neutrophil", "lymphocyte"]


@pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")
def test_types_are_those_of_results(tmp_path):
    classes = ["red blood cell", "WBC", *TYPES]
    folder = save_lively(
        tmp_path / "unihema",
        3,
        id2label=dict(enumerate(classes)),
        single_cell_labels=TYPES,
        trained={
            "tasks": ["detection", "single_cell"],
            "second_look": {"weight": 1.0, "detection_temperature": 1.0, "crop_temperature": 1.0},
        },
    )
    image = tmp_path / "field.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(image)
    analyzer = Analyzer.from_pretrained(folder, device="cpu")
    row = {"image": str(image), "file_name": image.name, "dataset": "lab", "task": "detection"}
    figures = {}
    for second_look in (True, False):
        cells = analyzer(str(image), ["detection"], tiles="off", threshold=0.06, second_look=second_look).cells
        row["objects"] = {
            "bbox": [[c.box[0], c.box[1], c.box[2] - c.box[0], c.box[3] - c.box[1]] for c in cells],
            "category": [cell.label for cell in cells],
            "morphology": [{} for _ in cells],
        }
        report = evaluate_model(analyzer.model, analyzer.processor, {"detection": [row]}, bootstrap=0, progress=False)
        figures[second_look] = report["detection"]["at_threshold"]
    assert figures[True]["lymphocyte"]["recall"] == figures[True]["lymphocyte"]["precision"] == 1.0, figures[True]
    # What detection alone calls them is not what is shown.
    assert figures[False]["WBC"]["recall"] == 0.0, figures[False]
