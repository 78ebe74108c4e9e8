"""Box geometry and the matching of queries to cells."""

import itertools
import math
import time

import pytest
import torch

from unihema.modeling_unihema.layers import inverse_sigmoid
from unihema.modeling_unihema.matching import generalized_box_iou, match_queries


def random_boxes(*shape: int) -> torch.Tensor:
    """cxcywh inside the unit square."""
    size = torch.rand(*shape, 2) * 0.3 + 0.05
    return torch.cat((size / 2 + torch.rand(*shape, 2) * (1 - size), size), -1)


def random_labels(cells: int, classes: int) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.randint(classes, (cells,)), "boxes": random_boxes(cells)}


def pair_cost(logit: float, box: list[float], target: list[float]) -> float:
    """The cost of one pair, in plain Python from the definition (2, 5, 2; alpha 0.25; gamma 2)."""
    p = 1 / (1 + math.exp(-logit))
    focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
    distance = sum(abs(x - y) for x, y in zip(box, target, strict=True))
    (x1, y1, x2, y2), (u1, v1, u2, v2) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (box, target))
    overlap = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - overlap
    hull = (max(x2, u2) - min(x1, u1)) * (max(y2, v2) - min(y1, v1))
    return 2 * focal + 5 * distance - 2 * (overlap / union - (hull - union) / hull)


def test_overlap_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [3.0, 0.0, 4.0, 1.0], [0.0, 0.0, 2.0, 2.0]])
    generalized = torch.tensor([[1 / 7 - 2 / 9, -(8 - 5) / 8, 1], [0 - (9 - 5) / 9, -(4 - 2) / 4, 1 / 4]])
    assert torch.allclose(generalized_box_iou(a[:, None], b), generalized, atol=1e-6)
    assert torch.allclose(generalized_box_iou(a, b[:2]), generalized.diagonal(), atol=1e-6)


def test_boxes_without_area_have_finite_overlap_and_gradient():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    overlap = generalized_box_iou(point, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    overlap.sum().backward()
    assert overlap.isfinite().all() and point.grad.isfinite().all()


def test_inverse_sigmoid_inverts_and_stays_finite():
    x = torch.tensor([0.01, 0.3, 0.99])
    assert torch.allclose(inverse_sigmoid(x).sigmoid(), x, atol=1e-6)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    assert torch.allclose(ends, math.log(1000) * torch.tensor([-1.0, -1.0, 1.0, 1.0]), atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_cheapest_of_all_assignments(seed):
    torch.manual_seed(seed)
    queries, cells = 5, 3
    logits, boxes = torch.randn(1, queries, 4), random_boxes(1, queries)
    labels = [random_labels(cells, 4)]
    query, cell = match_queries(logits, boxes, labels)[0]

    def total(chosen) -> float:
        return sum(
            pair_cost(
                logits[0, q, labels[0]["class_labels"][c]].item(), boxes[0, q].tolist(), labels[0]["boxes"][c].tolist()
            )
            for q, c in chosen
        )

    best = min(
        total(zip(chosen, range(cells), strict=True)) for chosen in itertools.permutations(range(queries), cells)
    )
    assert sorted(cell.tolist()) == list(range(cells)) and len(set(query.tolist())) == cells
    assert total(zip(query.tolist(), cell.tolist(), strict=True)) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(
    "weights,expected", [((1, 0, 0), 0), ((0, 1, 0), 1), ((0, 0, 1), 2)], ids=["class", "L1", "giou"]
)
def test_each_cost_can_decide(weights, expected):
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.02, 0.02]])}]
    # Query 0 has the class; query 1 the smallest L1 distance, without overlap; query 2 overlaps, but is far too large.
    logits = torch.tensor([[[0.0, 5.0], [0.0, -5.0], [0.0, -5.0]]])
    boxes = torch.tensor([[[0.1, 0.1, 0.02, 0.02], [0.53, 0.5, 0.02, 0.02], [0.5, 0.5, 0.06, 0.06]]])
    query, _ = match_queries(logits, boxes, labels, *weights)[0]
    assert query.tolist() == [expected]


def test_images_are_matched_on_their_own():
    logits, boxes = torch.randn(3, 12, 4), random_boxes(3, 12)
    labels = [random_labels(cells, 4) for cells in (4, 0, 7)]
    together = match_queries(logits, boxes, labels)
    for index in range(3):
        alone = match_queries(logits[index : index + 1], boxes[index : index + 1], labels[index : index + 1])[0]
        assert all(torch.equal(a, b) for a, b in zip(alone, together[index], strict=True))
    assert [len(query) for query, _ in together] == [4, 0, 7]
    assert all(indices.dtype == torch.int64 for pair in together for indices in pair)


def test_more_cells_than_queries():
    query, cell = match_queries(torch.randn(1, 4, 2), random_boxes(1, 4), [random_labels(9, 2)])[0]
    assert query.tolist() == [0, 1, 2, 3] and len(set(cell.tolist())) == 4


def test_low_precision_and_extreme_logits_are_matched():
    logits = torch.full((1, 3, 2), -100.0, dtype=torch.bfloat16)
    logits[0, 1] = 100
    boxes = random_boxes(1, 3)
    labels = [{"class_labels": torch.tensor([0]), "boxes": boxes[0, 1:2]}]
    assert match_queries(logits, boxes.bfloat16(), labels)[0][0].tolist() == [1]


def test_matching_builds_no_graph():
    logits = torch.randn(1, 4, 2, requires_grad=True)
    assert not any(part.requires_grad for part in match_queries(logits, random_boxes(1, 4), [random_labels(2, 2)])[0])


@pytest.mark.parametrize("where", ["logits", "boxes"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_predictions_are_named(where, value):
    predictions = {"logits": torch.randn(2, 4, 2), "boxes": random_boxes(2, 4)}
    predictions[where][1, 2] = value
    with pytest.raises(RuntimeError, match=r"(?s)image 1.*NaN"):
        match_queries(**predictions, labels=[random_labels(2, 2), random_labels(2, 2)])


def test_time_grows_linearly_with_the_batch():
    def seconds(batch: int) -> float:
        logits, boxes = torch.randn(batch, 900, 20), random_boxes(batch, 900)
        labels = [random_labels(400, 20) for _ in range(batch)]
        start = time.process_time()
        match_queries(logits, boxes, labels)
        return time.process_time() - start

    seconds(1)
    # Linear is 4, one matrix over the batch 16.
    assert min(seconds(8) for _ in range(2)) < 8 * min(seconds(2) for _ in range(3))
