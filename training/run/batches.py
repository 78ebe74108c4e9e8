"""The batches of a run: the mix of tasks, shared out between processes, from any point of any epoch."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from unihema.training.data.dataset import SmearDataset
from unihema.training.data.mixing import MixedSmears, TaskMixer
from unihema.training.run.config import DataConfig


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
    """

    def __init__(
        self,
        datasets: Mapping[str, SmearDataset],
        config: DataConfig,
        seed: int,
        process: int = 0,
        processes: int = 1,
        pin_memory: bool = False,
    ):
        self.mixed = MixedSmears(datasets)
        self.mixer = TaskMixer(
            {task: len(data) for task, data in datasets.items()},
            {task: config.batch_size.get(task, 4) * processes for task in datasets},
            weights={task: weight for task, weight in config.task_weights.items() if task in datasets},
            temperature=config.temperature,
            steps_per_epoch=config.steps_per_epoch,
            seed=seed,
            sources={task: data.sources for task, data in datasets.items()},
            dataset_weights=config.dataset_weights,
            dataset_temperature=config.dataset_temperature,
            one_cell={task: data.one_cell for task, data in datasets.items()},
            one_cell_batch_size=config.batch_size.get("single_cell", 4) * processes,
        )
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
        return batch

    def stream(self, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number within the run and content of every batch from `start` on."""
        epoch, first = divmod(start, self.per_epoch)
        number = start
        while True:
            self.mixer.set_epoch(epoch, first)
            for batch in self.loader:
                yield number, batch
                number += 1
            epoch, first = epoch + 1, 0
