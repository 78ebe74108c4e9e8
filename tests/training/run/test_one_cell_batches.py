"""Crops of one cell beside fields in detection: their size, their batches, and a view that keeps the cell."""

import numpy as np
import pytest
from PIL import Image

from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.augmentation import AugmentationConfig
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.mixing import TaskMixer
from unihema.training.data.shards import JoinedRows, one_cell_samples
from unihema.training.run.batches import RunBatches
from unihema.training.run.config import DataConfig


ATTRIBUTES = {"granularity": ["no", "yes"]}


def row(number: int, one_cell: bool) -> dict:
    side = 120
    picture = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
    box = [0.0, 0.0, side, side] if one_cell else [30.0, 30.0, 20.0, 20.0]
    made = {
        "image": Image.fromarray(picture),
        "file_name": f"{number}.png",
        "dataset": "cells" if one_cell else "fields",
        "task": "detection",
        "objects": {"bbox": [box], "category": ["WBC"], "morphology": [{"granularity": "yes"} if one_cell else {}]},
        "annotated_classes": ["WBC"],
    }
    return made | ({"from_attributes": True} if one_cell else {})


@pytest.fixture(scope="module")
def processor() -> UniHemaProcessor:
    return UniHemaProcessor.from_default(detection={"longest_edge": 96}, single_cell={"longest_edge": 64})


@pytest.fixture
def rows() -> list[dict]:
    return [row(number, number % 2 == 0) for number in range(14)]


def dataset(rows, processor, **options) -> SmearDataset:
    return SmearDataset(rows, processor, "detection", class_names=["WBC"], morphology=ATTRIBUTES, **options)


def test_a_crop_has_the_size_of_a_single_cell_and_a_field_that_of_detection(rows, processor):
    data = dataset(rows, processor)
    sizes = processor.image_processor.task_sizes
    crop, field = data.collate([data[0], data[2]]), data.collate([data[1], data[3]])
    assert max(crop["pixel_values"].shape[-2:]) == sizes["single_cell"]["longest_edge"]
    assert max(field["pixel_values"].shape[-2:]) == sizes["detection"]["longest_edge"]
    assert [labels["boxes_known"].tolist() for labels in crop["labels"]] == [[False], [False]]
    with pytest.raises(ValueError, match=r"A batch holds fields or crops of one cell \(SmearDataset.one_cell\)"):
        data.collate([data[0], data[1]])


def test_batches_of_a_run_hold_one_kind_each_in_its_own_number(rows, processor):
    data = dataset(rows, processor)
    batches = RunBatches(
        {"detection": data}, DataConfig(batch_size={"detection": 2, "single_cell": 3}, workers=0), seed=0
    )
    assert batches.per_epoch == 4 + 3
    stream, seen = batches.stream(), []
    for _, batch in (next(stream) for _ in range(batches.per_epoch)):
        names = batch["file_names"]
        kinds = {int(name.removesuffix(".png")) % 2 == 0 for name in names}
        assert len(kinds) == 1 and len(names) <= (3 if kinds == {True} else 2)
        seen += names
    assert sorted(seen) == sorted(one["file_name"] for one in rows)


def test_shares_of_data_sets_are_those_of_samples(rows):
    crops = one_cell_samples(rows)
    parts = [("cells", [np.flatnonzero(crops)]), ("fields", [np.flatnonzero(~crops)])]
    mixer = TaskMixer(
        {"detection": len(rows)},
        2,
        steps_per_epoch=400,
        sources={"detection": parts},
        dataset_weights={"cells": 10.0, "fields": 4.0},
        one_cell={"detection": crops},
        one_cell_batch_size=6,
    )
    drawn = [index for batch in mixer for _, index, _ in batch]
    assert crops[drawn].mean() == pytest.approx(10 / 14, abs=0.01)


def test_rows_not_in_memory_are_known_by_the_rows_of_their_index(rows):
    crops, fields = (
        [one for one in rows if "from_attributes" in one],
        [one for one in rows if "from_attributes" not in one],
    )
    joined = JoinedRows([crops, fields])
    assert one_cell_samples(joined).tolist() == [True] * len(crops) + [False] * len(fields)


def test_no_view_leaves_the_one_cell_out(processor):
    close = AugmentationConfig(zoom=1.0, zoom_min=0.1)
    crops, fields = (dataset([row(1, kind)], processor, augmentation=close) for kind in (True, False))
    assert all(len(crops[0, epoch]["annotations"]["annotations"]) == 1 for epoch in range(40))
    assert not all(len(fields[0, epoch]["annotations"]["annotations"]) == 1 for epoch in range(40))
