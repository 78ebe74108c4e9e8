"""The way of a batch from its loader to the model: small and in few pieces, and the same when it arrives."""

import pickle

import pytest
import torch
from tiny_runs import TASKS, run_config
from torch.distributed.utils import _recursive_to

from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.augmentation import AugmentationConfig
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.rows import class_names, morphology_schema, single_cell_names
from unihema.training.run.batches import OnHost, RunBatches, pack, unpack
from unihema.training.run.build import training_rows
from unihema.training.run.config import DataConfig


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def datasets(smears, tmp_path_factory):
    """Task -> its data with pixels as bytes, and as they were made before."""
    rows = training_rows(run_config(smears, tmp_path_factory.mktemp("run")))
    processor = UniHemaProcessor.from_default(**{task: {"longest_edge": 64} for task in TASKS})
    names = {
        "class_names": class_names(rows["detection"]),
        "single_cell_labels": single_cell_names(rows["single_cell"]),
        "morphology": morphology_schema(rows["detection"]),
    }
    # Of one of two images it is known which classes it has.
    for number, row in enumerate(rows["detection"]):
        row["annotated_classes"] = names["class_names"][: number % 2] or None
    return {
        task: [
            SmearDataset(
                rows[task], processor, task, AugmentationConfig.for_task(task), **names, pixels_as_bytes=as_bytes
            )
            for as_bytes in (True, False)
        ]
        for task in TASKS
    }


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, OnHost)) else ()
    return [tensor for each in inner for tensor in tensors(each)]


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_arrives_as_the_processor_made_it(datasets, task):
    of_bytes, plain = datasets[task]
    for epoch in range(3):
        packed = pack(of_bytes.collate([of_bytes[index, epoch] for index in (0, 1)]))
        expected = plain.collate([plain[index, epoch] for index in (0, 1)])
        sent = tensors(pickle.loads(pickle.dumps(packed)))
        assert len(sent) <= 15 and sum(each.nbytes for each in sent) < 0.3 * sum(
            each.nbytes for each in tensors(expected)
        )
        found = unpack(packed, CPU, of_bytes.processor.image_processor)
        assert found.keys() == expected.keys() and found.keys() >= {"labels", "pixel_values", "pixel_mask"}
        assert found.pop("task") == expected.pop("task") == task
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        on_host = unpack(packed, CPU, of_bytes.processor.image_processor, truth_on_host=True)
        if bool(expected["pixel_mask"].all()):
            assert on_host.pop("pixel_mask", None) is None
            expected.pop("pixel_mask")
        assert on_host.pop("task") == task
        if task == "detection":
            on_host["labels"] = list(on_host["labels"])
        torch.testing.assert_close(on_host, expected, rtol=0, atol=1e-6, check_dtype=task != "segmentation")


@pytest.mark.parametrize("truth_on_host", [False, True])
def test_nothing_is_read_back_from_the_device(datasets, truth_on_host):
    """A meta tensor has no values: reading one is an error."""
    for task in TASKS:
        data = datasets[task][0]
        packed, device = pack(data.collate([data[0, 1], data[1, 1]])), torch.device("meta")
        batch = unpack(packed, device, data.processor.image_processor, truth_on_host)
        assert batch["pixel_values"].device == device and batch["pixel_values"].dtype == torch.float32
        truth = tensors(batch["labels"])
        assert {each.device for each in truth} == {torch.device("cpu") if truth_on_host else device}
        assert batch.get("pixel_mask", truth[0]).device == truth[0].device


def test_truth_on_the_host_stays_there_under_distributed_training(datasets):
    data = datasets["detection"][0]
    packed, device = pack(data.collate([data[0, 1], data[1, 1]])), torch.device("meta")
    batch = unpack(packed, device, data.processor.image_processor, truth_on_host=True)
    # Private: what `DistributedDataParallel` does with its arguments on a GPU.
    for labels, place in ((batch["labels"], CPU), (list(batch["labels"]), device)):
        sent = _recursive_to((labels,), device, use_side_stream_for_tensor_copies=False)
        assert {each.device for each in tensors(sent)} == {place}


def test_images_without_cells_arrive_without(datasets):
    images = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2
    batch = {"task": "detection", "labels": images}
    found = unpack(pack(batch), CPU, datasets["detection"][0].processor.image_processor)
    torch.testing.assert_close(found["labels"], images, rtol=0, atol=0)


def test_what_losses_divide_by_is_counted_where_batches_are_made(datasets):
    data = {"detection": datasets["detection"][0]}
    config = DataConfig(batch_size={"detection": 2}, workers=0)
    batches = RunBatches(data, config, seed=0, count=lambda task, labels: {task: len(labels)})
    _, batch = next(batches.stream())
    assert batch["loss_items"] == {"detection": 2}
    assert "loss_items" not in next(RunBatches(data, config, seed=0).stream())[1]
