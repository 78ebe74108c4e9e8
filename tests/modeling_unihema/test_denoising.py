"""Contrastive denoising queries."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import box_convert

from unihema.modeling_unihema.denoising import ContrastiveDenoising
from unihema.modeling_unihema.layers import inverse_sigmoid


def corners_of(boxes: torch.Tensor) -> torch.Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


def denoising(**overrides) -> ContrastiveDenoising:
    fields = {
        "num_labels": 5,
        "ancestor_matrix": None,
        "d_model": 8,
        "num_queries": 30,
        "denoising_queries": 20,
        "label_noise_ratio": 0.5,
        "box_noise_scale": 0.4,
        "morphology": {},
    }
    return ContrastiveDenoising(SimpleNamespace(**{**fields, **overrides}))


def labels(*cells: int, classes: int = 5) -> list[dict[str, torch.Tensor]]:
    """Cells large enough that the clamp of `inverse_sigmoid` does not touch them, far enough from the border that no
    noise (scale up to 0.4) is cut off there."""
    return [
        {
            "class_labels": torch.randint(classes, (n,)),
            "boxes": torch.cat((torch.rand(n, 2) * 0.4 + 0.3, torch.rand(n, 2) * 0.15 + 0.1), -1),
        }
        for n in cells
    ]


def slots_of(queries, image: int, positive: bool) -> torch.Tensor:
    return ((queries.target_indices[image] >= 0) & (queries.positive[image] == positive)).nonzero().flatten()


def corner_shifts(queries, batch, image: int, positive: bool) -> torch.Tensor:
    """How far each side moved, in halves of the cell's width or height: `[slots, 4]`."""
    slots = slots_of(queries, image, positive)
    boxes = batch[image]["boxes"][queries.target_indices[image, slots]]
    moved = corners_of(queries.reference_logits[image, slots].sigmoid()) - corners_of(boxes)
    return moved.abs() / (boxes[:, 2:].repeat(1, 2) / 2)


def test_every_group_holds_a_positive_and_a_negative_of_every_cell():
    batch = labels(4, 2, 0)
    queries = denoising()(batch, 30)
    assert queries.num_groups == 20 // 4
    size = queries.content.shape[1] // queries.num_groups
    assert size == 2 * 4
    assert queries.content.shape == (3, queries.num_groups * size, 8)
    assert queries.reference_logits.shape == (3, queries.num_groups * size, 4)
    for image, cells in enumerate((4, 2, 0)):
        indices = queries.target_indices[image].view(queries.num_groups, size)
        positive = queries.positive[image].view(queries.num_groups, size)
        for group in range(queries.num_groups):
            real = indices[group] >= 0
            assert sorted(indices[group][positive[group]].tolist()) == list(range(cells))
            assert sorted(indices[group][~positive[group] & real].tolist()) == list(range(cells))
            assert int((~real).sum()) == size - 2 * cells
    assert not queries.positive[queries.target_indices < 0].any()


@pytest.mark.parametrize("scale", [0.1, 0.4])
def test_positives_stay_near_and_negatives_do_not(scale):
    batch = labels(5, 3)
    queries = denoising(box_noise_scale=scale, denoising_queries=200)(batch, 30)
    for image in range(2):
        near = corner_shifts(queries, batch, image, positive=True)
        far = corner_shifts(queries, batch, image, positive=False)
        # Tolerance: float32 through a logit and back, in halves of a box of 0.1.
        assert near.max() <= scale + 1e-4
        assert far.min() >= scale - 1e-4 and far.max() <= 2 * scale + 1e-4
        # Uniform noise fills its range.
        assert near.max() > 0.9 * scale and near.min() < 0.1 * scale and far.max() > 1.9 * scale


def test_sides_move_both_ways():
    batch = labels(5)
    queries = denoising(denoising_queries=200)(batch, 30)
    slots = slots_of(queries, 0, positive=True)
    boxes = corners_of(batch[0]["boxes"][queries.target_indices[0, slots]])
    outwards = (corners_of(queries.reference_logits[0, slots].sigmoid()) > boxes).float().mean(0)
    # 200 slots a side: five standard deviations of a fair coin are 0.18.
    assert ((outwards - 0.5).abs() < 0.18).all()


def test_without_noise_a_positive_is_the_cell_itself():
    batch = labels(3)
    module = denoising(label_noise_ratio=0.0, box_noise_scale=0.0)
    queries = module(batch, 30)
    target = queries.target_indices[0]
    assert torch.allclose(queries.reference_logits[0], inverse_sigmoid(batch[0]["boxes"])[target], atol=1e-5)
    assert torch.equal(queries.content[0], module.label_embedding(batch[0]["class_labels"][target]))


def test_labels_are_replaced_at_half_the_ratio():
    batch = labels(5, classes=1)
    module = denoising(denoising_queries=2000, num_labels=50)
    queries = module(batch, 30)
    kept = (queries.content[0] == module.label_embedding.weight[0]).all(-1).float().mean().item()
    # A quarter is replaced, one in 50 of these by the same class: 0.755, and 4000 slots give a deviation of 0.007.
    assert kept == pytest.approx(0.755, abs=0.035)


def test_boxes_at_the_border_stay_in_the_image():
    batch = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.05, 0.95, 0.1, 0.1]])}]
    queries = denoising(denoising_queries=100, box_noise_scale=1.0)(batch, 30)
    assert queries.reference_logits.isfinite().all()
    corners = corners_of(queries.reference_logits[0, slots_of(queries, 0, positive=True)].sigmoid())
    assert corners.min() >= -2e-3 and corners.max() <= 1 + 2e-3  # inverse_sigmoid's eps


def test_attention_mask_by_group():
    matching = 6
    queries = denoising(denoising_queries=9)(labels(3, 1), matching)
    noisy, blocked = queries.content.shape[1], queries.attention_mask
    assert queries.num_groups == 3 and blocked.shape == (noisy + matching,) * 2 and blocked.dtype == torch.bool
    group = torch.arange(noisy) // (noisy // 3)
    assert torch.equal(blocked[:noisy, :noisy], group[:, None] != group[None]), "groups see themselves only"
    assert blocked[noisy:, :noisy].all(), "matching queries see no denoising query"
    assert not blocked[:, noisy:].any(), "everyone sees the matching queries"
    assert not blocked.diagonal().any()


def test_nothing_to_denoise():
    assert denoising()(labels(0, 0), 30) is None
    assert denoising(denoising_queries=0)(labels(3), 30) is None


@pytest.mark.parametrize("cells", [1, 7, 20, 400])
def test_number_of_queries_is_bounded(cells):
    queries = denoising(denoising_queries=100)(labels(cells, 1), 30)
    assert queries.num_groups >= 1
    assert queries.content.shape[1] <= 2 * 100
    assert queries.positive[1].sum() == queries.num_groups, "the image with one cell has one positive a group"


def test_seed_decides():
    batch, module = labels(4, 2), denoising()

    def make(seed: int):
        torch.manual_seed(seed)
        return module(batch, 30)

    first, again, other = make(1), make(1), make(2)
    assert torch.equal(first.content, again.content) and torch.equal(first.reference_logits, again.reference_logits)
    assert not torch.equal(first.reference_logits, other.reference_logits)


def test_gradient_reaches_the_class_embedding_only():
    module, batch = denoising(label_noise_ratio=0.0), labels(3)
    queries = module(batch, 30)
    assert queries.content.requires_grad and not queries.reference_logits.requires_grad
    queries.content.sum().backward()
    used = batch[0]["class_labels"].unique()
    assert (module.label_embedding.weight.grad[used] != 0).all()
