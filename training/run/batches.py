"""The batches of a run: the mix of tasks, shared out between processes, from any point of any epoch, and their way to the device.

Between processes each tensor costs a file and a message, and to a GPU a copy, whatever its size. So a batch travels in few and
small ones: pixels as bytes, masks as the sizes of their images, the labels of all images end to end.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from unihema.processing_unihema.image_processing_unihema import UniHemaImageProcessor
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.mixing import MixedSmears, TaskMixer
from unihema.training.run.config import DataConfig


# Names of what stands for masks and shapes on the way.
SIZES, PARTS = "image_sizes", "label_parts"


class ProcessShare(Sampler[list[Any]]):
    """One process's part of every batch.

    Accelerate would give whole batches to processes in turn. Here all processes work on the same task in a step, since
    the detection loss is averaged between them; so each takes every n-th sample of the same large batch.

    Args:
        batches ([`TaskMixer`]): Batches for all processes together.
        process (`int`): Number of this process.
        processes (`int`): How many there are.
    """

    def __init__(self, batches: TaskMixer, process: int, processes: int):
        self.batches = batches
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.batches:
            share = batch[self.process :: self.processes]
            # A short batch may not reach every process; one of its samples then counts twice.
            yield share or [batch[self.process % len(batch)]]


class RunBatches:
    """Batches of a run, endlessly: `stream(n)` starts with batch n of the whole run.

    Args:
        datasets (`Mapping[str, SmearDataset]`): Task -> data.
        config ([`DataConfig`]): Batch sizes, weights, workers.
        seed (`int`): Of the order.
        process (`int`): Number of this process.
        processes (`int`): How many there are.
        pin_memory (`bool`): For an accelerator.
        count (`Callable[[str, Any], dict[str, int]]`, *optional*): Gives of task and labels what is put beside each batch under
            `loss_items`.

    Attributes:
        shares (`dict[str, dict[str, float]]`): Task -> data set -> share of the task's samples.
        per_epoch (`int`): Batches of an epoch.
    """

    def __init__(
        self,
        datasets: Mapping[str, SmearDataset],
        config: DataConfig,
        seed: int,
        process: int = 0,
        processes: int = 1,
        pin_memory: bool = False,
        count: Callable[[str, Any], dict[str, int]] | None = None,
    ):
        self.count = count
        self.mixed = MixedSmears(datasets)
        present = {name for data in datasets.values() for name, _ in data.sources}
        self.mixer = TaskMixer(
            {task: len(data) for task, data in datasets.items()},
            {task: config.batch_size.get(task, 4) * processes for task in datasets},
            weights={task: weight for task, weight in config.task_weights.items() if task in datasets},
            temperature=config.temperature,
            steps_per_epoch=config.steps_per_epoch,
            seed=seed,
            sources={task: data.sources for task, data in datasets.items()},
            # A data set of other tasks has no share of these.
            dataset_weights={name: weight for name, weight in config.dataset_weights.items() if name in present},
            dataset_temperature=config.dataset_temperature,
            classes={task: classes for task, data in datasets.items() if (classes := data.classes) is not None},
            class_temperature=config.class_temperature,
            one_cell={task: data.one_cell for task, data in datasets.items()},
            one_cell_batch_size=config.batch_size.get("single_cell", 4) * processes,
        )
        self.shares = self.mixer.shares()
        self.per_epoch = len(self.mixer)
        self.loader = DataLoader(
            self.mixed,
            batch_sampler=ProcessShare(self.mixer, process, processes),
            collate_fn=self._collate,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            pin_memory=pin_memory,
            # Its own generator: starting an epoch must not move the random numbers of the model.
            generator=torch.Generator().manual_seed(seed),
        )

    def _collate(self, samples: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        batch = self.mixed.collate(samples)
        batch["file_names"] = [sample["file_name"] for _, sample in samples]
        if self.count is not None:
            batch["loss_items"] = self.count(batch["task"], batch["labels"])
        return pack(batch)

    def stream(self, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number within the run and content, for [`unpack`], of every batch from `start` on."""
        epoch, first = divmod(start, self.per_epoch)
        number = start
        while True:
            self.mixer.set_epoch(epoch, first)
            for batch in self.loader:
                yield number, batch
                number += 1
            epoch, first = epoch + 1, 0

    def close(self) -> None:
        """Ends the workers, once no stream is read any more."""
        self.loader = None


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of [`SmearDataset`] for its way between processes and to the device; [`unpack`] undoes it.

    Args:
        batch (`dict[str, Any]`): As `SmearDataset.collate` gives it.
    """
    packed = dict(batch)
    if "pixel_mask" in packed:
        mask = packed.pop("pixel_mask")
        # 1 on the image, at the upper left.
        packed[SIZES] = torch.stack((mask[:, :, 0].sum(1), mask[:, 0].sum(1)), 1)
    labels = packed.get("labels")
    if isinstance(labels, list):
        names = dict.fromkeys(name for image in labels for name in image)
        # Image by image the shape of each label, or None where it has none.
        packed[PARTS] = {
            name: [tuple(image[name].shape) if name in image else None for image in labels] for name in names
        }
        packed["labels"] = {
            name: torch.cat([image[name].flatten() for image in labels if name in image]) for name in names
        }
    elif batch.get("task") == "segmentation":
        # 0, 1 and -100.
        packed["labels"] = labels.to(torch.int8)
    return packed


class OnHost(Sequence):
    """A list that `DistributedDataParallel` does not go through, so that its tensors are not copied to the device.

    Args:
        items (`list`): Its items.
    """

    def __init__(self, items: list[Any]):
        self._items = items

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)


def unpack(
    packed: dict[str, Any], device: torch.device, image_processor: UniHemaImageProcessor, truth_on_host: bool = False
) -> dict[str, Any]:
    """A batch as the model takes it; the host waits for nothing if the batch lies in pinned memory.

    Args:
        packed (`dict[str, Any]`): Of [`pack`].
        device (`torch.device`): Where the model is, and all tensors will be.
        image_processor ([`UniHemaImageProcessor`]): Makes of bytes what the model sees.
        truth_on_host (`bool`): Leave out of that the labels, and the mask of padding, which is left out where there is none: our
            models read them, and would wait for what the device has.
    """
    parts, sizes = packed.get(PARTS), packed.get(SIZES)
    here = {name: value for name, value in packed.items() if name not in (PARTS, SIZES, "labels")}
    batch = {name: _moved(value, device) for name, value in here.items()}
    if "labels" in packed:
        labels = packed["labels"] if truth_on_host else _moved(packed["labels"], device)
        if parts is not None:
            labels = _images_of(labels, parts)
        batch["labels"] = OnHost(labels) if parts is not None and truth_on_host else labels
        if batch.get("task") == "segmentation" and not truth_on_host:
            batch["labels"] = labels.long()
    if sizes is not None:
        height, width = packed["pixel_values"].shape[-2:]
        mask = _mask(_moved(sizes, device), height, width)
        if batch["pixel_values"].dtype == torch.uint8:
            batch["pixel_values"] = image_processor.normalise(batch["pixel_values"], mask)
        if not truth_on_host:
            batch["pixel_mask"] = mask
        elif any(size != [height, width] for size in sizes.tolist()):
            batch["pixel_mask"] = _mask(sizes, height, width)
    return batch


def _mask(sizes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows, columns = (torch.arange(side, device=sizes.device) for side in (height, width))
    return ((rows[:, None] < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])).long()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _moved(inner, device) for name, inner in value.items()}
    return value


def _images_of(
    flat: Mapping[str, torch.Tensor], parts: Mapping[str, Sequence[tuple[int, ...] | None]]
) -> list[dict[str, torch.Tensor]]:
    images: list[dict[str, torch.Tensor]] = [{} for _ in next(iter(parts.values()))]
    for name, shapes in parts.items():
        there = [(image, shape) for image, shape in zip(images, shapes, strict=True) if shape is not None]
        pieces = flat[name].split([math.prod(shape) for _, shape in there])
        for (image, shape), piece in zip(there, pieces, strict=True):
            image[name] = piece.view(shape)
    return images
