"""An image gives the same result alone and in a padded batch."""

import pytest
import torch
from tiny_models import lively, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.modeling_unihema.padding import MaskedGroupNorm, strides
from unihema.modeling_unihema.visual_backbone import feature_levels


# Sizes that are no multiples of the strides, one with fewer tokens than there are queries; and what they are padded to: the
# second has one row and one column more than whole cells of the coarsest level.
SIZES = [(70, 100), (61, 128), (96, 33), (32, 40)]
PADDED = [(128, 160), (129, 193)]
VISUAL = ("detection", "segmentation", "single_cell")


@pytest.fixture(scope="module", params=["learnable", "bilinear"])
def model(request):
    torch.manual_seed(0)
    return lively(UniHemaForMultiTask(very_tiny_config(num_queries=40, upsampler=request.param))).eval()


def images(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h, w, generator=generator) for h, w in SIZES]


def padded(pictures: list[torch.Tensor], size: tuple[int, int] = PADDED[0]) -> dict[str, torch.Tensor]:
    pixels, mask = torch.zeros(len(pictures), 3, *size), torch.zeros(len(pictures), *size, dtype=torch.long)
    for row, picture in enumerate(pictures):
        h, w = picture.shape[1:]
        pixels[row, :, :h, :w], mask[row, :h, :w] = picture, 1
    return {"pixel_values": pixels, "pixel_mask": mask}


@pytest.mark.parametrize("size", PADDED)
@pytest.mark.parametrize("task", VISUAL)
@torch.no_grad()
def test_alone_equals_in_a_padded_batch(model, task, size):
    pictures = images()
    together = model(task=task, **padded(pictures, size))
    for row, picture in enumerate(pictures):
        alone = model(task=task, pixel_values=picture[None])
        if task == "single_cell":
            assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-4)
        elif task == "segmentation":
            h, w = picture.shape[1:]
            assert torch.allclose(alone.mask_logits[0], together.mask_logits[row, :h, :w], atol=1e-3)
        else:
            queries = alone.logits.shape[1]
            assert torch.allclose(alone.pred_boxes[0], together.pred_boxes[row, :queries], atol=1e-3)
            assert torch.allclose(alone.logits[0], together.logits[row, :queries], atol=1e-3)
            assert torch.allclose(alone.pred_morphology[0], together.pred_morphology[row, :queries], atol=1e-3)
            assert (together.logits[row, queries:] < -1e3).all()


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32, 64])
def test_strides_of_any_size(stride):
    for whole in range(stride + 1, 300):
        assert strides([whole], [-(-whole // stride)]) == [stride]
    # A patch embedding leaves out the last pixels.
    assert strides([35, 50], [8, 12]) == [4, 4]


@torch.no_grad()
def test_a_mask_has_the_size_of_a_small_image(model):
    for side in range(8, 20):
        assert model(task="segmentation", pixel_values=torch.randn(1, 3, side, 40)).mask_logits.shape == (1, side, 40)


@torch.no_grad()
def test_answers_are_equal(model):
    pictures = images()
    questions = torch.tensor([[5, 6, 7, 1, 0], [8, 9, 1, 0, 0], [10, 11, 12, 13, 1], [14, 1, 0, 0, 0]])
    together = model.generate(questions, attention_mask=(questions != 0).long(), max_new_tokens=6, **padded(pictures))
    for row, picture in enumerate(pictures):
        question = questions[row][questions[row] != 0][None]
        alone = model.generate(question, pixel_values=picture[None], max_new_tokens=6)[0]
        assert alone.tolist() == together[row][: len(alone)].tolist()


@torch.no_grad()
def test_what_padding_holds_does_not_matter(model):
    inputs = padded(images())
    noisy = inputs["pixel_values"] + 5 * torch.randn(inputs["pixel_values"].shape) * (1 - inputs["pixel_mask"][:, None])
    clean = model(task="detection", **inputs)
    noised = model(task="detection", pixel_values=noisy, pixel_mask=inputs["pixel_mask"])
    assert torch.equal(clean.pred_boxes, noised.pred_boxes)


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask(model):
    picture = images()[0][None]
    ones = torch.ones(1, *picture.shape[-2:], dtype=torch.long)
    without = model(task="detection", pixel_values=picture)
    assert torch.equal(without.logits, model(task="detection", pixel_values=picture, pixel_mask=ones).logits)


def test_group_norm_of_the_valid_area():
    torch.manual_seed(0)
    norm = MaskedGroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    maps = torch.randn(2, 8, 6, 7)
    valid = torch.zeros(2, 6, 7, dtype=torch.bool)
    valid[0, :4, :5] = valid[1] = True
    normed = norm(maps, valid)
    expected = torch.nn.functional.group_norm(maps[:1, :, :4, :5], 4, norm.weight, norm.bias)
    assert torch.allclose(normed[:1, :, :4, :5], expected, atol=1e-5)
    assert torch.allclose(normed[1:], norm(maps[1:]), atol=1e-5)


def test_share_of_padding_is_exact_in_half_precision():
    valid = torch.zeros(1, 100, 1000, dtype=torch.bool)
    valid[:, :61, :937] = True
    levels = feature_levels([torch.zeros(1, 4, 100, 1000, dtype=torch.bfloat16)], [valid], 20.0)
    torch.testing.assert_close(levels.valid_ratios, torch.tensor([[[0.937, 0.61]]]), rtol=0, atol=1e-6)
