"""Masks as run lengths and polygons: the same pixels come back."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unihema.processing_unihema.masks import mask_polygons, rle_decode, rle_encode
from unihema.results.smear_result import Cell


def masks():
    rng = np.random.default_rng(0)
    ring = np.ones((7, 9), bool)
    ring[2:5, 3:6] = False
    ring[3, 4] = True  # an island in the hole
    checkerboard = np.indices((5, 6)).sum(0) % 2 == 0
    return {
        "ring": ring,
        "checkerboard": checkerboard,
        "noise": rng.random((30, 40)) < 0.5,
        "full": np.ones((3, 4), bool),
        "empty": np.zeros((3, 4), bool),
        "pixel": np.ones((1, 1), bool),
    }


def ring_area(ring):
    x, y = np.array(ring, dtype=float).T
    return abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2


@pytest.mark.parametrize("name", masks())
def test_polygons_cover_exactly_the_mask(name):
    mask = masks()[name]
    scale = 4
    drawn = Image.new("L", (mask.shape[1] * scale, mask.shape[0] * scale))
    for polygon in mask_polygons(mask):
        assert all(ring[0] == ring[-1] and len(ring) >= 5 for ring in polygon)
        for place, ring in enumerate(polygon):
            corners = [(scale * x - 0.5, scale * y - 0.5) for x, y in ring]
            ImageDraw.Draw(drawn).polygon(corners, fill=255 if place == 0 else 0)
    # Later polygons are drawn over the holes of earlier ones, so an island in a hole stays.
    assert (np.asarray(drawn)[scale // 2 :: scale, scale // 2 :: scale] > 0).tolist() == mask.tolist()
    area = sum(ring_area(rings[0]) - sum(map(ring_area, rings[1:])) for rings in mask_polygons(mask))
    assert area == mask.sum()


@pytest.mark.parametrize("name", masks())
def test_run_lengths_are_those_of_coco(name):
    from faster_coco_eval.core import mask as coco_mask

    mask = masks()[name]
    code = rle_encode(mask)
    assert (rle_decode(code) == mask).all()
    assert (coco_mask.decode(coco_mask.frPyObjects(code, *mask.shape)) == mask).all()


def test_runs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="add up to 5 pixels, but its size is 2 x 3"):
        rle_decode({"size": [2, 3], "counts": [2, 3]})


@pytest.mark.parametrize("left, top", [(7, 3), (100_000.0, 60_000.0), (-2, 0)])
def test_a_cell_moves_with_its_mask(left, top):
    mask = np.random.default_rng(0).random((7, 9)) < 0.5
    # Its right edge is a whole pixel but for rounding, which goes with larger numbers.
    cell = Cell(1, (2.25, 3.5, 10.999999999999998, 10.0), "A", 0.5, {}, mask)
    moved = cell.placed(left, top)
    assert moved.box == pytest.approx((2.25 + left, 3.5 + top, 11 + left, 10 + top))
    assert moved.mask.sum() == mask.sum() and (moved.mask == mask).all()
    assert moved.placed(-left, -top).mask.tolist() == mask.tolist()


def test_a_cell_of_a_reduced_image_grows_with_its_mask():
    mask = np.eye(4, dtype=bool)
    cell = Cell(1, (2, 3, 6, 7), "A", 0.5, {}, mask).placed(0, 0, (2.5, 2.5))
    assert cell.box == (5, 7.5, 15, 17.5) and cell.mask.shape == (11, 10)
    assert cell.mask.sum() == pytest.approx(4 * 2.5**2, rel=0.1)
    assert Cell(1, (5, 5, 5, 5), "A", 0.5, {}, np.zeros((0, 0), bool)).placed(1.5, 0, (3, 3)).mask.shape == (0, 1)
