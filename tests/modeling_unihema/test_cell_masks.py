"""Masks of single cells: learned where there are labels, absent where a checkpoint was not trained on them."""

import numpy as np
import pytest
import torch
from tiny_models import batch, lively, very_tiny_config

from unihema import UniHemaForDetection, UniHemaForMultiTask
from unihema.errors import InputError
from unihema.modeling_unihema.cell_masks import (
    GRID,
    UNKNOWN,
    cell_mask_logits,
    mask_points,
    masks_in_boxes,
    sampled_masks,
)
from unihema.modeling_unihema.losses import count_loss_items
from unihema.processing_unihema.post_processing import find_cells


def model(trained: bool = True, model_class: type = UniHemaForDetection):
    torch.manual_seed(0)
    config = very_tiny_config(denoising_queries=0)
    config.trained.cell_masks = trained
    config.trained.detection_thresholds = dict.fromkeys(config.label2id, 0.0)
    return lively(model_class(config))


def with_masks(inputs: dict, images=(0, 1)) -> dict:
    for image in images:
        samples = torch.rand(2, GRID, GRID, generator=torch.Generator().manual_seed(image)) < 0.5
        inputs["labels"][image]["masks"] = samples.to(torch.uint8)
    return inputs


def finder_of(trained) -> torch.nn.Module:
    return trained.model.hema_former.query_guided_mask_finder


def test_gradients_reach_the_mask_finder_and_the_queries():
    trained = model().train()
    out = trained(**with_masks(batch("detection")))
    assert out.loss_dict["loss_mask_bce"] > 0 and out.loss_dict["loss_mask_dice"] > 0
    out.loss.backward()
    for name, parameter in finder_of(trained).named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_absent_masks_cost_nothing():
    trained = model().eval()
    plain = batch("detection")
    without = trained(**plain)
    assert not any("mask" in name for name in without.loss_dict)
    unknown = batch("detection")
    for image in unknown["labels"]:
        image["masks"] = torch.full((2, GRID, GRID), UNKNOWN, dtype=torch.uint8)
    assert torch.equal(trained(**unknown).loss, without.loss)
    # An image without masks is no background to one with them.
    one, both = (trained(**with_masks(batch("detection"), images)) for images in ((0,), (0, 1)))
    first = batch("detection")
    first = {name: values[:1] for name, values in with_masks(first, (0,)).items()}
    for name in ("loss_mask_bce", "loss_mask_dice"):
        assert one.loss_dict[name] == pytest.approx(trained(**first).loss_dict[name].item(), rel=1e-4)
        assert one.loss_dict[name] != pytest.approx(both.loss_dict[name].item(), rel=1e-3)
    assert count_loss_items("detection", with_masks(batch("detection"), (0,))["labels"], trained.config)["masks"] == 2


@torch.no_grad()
def test_a_checkpoint_without_masks_has_none_and_one_head_has_those_of_all_heads(tmp_path):
    inputs = batch("detection")
    del inputs["labels"]
    assert not hasattr(model(trained=False).model.hema_former, "query_guided_mask_finder")
    whole = model(trained=False, model_class=UniHemaForMultiTask).eval()
    outputs = whole(**inputs, task="detection")
    assert "cell_mask_queries" not in outputs
    assert all(cell["mask"] is None for cell in find_cells(outputs, whole.config, [(64, 96)] * 2)[0])
    whole.config.trained.cell_masks = True
    expected = whole(**inputs, task="detection")
    assert torch.equal(expected.logits, outputs.logits) and torch.equal(expected.pred_boxes, outputs.pred_boxes)
    whole.save_pretrained(tmp_path)
    single = UniHemaForDetection.from_pretrained(tmp_path).eval()
    assert single.config.trained.cell_masks
    assert torch.equal(single(**inputs).cell_mask_queries, expected.cell_mask_queries)


@torch.no_grad()
def test_masks_are_of_the_pixels_of_their_boxes_and_padding_changes_nothing():
    trained = model().eval()
    inputs = batch("detection")
    del inputs["labels"]
    together = find_cells(trained(**inputs), trained.config, [(64, 96), (640, 640)])
    for cells, size in zip(together, [(64, 96), (640, 640)], strict=True):
        assert cells
        for cell in cells:
            left, top, right, bottom = cell["box"]
            assert cell["mask"].shape == (np.ceil(bottom) - np.floor(top), np.ceil(right) - np.floor(left))
            assert np.ceil(bottom) <= size[0] and cell["mask"].dtype == bool
    # The second image has 64 of 96 columns.
    alone = {name: values[1:] for name, values in inputs.items()}
    alone |= {name: alone[name][..., :64] for name in ("pixel_values", "pixel_mask")}
    for one, other in zip(together[1], find_cells(trained(**alone), trained.config, [(640, 640)])[0], strict=True):
        assert one["box"] == pytest.approx(other["box"], abs=1e-2)
        if one["mask"].shape == other["mask"].shape:
            assert (one["mask"] != other["mask"]).mean() < 0.01
    assert any(cell["mask"].any() and not cell["mask"].all() for cells in together for cell in cells)
    # Without sizes boxes are no pixels.
    assert find_cells(trained(**inputs), trained.config)[0][0]["mask"] is None


