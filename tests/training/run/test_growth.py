"""Classes added to a checkpoint."""

import torch
from tiny_checkpoint import save_lively
from tiny_runs import run_config

from unihema.loading import load_model
from unihema.training.run.build import build
from unihema.training.run.growth import grow
from unihema.training.run.loop import train


OLD_CELLS = ["neutrophil", "lymphocyte", "burr_cell"]


def rows_of(classes=(), labels=()):
    box = {"bbox": [[0, 0, 9, 9]] * len(classes), "category": list(classes)}
    common = {"image": "a.png", "file_name": "a.png", "dataset": "lab"}
    return {
        "detection": [common | {"task": "detection", "objects": box, "annotated_classes": list(classes)}],
        "single_cell": [common | {"task": "single_cell", "label": label} for label in labels],
    }


def test_old_classes_keep_weights_and_answers(tmp_path):
    folder = save_lively(tmp_path / "old", 0, single_cell_labels=OLD_CELLS)
    before, _ = load_model(folder, "cpu")
    model, processor = load_model(folder, "cpu")
    old = before.config.class_names
    rows = rows_of([old[0], "ring", "schizont", "odd thing"], ["WBC", "eosinophil", "parasitized", "ring", "burr_cell"])
    assert grow(model, processor, rows) == {
        "detection": ["ring", "schizont", "odd thing"],
        "single_cell": ["eosinophil", "parasitized", "ring"],
    }
    config = model.config
    assert config.class_names == [*old, "ring", "schizont", "odd thing"]
    assert config.label2id["ring"] == len(old) and processor.default_prompts["detection"].endswith(
        "schizont, odd thing"
    )
    assert config.default_prompt_ids == processor.default_prompt_ids()
    assert config.single_cell_labels == [*OLD_CELLS, "eosinophil", "parasitized", "ring"]
    assert "WBC" in config.single_cell_names and "WBC" not in config.single_cell_labels
    heads = [
        (one.single_cell_head.layers[-1], one.detection_head.class_head, one.model.query_selection.class_head)
        for one in (before, model)
    ]
    for layer, grown in zip(*heads, strict=True):
        count = len(layer.weight)
        assert len(grown.weight) == len(grown.bias) == grown.out_features == count + 3
        assert torch.equal(layer.weight, grown.weight[:count]) and torch.equal(layer.bias, grown.bias[:count])
    model.eval(), before.eval()
    pixels, prompt = torch.rand(2, 3, 64, 64), torch.tensor([[5, 7, 1]])
    with torch.inference_mode():
        cells = [one(task="single_cell", pixel_values=pixels).logits for one in (before, model)]
        # Matrices of another width may be added up in another order.
        torch.testing.assert_close(cells[0], cells[1][:, :3], rtol=1e-6, atol=1e-6)
        found = [one(task="detection", pixel_values=pixels, input_ids=prompt) for one in (before, model)]
        torch.testing.assert_close(found[0].logits, found[1].logits[..., : len(old)], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0].pred_boxes, found[1].pred_boxes, rtol=1e-5, atol=1e-5)
    embeddings = [one.denoising.label_embedding.weight for one in (before, model)]
    assert torch.equal(embeddings[0][:-1], embeddings[1][: len(old)]) and torch.equal(
        embeddings[0][-1], embeddings[1][-1]
    )


def test_new_classes_answer_for_nobody_before_they_are_taught(tmp_path):
    folder = save_lively(tmp_path / "old", 1, single_cell_labels=OLD_CELLS)
    model, processor = load_model(folder, "cpu")
    red = model.config.class_names.index("red blood cell")
    grow(model, processor, rows_of(["red blood cell", "ring", "odd thing"], ["eosinophil", "neutrophil"]))
    assert model.config.label_parents["ring"] == "red blood cell"
    with torch.inference_mode():
        logits = model.eval()(task="detection", pixel_values=torch.rand(1, 3, 64, 64)).logits
        torch.testing.assert_close(logits[..., -2], logits[..., red] - 4)
        assert (logits[..., -1] < -3).all()
        cells = model(task="single_cell", pixel_values=torch.rand(1, 3, 64, 64)).logits[0]
    torch.testing.assert_close(cells[3], cells[:2].mean() - 4)


def test_a_run_goes_on_with_more_classes(smears, tmp_path):
    first = run_config(smears, tmp_path / "first", **{"optimisation.max_steps": 1, "data.tasks": ["single_cell"]})
    first.data.rename = {"neutrophil": "lymphocyte"}
    train(first)
    more = {"model.initial_checkpoint": str(tmp_path / "first"), "model.overrides": {}, "model.grow_classes": True}
    config = run_config(
        smears, tmp_path / "second", **{"data.tasks": ["single_cell"], "optimisation.max_steps": 2, **more}
    )
    train(config)
    model, _ = load_model(tmp_path / "second", "cpu")
    old, _ = load_model(tmp_path / "first", "cpu")
    assert model.config.single_cell_labels == [*old.config.single_cell_labels, "neutrophil"]
    assert model.config.single_cell_parents["neutrophil"] == "WBC"
    # The grown model needs no growing.
    again = run_config(smears, tmp_path / "third", **{"data.tasks": ["single_cell"], **more})
    again.model.initial_checkpoint, again.model.grow_classes = str(tmp_path / "second"), False
    assert build(again, {})[0].config.single_cell_labels == model.config.single_cell_labels
