"""The losses of masks."""

import math

import pytest
import torch

from unihema.modeling_unihema.losses import segmentation_loss


LN2 = math.log(2)


def test_masks_by_hand():
    labels = torch.tensor([[[1, 1, -100], [0, 0, -100]]])
    loss, terms = segmentation_loss(torch.zeros(1, 2, 3), labels)
    assert terms["loss_dice"].item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1), abs=1e-6)
    assert terms["loss_focal"].item() == pytest.approx(0.25 * 0.25 * LN2, abs=1e-6)
    assert loss.item() == pytest.approx(2 * 0.4 + 0.0625 * LN2, abs=1e-6)
    other, _ = segmentation_loss(torch.zeros(1, 2, 3), labels, dice_weight=0, focal_weight=3)
    assert other.item() == pytest.approx(3 * 0.0625 * LN2, abs=1e-6)


def test_a_perfect_mask_and_an_empty_one_cost_nothing():
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0, :2] = 1
    logits = (labels * 2 - 1) * 50.0
    assert segmentation_loss(logits, labels)[0].item() == pytest.approx(0, abs=1e-6)
    assert segmentation_loss(-logits, labels)[1]["loss_dice"] > 0.9


def test_masks_are_averaged_image_by_image_and_ignore_padding():
    torch.manual_seed(0)
    labels = (torch.rand(2, 6, 8) > 0.7).long()
    labels[1, :, 4:] = -100
    logits = torch.randn(2, 6, 8, requires_grad=True)
    loss, terms = segmentation_loss(logits, labels)
    first, second = (
        segmentation_loss(logits[:1], labels[:1])[1],
        segmentation_loss(logits[1:, :, :4], labels[1:, :, :4])[1],
    )
    for name in terms:
        assert terms[name].item() == pytest.approx((first[name] + second[name]).item() / 2, rel=1e-5)
    loss.backward()
    assert (logits.grad[1, :, 4:] == 0).all() and (logits.grad[0] != 0).all()
    ignored = torch.full((1, 6, 8), -100)
    with_ignored, _ = segmentation_loss(torch.cat((logits, logits[:1])), torch.cat((labels, ignored)))
    assert with_ignored.item() == pytest.approx(loss.item(), rel=1e-5)
    nothing, _ = segmentation_loss(logits[:1], ignored)
    assert nothing.item() == 0 and nothing.requires_grad


def test_masks_of_the_wrong_shape_or_values_are_errors():
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*\(1, 4, 5\)"):
        segmentation_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="255"):
        segmentation_loss(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 255))


def test_dice_over_the_batch():
    logits = torch.full((2, 1, 4), 20.0)
    labels = torch.tensor([[[1, 1, 1, 1]], [[0, 0, 0, 0]]])
    _, image = segmentation_loss(logits, labels)
    _, together = segmentation_loss(logits, labels, dice_over_batch=True)
    assert image["loss_dice"].item() == pytest.approx((0 + 1 - 1 / 5) / 2, abs=1e-5)
    assert together["loss_dice"].item() == pytest.approx(1 - 9 / 13, abs=1e-5)
    assert image["loss_focal"] == together["loss_focal"]
