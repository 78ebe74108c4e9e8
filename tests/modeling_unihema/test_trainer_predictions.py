"""`compute_metrics` of Transformers' own examples reads what its Trainer collects from each head."""

import numpy as np
import pytest
import torch
from tiny_models import HEADS, batch, very_tiny_config
from transformers import Trainer, TrainingArguments


IMAGES = 4


def predictions(task, folder, **settings):
    """What `compute_metrics` is given after an evaluation of two batches, and the model."""
    inputs = batch(task, images=IMAGES)
    rows = [{name: values[i] for name, values in inputs.items()} for i in range(IMAGES)]
    seen = []

    def collate(rows):
        together = {name: [row[name] for row in rows] for name in rows[0]}
        return {name: v if isinstance(v[0], dict) else torch.stack(v) for name, v in together.items()}

    model = HEADS[task](very_tiny_config())
    settings |= {"per_device_eval_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **settings),
        data_collator=collate,
        eval_dataset=rows,
        compute_metrics=lambda collected: seen.append(collected) or {"images": len(collected.label_ids)},
    )
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    model.eval()
    with torch.no_grad():
        halves = [model(**collate(rows[start : start + 2])) for start in (0, 2)]
    return seen[0], halves


def test_single_cells_as_in_image_classification(tmp_path):
    collected, halves = predictions("single_cell", tmp_path)
    logits = torch.cat([output.logits for output in halves]).numpy()
    np.testing.assert_array_equal(np.argmax(collected.predictions, axis=1), np.argmax(logits, axis=1))
    np.testing.assert_allclose(collected.predictions, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(collected.label_ids, np.arange(IMAGES) % 2)


def test_cells_as_in_object_detection(tmp_path):
    collected, halves = predictions("detection", tmp_path, eval_do_concat_batches=False)
    for given, output in zip(collected.predictions, halves, strict=True):
        np.testing.assert_allclose(given[1], output.logits.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(given[2], output.pred_boxes.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "field", "place"), [("question_answering", "logits", 0), ("segmentation", "mask_logits", 1)]
)
def test_answers_and_masks(task, field, place, tmp_path):
    collected, halves = predictions(task, tmp_path)
    whole = torch.cat([output[field] for output in halves]).numpy()
    np.testing.assert_allclose(collected.predictions[place], whole, rtol=1e-4, atol=1e-5)
