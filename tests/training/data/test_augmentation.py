"""Augmentation: boxes and masks stay on their cells, and a view depends on seed, epoch and index alone."""

import pytest
import torch

from unihema.training.data.augmentation import AugmentationConfig, augment, augmentation_rng, drawn_scale


BACKGROUND, CELL = 200, 40
GEOMETRY = AugmentationConfig(brightness=0, contrast=0, saturation=0, hue=0, stain=0, blur=0, zoom=0.8, zoom_min=0.5)


def field(height=120, width=160, boxes=((20, 30, 36, 22), (100, 70, 20, 30))):
    image = torch.full((3, height, width), BACKGROUND, dtype=torch.uint8)
    mask = torch.zeros(height, width, dtype=torch.uint8)
    for x, y, w, h in boxes:
        image[:, y : y + h, x : x + w] = CELL
        mask[y : y + h, x : x + w] = 1
    return image, torch.tensor(boxes, dtype=torch.float32), mask


@pytest.mark.parametrize("size", [(120, 160), (128, 124)])
def test_boxes_and_mask_stay_on_the_cells(size):
    image, boxes, mask = field(*size)
    turned = set()
    for index in range(60):
        view, moved, kept, view_mask = augment(image, GEOMETRY, augmentation_rng(0, 0, index), boxes, mask)[:4]
        assert torch.equal(view_mask.bool(), view[0] == CELL)
        assert view_mask.shape == view.shape[1:]
        inside = torch.zeros_like(view_mask)
        for x, y, w, h in moved.round().int().tolist():
            assert (view[:, y : y + h, x : x + w] == CELL).all()
            inside[y : y + h, x : x + w] = 1
        # What is outside the boxes is background, or the rest of a cell that is no target.
        visible = torch.tensor([w * h for _, _, w, h in moved.tolist()])
        assert (visible >= 0.5 * (boxes[kept, 2] * boxes[kept, 3]) - 1e-3).all()
        if len(kept) == 2:
            assert torch.equal(inside, view_mask)
        if len(kept):
            turned.add(bool((moved[0, 2] > moved[0, 3]) == (boxes[kept[0], 2] > boxes[kept[0], 3])))
        # Batches of views must not be mostly padding.
        assert abs(view.shape[2] / view.shape[1] - size[1] / size[0]) < 0.12
    assert turned == {True, False}


def test_cells_cut_off_by_the_window_are_no_targets():
    image, boxes, _ = field(boxes=((0, 0, 30, 30), (130, 90, 30, 30)))
    config = AugmentationConfig.none()
    config.zoom, config.zoom_min, config.min_visible = 1.0, 0.5, 0.5
    views = [augment(image, config, augmentation_rng(0, 0, index), boxes) for index in range(40)]
    assert {len(view.kept) for view in views} >= {0, 1}
    # What is left of one is no background either.
    cut = [(view, box, of) for view in views for box, of in zip(view.cut_boxes, view.cut.tolist(), strict=True)]
    assert cut and not any(of in view.kept.tolist() for view, _, of in cut)
    for view, (x, y, w, h), _ in cut:
        assert 0.1 <= float(w * h) / 900 < 0.5
        assert (
            view.image[:, round(float(y)) : round(float(y + h)), round(float(x)) : round(float(x + w))] == CELL
        ).all()


def test_same_seed_epoch_and_index_same_view():
    image, boxes, mask = field()
    config = AugmentationConfig()
    first = augment(image, config, augmentation_rng(1, 2, 3), boxes, mask)
    again = augment(image, config, augmentation_rng(1, 2, 3), boxes, mask)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [
        augment(image, config, augmentation_rng(*key), boxes, mask)[0] for key in ((1, 3, 3), (1, 2, 4), (2, 2, 3))
    ]
    assert not any(other.shape == first[0].shape and torch.equal(other, first[0]) for other in others)


def test_none_changes_nothing_and_input_is_never_changed():
    image, boxes, mask = field()
    before = image.clone(), boxes.clone(), mask.clone()
    view, moved, kept, view_mask = augment(image, AugmentationConfig.none(), augmentation_rng(0, 0, 0), boxes, mask)[:4]
    assert torch.equal(view, image) and torch.equal(moved, boxes) and torch.equal(view_mask, mask)
    assert kept.tolist() == [0, 1]
    for index in range(20):
        augment(image, AugmentationConfig(), augmentation_rng(0, 0, index), boxes, mask)
    assert all(torch.equal(a, b) for a, b in zip((image, boxes, mask), before))


def test_stain_varies_within_bounds():
    image, _, _ = field()
    config = AugmentationConfig(flip=0, transpose=0, zoom=0, blur=0)
    means = torch.stack([augment(image, config, augmentation_rng(0, 0, i))[0].float().mean((1, 2)) for i in range(50)])
    assert means.std(0).min() > 2
    assert (means.mean(0) - image.float().mean((1, 2))).abs().max() < 15
    assert augment(image, config, augmentation_rng(0, 0, 0))[0].dtype == torch.uint8


def test_image_without_cells_keeps_empty_boxes():
    image, _, _ = field(boxes=())
    _, boxes, kept, *_ = augment(image, GEOMETRY, augmentation_rng(0, 0, 1), torch.zeros(0, 4))
    assert boxes.shape == (0, 4) and len(kept) == 0


def test_language_tasks_have_no_window():
    for task in ("question_answering", "cloze"):
        config = AugmentationConfig.for_task(task)
        assert config.zoom == 0 and config.hue == 0


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"AugmentationConfig.flip=1.5 must lie in \[0, 1\]"):
        AugmentationConfig(flip=1.5)
    with pytest.raises(ValueError, match="zoom_min=0.01 leaves nothing"):
        AugmentationConfig(zoom_min=0.01)


def test_scales_are_as_often_below_one_as_above():
    config = AugmentationConfig(scale=0.5)
    scales = [drawn_scale(config, augmentation_rng(0, 0, index)) for index in range(400)]
    assert 1 / 1.5 <= min(scales) < 0.68 and 1.48 < max(scales) <= 1.5
    assert 0.43 < sum(scale < 1 for scale in scales) / 400 < 0.57
    assert drawn_scale(AugmentationConfig(), augmentation_rng(0, 0, 0)) == 1.0
