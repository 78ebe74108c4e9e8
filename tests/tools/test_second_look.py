"""The tool that fits the rule of a second look, on fields of a checkpoint that knows nothing."""

import json

import numpy as np
from click.testing import CliRunner
from PIL import Image
from tiny_checkpoint import save_lively

from tools.second_look import main
from unihema import Analyzer


def test_a_rule_is_fitted_on_typed_boxes_and_stored(tmp_path):
    names = {0: "WBC", 1: "neutrophil", 2: "lymphocyte"}
    checkpoint = save_lively(tmp_path / "model", 1, id2label=names, single_cell_labels=["neutrophil", "lymphocyte"])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 96, 3), np.uint8))
    (tmp_path / "fields" / "images").mkdir(parents=True)
    image.save(tmp_path / "fields" / "images" / "a.png")
    # What detection finds there is what is true.
    cells = Analyzer.from_pretrained(checkpoint, device="cpu")(image, "detection", tiles="off", threshold=0.05).cells
    boxes = [[cell.box[0], cell.box[1], cell.box[2] - cell.box[0], cell.box[3] - cell.box[1]] for cell in cells]
    annotations = [
        {"id": number, "image_id": 0, "category_id": 1 + number % 2, "bbox": box, "iscrowd": 0}
        for number, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 0, "file_name": "a.png", "width": 96, "height": 72}],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    (tmp_path / "fields" / "val.json").write_text(json.dumps(content))
    done = CliRunner().invoke(main, [str(checkpoint), str(tmp_path / "fields"), "--write"])
    assert done.exit_code == 0, done.output
    assert f"fields: {len(cells)} of {len(cells)} typed boxes are found" in done.output
    rule = json.loads((checkpoint / "config.json").read_text())["trained"]["second_look"]
    assert f"fitted: Rule(weight={rule['weight']}" in done.output
    assert Analyzer.from_pretrained(checkpoint, device="cpu").request("detection").second_look
