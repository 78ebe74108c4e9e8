"""Batches that are accumulated teach what one large batch teaches: in our loop, in Transformers' Trainer, and over processes."""

import pytest
import torch
from tiny_models import HEADS, batch, very_tiny_config
from transformers import Trainer, TrainingArguments

from unihema import UniHemaForMultiTask
from unihema.modeling_unihema.losses import count_loss_items
from unihema.modeling_unihema.tasks import TASKS


IMAGES = 4
# Of the length of a parameter's gradient: sums in another order.
TOLERANCE = 1e-5
# Of the length of the whole gradient: what is zero but for rounding, as of the biases of keys.
ROUNDING = 1e-7


def uneven(task: str) -> dict:
    """A batch whose images have different numbers of cells, attributes, labelled pixels and tokens."""
    whole = batch(task, images=IMAGES)
    labels = whole["labels"]
    if task == "detection":
        for image, kept in zip(labels, (1, 2, 0, 2)):
            for name in ("class_labels", "boxes", "morphology"):
                if name in image:
                    image[name] = image[name][:kept]
        labels[1]["morphology"][0] = -100
        labels[3]["annotated_classes"] = torch.tensor([True, True, False])
    elif task == "segmentation":
        labels[1, :, :40] = -100
        labels[2] = -100
    elif task == "single_cell":
        labels[2] = -100
    else:
        labels[0, 1:] = -100
        labels[3, 2:] = -100
    return whole


def part_of(whole: dict, start: int, size: int) -> dict:
    return {name: value[start : start + size] for name, value in whole.items()}


def gradients(model, batches: list[dict], counts) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for each in batches:
        model(**each, num_items_in_batch=counts).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_accumulated_batches_give_the_gradient_of_one(task, size):
    torch.manual_seed(0)
    # No dropout, no random queries, no statistics of the batch.
    model = UniHemaForMultiTask(very_tiny_config()).eval()
    whole = {**uneven(task if task != "cloze" else "question_answering"), "task": task}
    labels = whole["labels"]
    expected = gradients(model, [whole], None)
    parts = [{**part_of(whole, start, size), "task": task} for start in range(0, IMAGES, size)]
    counted = [count_loss_items(task, part["labels"], model.config) for part in parts]
    totals = {name: torch.tensor(float(sum(count[name] for count in counted))) for name in counted[0]}
    assert totals == count_loss_items(task, labels, model.config)
    found = gradients(model, parts, totals)
    assert found.keys() == expected.keys() and any(value.abs().max() > 0 for value in expected.values())
    whole_length = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= TOLERANCE * value.norm() + ROUNDING * whole_length, name


@pytest.mark.parametrize("task", HEADS)
def test_the_trainer_of_transformers_accumulates_rightly(task, tmp_path):
    whole = part_of(batch(task, images=2), 0, 1)
    norms = {}
    for accumulation in (1, 4):
        torch.manual_seed(0)
        model = HEADS[task](very_tiny_config(denoising_queries=0, single_cell_dropout=0.0, freeze_backbone_norm=True))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=1e9,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=[whole] * 4, data_collator=lambda rows: rows[0])
        trainer.train()
        norms[accumulation] = next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)
    # Four times the same image is that image.
    assert norms[4] == pytest.approx(norms[1], rel=1e-4)