@pytest.mark.parametrize("ratios", [(1.0, 1.0), (0.75, 0.5)])
def test_pixels_of_a_box_are_what_points_of_it_are(ratios):
    generator = torch.Generator().manual_seed(0)
    queries, pixels = (torch.randn(shape, generator=generator) for shape in ((5, 8), (8, 12, 16)))
    boxes = [[0, 0, 40, 30], [10, 5, 11, 6], [90, 70, 120, 90], [33, 21, 77, 66], [5, 5, 5, 9]]
    masks = masks_in_boxes(queries, pixels, torch.tensor(ratios), boxes, (90, 120))
    for number, (left, top, right, bottom) in enumerate(boxes):
        y, x = torch.meshgrid(torch.arange(top, bottom) + 0.5, torch.arange(left, right) + 0.5, indexing="ij")
        points = torch.stack((x / 120, y / 90), -1).flatten(0, 1)[None]
        assert masks[number].shape == (bottom - top, right - left)
        if points.numel():
            logits = cell_mask_logits(queries[number][None], pixels, torch.tensor(ratios), points)[0]
            sure = logits.abs() > 1e-3
            assert ((logits > 0) == masks[number].flatten())[sure].all()


def test_samples_are_of_the_cell_its_margin_and_nothing_beyond_the_image():
    instances = torch.zeros(40, 60, dtype=torch.int32)
    instances[10:30, 20:44] = 2
    instances[10:30, 44:50] = 1
    boxes = torch.tensor([[32.0, 20, 24, 20], [47.0, 20, 6, 20], [2.0, 2, 16, 16]])
    samples = sampled_masks(instances, [2, 1, None], boxes)
    assert samples.dtype == torch.uint8 and samples.shape == (3, GRID, GRID)
    inside = (samples == 1).float().mean((1, 2))
    assert inside[:2].tolist() == pytest.approx([1 / 1.25**2] * 2, abs=0.08)
    assert (samples[2] == UNKNOWN).all()
    at_corner = sampled_masks(instances, [2], torch.tensor([[0.0, 0, 10, 10]]))[0]
    assert (at_corner[: GRID // 2] == UNKNOWN).all() and (at_corner[GRID // 2 :, GRID // 2 :] == 0).all()
    assert mask_points(boxes).shape == (3, GRID * GRID, 2)


def test_labels_of_another_form_are_named():
    inputs = batch("detection")
    inputs["labels"][1]["masks"] = torch.zeros(2, 64, 96, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"masks of image 1 must be uint8 \[2, 32, 32\]"):
        model()(**inputs)


def test_a_tiny_model_learns_the_masks_of_an_image():
    """A disc and the ring around another one."""
    trained = model().train()
    y, x = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    far = [((x - cx) ** 2 + (y - cy) ** 2).sqrt() for cx, cy in ((24, 32), (68, 30))]
    instances = (far[0] < 18).int() + 2 * ((far[1] < 22) & (far[1] > 10)).int()
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 0.1
    pixels = pixels + (instances > 0) * torch.tensor([1.0, -1.0, 0.5])[:, None, None]
    corners = [(6, 14, 42, 50), (46, 8, 90, 52)]
    boxes = torch.tensor([[(a + c) / 2, (b + d) / 2, c - a, d - b] for a, b, c, d in corners], dtype=torch.float32)
    labels = [
        {
            "class_labels": torch.tensor([0, 2]),
            "boxes": boxes / torch.tensor([96, 64, 96, 64]),
            "masks": sampled_masks(instances, [1, 2], boxes),
        }
    ]
    optimizer = torch.optim.AdamW(trained.parameters(), 3e-3)
    # It settles at the end: at a steady rate scores go up and down, on each processor at other steps.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=200)
    for _ in range(200):
        optimizer.zero_grad()
        out = trained(pixels, labels=labels)
        out.loss.backward()
        optimizer.step()
        schedule.step()
    assert out.loss_dict["loss_mask_dice"] < 0.1
    cells = find_cells(trained.eval()(pixels), trained.config, [(64, 96)], threshold=0.3)[0]
    assert {cell["label"] for cell in cells} == {"red blood cell", "neutrophil"}
    for cell in cells[:2]:
        left, top = (int(np.floor(side)) for side in cell["box"][:2])
        found = np.zeros((64, 96), bool)
        found[top : top + cell["mask"].shape[0], left : left + cell["mask"].shape[1]] = cell["mask"]
        true = (instances == (1 if cell["label"] == "red blood cell" else 2)).numpy()
        assert (found & true).sum() / (found | true).sum() > 0.7
