"""One function makes cells of detections: the command, the pipeline and a caller of the network get the same."""

from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import pipeline

from unihema import Analyzer
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.processing_unihema.post_processing import asked_classes, find_cells, misspelled_classes


SHIPPED = Path(str(files("unihema"))) / "shipped_files"
FIELD = SHIPPED / "examples" / "field_1.jpg"


@pytest.mark.parametrize("options", [{}, {"prompt": ["RBC", "platelet"]}, {"threshold": 0.5}])
def test_command_pipeline_and_network_agree_on_a_field(options):
    analyzer = Analyzer.from_pretrained(SHIPPED / "checkpoint-open")
    model, processor = analyzer.model, analyzer.processor
    result = analyzer(FIELD, ["detection"], **options)
    detect = pipeline("object-detection", model=str(SHIPPED / "checkpoint-open"))
    piped = detect(str(FIELD), **options)
    with Image.open(FIELD) as image, torch.inference_mode():
        size = [image.size[::-1]]
        inputs = processor(images=image, text=options.get("prompt"), task="detection", return_tensors="pt")
        outputs = model(task="detection", **inputs)
    (cells,) = find_cells(outputs, model.config, size, **options)

    assert len(cells) == len(result.cells) == len(piped) > 5
    for cell, shown, entry in zip(cells, result.cells, piped, strict=True):
        assert cell["label"] == shown.label == entry["label"]
        assert cell["score"] == pytest.approx(shown.score, abs=1e-5)
        assert cell["score"] == pytest.approx(entry["score"], abs=1e-5)
        assert cell["box"] == pytest.approx(shown.box, abs=0.01)
        assert all(abs(a - b) <= 1 for a, b in zip(cell["box"], entry["box"].values(), strict=True))
        assert {name: found["value"] for name, found in shown.attributes.items()} == entry["morphology"]
        assert {name: found["value"] for name, found in cell["attributes"].items()} == entry["morphology"]
        assert bool(cell["attributes"]) == (cell["label"] not in ("RBC", "Platelets"))
    assert result.class_parents == model.config.label_parents


def test_a_prompt_names_classes_in_any_spelling():
    config = UniHemaConfig(id2label={0: "RBC", 1: "WBC", 2: "Platelets", 3: "segmented neutrophil"})
    for prompt, asked in (
        ("red blood cells", [True, False, False, False]),
        ("leukocytes, thrombocyte", [False, True, True, False]),
        (["Erythrocytes", "wbc"], [True, True, False, False]),
        ("neutrophil segmented", [False, False, False, True]),
    ):
        assert asked_classes(config, prompt).tolist() == asked, prompt
        assert misspelled_classes(config, prompt) == {}
    assert asked_classes(config, "red blood cells, malaria") is None
    # Each of two spellings that are classes of their own is itself.
    both = UniHemaConfig(id2label={0: "leukocyte", 1: "WBC"})
    assert asked_classes(both, "WBC").tolist() == [False, True]


def test_attributes_by_the_class_tree_not_by_spelling():
    names = ["odd red cell 7", "NRBC", "Giant-Platelets", "my white cell", "odd thing"]
    config = UniHemaConfig.tiny(
        id2label=dict(enumerate(names)),
        label_parents={"odd red cell 7": "RBC", "my white cell": "neutrophil"},
        morphology={"vacuoles": ["absent", "present"]},
    )
    boxes = [[0.1 + 0.2 * number, 0.5, 0.1, 0.1] for number in range(5)]
    outputs = SimpleNamespace(
        logits=(torch.eye(5) * 10 - 5 - torch.arange(5)[:, None] * 0.1)[None],
        pred_boxes=torch.tensor([boxes]),
        pred_morphology=torch.tensor([[[3.0, 0.0]] * 5]),
    )
    (cells,) = find_cells(outputs, config, [(100, 200)])
    assert [cell["label"] for cell in cells] == names and [cell["query"] for cell in cells] == list(range(5))
    assert [list(cell["attributes"]) for cell in cells] == [[], ["vacuoles"], [], ["vacuoles"], ["vacuoles"]]
    assert cells[1]["attributes"]["vacuoles"] == {"value": "absent", "score": pytest.approx(0.9526, abs=1e-3)}
    assert cells[0]["box"] == pytest.approx([10, 45, 30, 55], abs=1e-3)


def test_thresholds_are_the_calibrated_ones_unless_one_is_given():
    config = UniHemaConfig.tiny(id2label={0: "RBC", 1: "WBC"}, trained={"detection_thresholds": {"WBC": 0.7}})
    assert config.class_thresholds() == [0.3, 0.7] and config.class_thresholds(0.0) == [0.0, 0.0]
    outputs = SimpleNamespace(
        logits=torch.tensor([[[-9.0, 0.4]]]),
        pred_boxes=torch.tensor([[[0.5, 0.5, 0.1, 0.1]]]),
        pred_morphology=torch.zeros(1, 1, sum(config.morphology_sizes)),
    )
    assert find_cells(outputs, config) == [[]]
    assert [cell["label"] for cell in find_cells(outputs, config, threshold=0.5)[0]] == ["WBC"]
