"""Mosaics of fields: boxes and masks stay on their cells, and nothing is cut off unsaid."""

import numpy as np
import pytest
import torch
from PIL import Image

from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.augmentation import AugmentationConfig
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.mosaic import GRIDS, MOST_CELLS, Field, mosaic_of, share_seen


def field(shade, boxes, size=(96, 128)):
    """A field whose cells have the shade of the field."""
    image = torch.full((3, *size), 250, dtype=torch.uint8)
    instances = torch.zeros(size, dtype=torch.int32)
    for number, (x, y, w, h) in enumerate(boxes, 1):
        image[:, y : y + h, x : x + w] = shade
        instances[y : y + h, x : x + w] = number
    row = {"dataset": "lab", "objects": {"bbox": [list(box) for box in boxes], "category": ["RBC"] * len(boxes)}}
    return Field(row, image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), instances)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_boxes_and_masks_are_exact(grid, share):
    rng = np.random.default_rng(0)
    fields = [
        field(20 * number, [(8, 8, 32, 24), (60, 40, 24, 32), (100, 70, 28, 26)])
        for number in range(1, grid[0] * grid[1] + 1)
    ]
    mosaic, numbers = mosaic_of(fields, grid, share, (96, 128), rng, 0.5)
    assert mosaic.image.shape == (3, 96, 128) and len(mosaic.boxes) == len(numbers)
    assert len(mosaic.row["objects"]["bbox"]) == 3 * len(fields)
    for box, number in zip(mosaic.boxes, numbers, strict=True):
        if mosaic.row["objects"]["iscrowd"][number] and min(box[2:]) < 3:
            continue
        inside = (mosaic.instances == number + 1).nonzero()
        low, high = inside.min(0).values, inside.max(0).values + 1
        found = torch.tensor([low[1], low[0], high[1] - low[1], high[0] - low[0]])
        # Nearest pixels of a mask that was made smaller.
        assert (found - box).abs().max() <= 1.0
        x, y, w, h = box.tolist()
        middle = mosaic.image[0, int(y + h / 2), int(x + w / 2)]
        assert middle == 20 * (number // 3 + 1)
    if share == 1.0:
        # Nothing is cut by a seam but what the tile's proportions cut.
        whole = mosaic_of(fields, grid, 1.0, (grid[0] * 96, grid[1] * 128), rng, 0.5)[0]
        assert len(whole.boxes) == 3 * len(fields)
        assert sorted({tuple(box) for box in whole.boxes[:, 2:].tolist()}) == [(24, 32), (28, 26), (32, 24)]


def test_what_a_seam_cuts_in_half_is_neither_target_nor_background():
    cells = field(40, [(0, 0, 20, 20)])
    empty = field(60, [])
    seen = set()
    for seed in range(60):
        mosaic, _ = mosaic_of([cells, empty], (1, 2), 0.7, (96, 128), np.random.default_rng(seed), 0.5)
        assert len(mosaic.row["objects"]["iscrowd"]) == 1
        for x, y, w, h in mosaic.boxes.tolist():
            assert x >= 0 and y >= 0 and x + w <= 64 + 1e-3 and y + h <= 96 + 1e-3
            # A cell of 20 pixels is magnified by 1 / 0.7.
            part = w * h * 0.7**2 / 400
            assert (part < 0.51) if mosaic.row["objects"]["iscrowd"][0] else (part > 0.49)
        seen.add((len(mosaic.boxes), mosaic.row["objects"]["iscrowd"][0]))
    assert seen == {(0, 0), (1, 0), (1, 1)} and "iscrowd" not in cells.row["objects"]


def test_no_mosaic_has_more_cells_than_queries():
    assert share_seen([10] * 4, (2, 2), 0.0) == 0.5 and share_seen([10] * 4, (2, 2), 1.0) == 1.0
    # Half of either field is seen, as large as it is.
    assert share_seen([10] * 2, (1, 2), 0.0) == share_seen([10] * 2, (1, 2), 1.0) == 1.0
    assert share_seen([400] * 2, (1, 2), 0.0) == pytest.approx((MOST_CELLS / 400) ** 0.5)
    share = share_seen([300] * 9, (3, 3), 1.0)
    assert sum([300] * 9) * share**2 == pytest.approx(MOST_CELLS)


@pytest.fixture(scope="module")
def data():
    rows = []
    for number in range(6):
        one = field(30 + 20 * number, [(8, 8, 32, 24), (60, 40, 24, 32)])
        rows.append(
            one.row
            | {
                "image": Image.fromarray(one.image.permute(1, 2, 0).contiguous().numpy()),
                "file_name": f"{number}.png",
                "task": "detection",
                "size": (128, 96),
                "annotated_classes": ["RBC", "WBC"] if number < 3 else ["RBC"],
            }
        )
        rows[-1]["objects"] = rows[-1]["objects"] | {"iscrowd": [0, 1]}
    config = AugmentationConfig.none()
    config.mosaic, config.flip, config.transpose = 1.0, 0.5, 0.5
    processor = UniHemaProcessor.from_default(detection={"longest_edge": 128})
    return SmearDataset(rows, processor, "detection", config, class_names=["RBC", "WBC"], name_classes=True)


def test_fields_that_were_annotated_alike_are_put_together(data):
    shades = set()
    for epoch in range(30):
        sample = data[0, epoch]
        image = sample["image"][0]
        for cell in sample["annotations"]["annotations"]:
            x, y, w, h = cell["bbox"]
            shades.add(int(image[int(y + h / 2), int(x + w / 2)]))
        assert sample["annotated_classes"] == ["RBC", "WBC"]
    # Shades of cells smaller than a few pixels are mixed with their surroundings.
    assert {30, 50, 70} <= shades and not {90, 110, 130} & shades
    assert torch.equal(data[0, 5]["image"], data[0, 5]["image"])


def test_regions_to_ignore_come_along(data):
    batch = data.collate([data[index, 0] for index in range(4)])
    assert batch["pixel_values"].shape[0] == 4
    labels = [image for image in batch["labels"] if "ignored_boxes" in image]
    assert labels and all(image["ignored_boxes"].shape == (len(image["ignored_classes"]), 4) for image in labels)
    assert all(((image["ignored_boxes"] >= 0) & (image["ignored_boxes"] <= 1)).all() for image in labels)
