"""Mixing of tasks and data sets. The sampler draws batches, each of one task."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from unihema.errors import InputError
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.shards import WINDOW


Key = tuple[str, int, int]
# The first view of a sample in an epoch has the epoch's number; more epochs than this there are not.
VIEWS_APART = 2**32
# For each data set of a task its name and blocks: numbers of samples that are read together.
Sources = Sequence[tuple[str, Sequence[Sequence[int]]]]


class TaskMixer(Sampler[list[Key]]):
    """Batches of `(task, index, view)` keys, each of one task. A sample that comes again within an epoch has another view.

    The schedule is a function of seed and epoch alone, so a run resumes in the middle of an epoch by skipping batches,
    without reading what it skips.

    Args:
        lengths (`Mapping[str, int]`): Task -> number of samples.
        batch_size (`int` or `Mapping[str, int]`): Samples of a batch, for all tasks or each.
        weights (`Mapping[str, float]`, *optional*): Share of batches of a task, relative to the others; tasks left out
            share what the temperature gives them.
        temperature (`float`): Exponent of the sizes: 1 samples tasks by their size, 0 all alike. Below 1, small sets
            are seen more often than once a round.
        steps_per_epoch (`int`, *optional*): Batches of an epoch; by default as many as one pass over everything has.
        seed (`int`): Of the schedule.
        shuffle (`bool`): False: the tasks one after another, their samples in order, each once (evaluation).
        sources (`Mapping[str, Sources]`, *optional*): Task -> its data sets (`SmearDataset.sources`). Without it the samples
            of a task are those of one.
        dataset_weights (`Mapping[str, float]`, *optional*): Share of a task's samples that a data set has, relative to the
            others; those left out share what the temperature gives them.
        dataset_temperature (`float`): Exponent of the sizes of a task's data sets: 1 by size, 0 all alike.
        classes (`Mapping[str, np.ndarray]`, *optional*): Task -> the class of each of its samples (`SmearDataset.classes`).
        class_temperature (`float`): Exponent of the sizes of a data set's classes, where these are given: 1 as many samples of a
            class as there are, 0 all classes equally often.
        one_cell (`Mapping[str, np.ndarray]`, *optional*): Task -> which of its samples are smaller images of one cell
            (`SmearDataset.one_cell`); they get batches of their own.
        one_cell_batch_size (`int`, *optional*): Samples of such a batch; the task's by default.

    Raises:
        ValueError: No task, an empty one, a weight that is negative or of a task or data set that is not there, or fewer
            steps than tasks.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        batch_size: int | Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        sources: Mapping[str, Sources] | None = None,
        dataset_weights: Mapping[str, float] | None = None,
        dataset_temperature: float = 1.0,
        classes: Mapping[str, np.ndarray] | None = None,
        class_temperature: float = 1.0,
        one_cell: Mapping[str, np.ndarray] | None = None,
        one_cell_batch_size: int | None = None,
    ):
        if not lengths:
            raise InputError("No task to mix.")
        empty = [task for task, length in lengths.items() if length < 1]
        if empty:
            raise InputError(f"No samples for {', '.join(empty)}: leave the task out or give it data.")
        weights = _checked_weights(weights, lengths, "tasks")
        sources = dict(sources or {})
        names = dict.fromkeys(name for parts in sources.values() for name, _ in parts)
        dataset_weights = _checked_weights(dataset_weights, names, "data sets")
        self.lengths = dict(lengths)
        sizes = {task: batch_size if isinstance(batch_size, int) else batch_size[task] for task in lengths}
        if min(sizes.values()) < 1:
            raise InputError(f"Batch sizes must be 1 or more: {sizes}.")
        self.batch_sizes = sizes
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.first_step = 0
        self.one_cell = {task: np.asarray(crops) for task, crops in (one_cell or {}).items()}
        self.one_cell_batch_size = one_cell_batch_size
        one_pass = {task: self._batches_of_all(task) for task in lengths}
        self.steps_per_epoch = steps_per_epoch if steps_per_epoch and shuffle else sum(one_pass.values())
        powers = {task: float(length) ** temperature for task, length in lengths.items()}
        total = sum(powers.values())
        shares = {task: weights.get(task, powers[task] / total) for task in lengths}
        plain = temperature == 1.0 and not weights and self.steps_per_epoch == sum(one_pass.values())
        self.steps = one_pass if plain or not shuffle else _allocate(shares, self.steps_per_epoch)
        self._classes = dict(classes or {}) if class_temperature != 1.0 else {}
        self._class_temperature = class_temperature
        by_size = dataset_temperature == 1.0 and not dataset_weights
        self._mixed_sources = {
            task: (parts, self._share_out(task, parts, dataset_weights, dataset_temperature))
            for task, parts in sources.items()
            if shuffle and not (by_size and task not in self._classes and all(len(blocks) == 1 for _, blocks in parts))
        }

    def _batches_of_all(self, task: str) -> int:
        """Batches of one pass over a task."""
        crops = int(self.one_cell[task].sum()) if task in self.one_cell else 0
        counts = {False: self.lengths[task] - crops, True: crops}
        return sum(math.ceil(count / self._batch_size(task, kind)) for kind, count in counts.items())

    def _batch_size(self, task: str, one_cell: bool) -> int:
        return (one_cell and self.one_cell_batch_size) or self.batch_sizes[task]

    def _share_out(self, task: str, parts: Sources, weights: Mapping[str, float], temperature: float) -> dict[int, int]:
        """How many samples of a round come from each data set of a task, by its number."""
        sizes = [sum(map(len, blocks)) for _, blocks in parts]
        powers = [float(size) ** temperature for size in sizes]
        shares = {number: weights.get(name, powers[number] / sum(powers)) for number, (name, _) in enumerate(parts)}
        if not any(shares.values()):
            raise InputError(f"The weights leave {task} without any data set: {dict(weights)}.")
        if temperature == 1.0 and not weights:
            return dict(enumerate(sizes))
        return _allocate(shares, max(self.lengths[task], len(parts)))

    def shares(self) -> dict[str, dict[str, float]]:
        """Task -> data set -> share of the task's samples that are drawn from it; tasks whose data sets are mixed only."""
        return {
            task: {parts[number][0]: count / sum(counts.values()) for number, count in counts.items()}
            for task, (parts, counts) in self._mixed_sources.items()
            if len(parts) > 1
        }

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Chooses the epoch, and the batch to start from when a run is resumed."""
        self.epoch = epoch
        self.first_step = first_step

    def schedule(self, epoch: int) -> list[str]:
        """Task of each batch of an epoch."""
        tasks = [task for task, count in self.steps.items() for _ in range(count)]
        if self.shuffle:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(len(tasks))
            tasks = [tasks[position] for position in order]
        return tasks

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        streams = {task: self._samples(task, number, epoch) for number, task in enumerate(self.lengths)}
        visits: dict[str, Counter[int]] = {task: Counter() for task in self.lengths}
        for step, task in enumerate(self.schedule(epoch)):
            batch = next(streams[task])
            views = []
            for index in batch:
                seen = visits[task][index]
                visits[task][index] += 1
                views.append((task, index, epoch + seen * VIEWS_APART))
            if step >= self.first_step:
                yield views

    def _samples(self, task: str, number: int, epoch: int) -> Iterator[list[int]]:
        """Index lists of one task's batches: round after round of all samples, each round in its own order.

        The last batches of a round are short, as they are in an ordinary loader.
        """
        crops = self.one_cell.get(task)
        seed = [self.seed, epoch, number + 1]
        rounds = self._mixed_rounds(task, seed) if task in self._mixed_sources else self._plain_rounds(task, seed)
        for order in rounds:
            waiting: dict[bool, list[int]] = {}
            for index in order:
                kind = crops is not None and bool(crops[index])
                batch = waiting.setdefault(kind, [])
                batch.append(index)
                if len(batch) == self._batch_size(task, kind):
                    yield waiting.pop(kind)
            yield from waiting.values()

    def _plain_rounds(self, task: str, seed: list[int]) -> Iterator[Iterable[int]]:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        while True:
            order = rng.permutation(self.lengths[task]) if self.shuffle else np.arange(self.lengths[task])
            yield order.tolist()

    def _mixed_rounds(self, task: str, seed: list[int]) -> Iterator[Iterable[int]]:
        """Rounds that draw from each data set by its share, each from where the round before stopped."""
        parts, counts = self._mixed_sources[task]
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        streams = {
            number: self._stream(task, parts[number][1], [*seed, number + 1]) for number in counts if counts[number]
        }
        turns = np.repeat(np.array(list(counts), dtype=np.int32), list(counts.values()))
        while True:
            yield (next(streams[int(number)]) for number in rng.permutation(turns))

    def _stream(self, task: str, blocks: Sequence[Sequence[int]], seed: list[int]) -> Iterator[int]:
        """Endless samples of a data set, with its classes in the shares that the temperature gives them."""
        if task not in self._classes:
            return _shuffled(blocks, seed)
        samples = np.concatenate([np.asarray(block) for block in blocks])
        of_sample = self._classes[task][samples]
        names, sizes = np.unique(of_sample, return_counts=True)
        shares = sizes.astype(float) ** self._class_temperature
        streams = [_shuffled([samples[of_sample == name]], [*seed, int(name) + 1]) for name in names]
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        return (next(streams[rng.choice(len(streams), p=shares / shares.sum())]) for _ in itertools.count())


class MixedSmears(Dataset):
    """Data sets of several tasks behind the keys of a `TaskMixer`.

    Example:

    ```python
    >>> mixer = TaskMixer({task: len(data) for task, data in datasets.items()}, batch_size=4)
    >>> mixed = MixedSmears(datasets)
    >>> loader = DataLoader(mixed, batch_sampler=mixer, collate_fn=mixed.collate)
    ```

    Args:
        datasets (`Mapping[str, SmearDataset]`): Task -> its data.
    """

    def __init__(self, datasets: Mapping[str, SmearDataset]):
        self.datasets = dict(datasets)

    def __len__(self) -> int:
        return sum(map(len, self.datasets.values()))

    def __getitem__(self, key: Key) -> tuple[str, dict[str, Any]]:
        task, index, view = key
        return task, self.datasets[task][index, view]

    def collate(self, samples: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        """Samples of one task to its batch."""
        tasks = {task for task, _ in samples}
        if len(tasks) != 1:
            raise InputError(f"A batch holds one task, got {', '.join(sorted(tasks))}.")
        return self.datasets[tasks.pop()].collate([sample for _, sample in samples])


def _shuffled(blocks: Sequence[Sequence[int]], seed: list[int]) -> Iterator[int]:
    """Endless rounds over all samples. Blocks come in random order, and the samples of `WINDOW` blocks are shuffled together, so
    that no more blocks are in use at once."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    while True:
        order = rng.permutation(len(blocks))
        for start in range(0, len(order), WINDOW):
            window = np.concatenate([np.asarray(blocks[block]) for block in order[start : start + WINDOW]])
            yield from rng.permutation(window).tolist()


def _checked_weights(weights: Mapping[str, float] | None, known: Iterable[str], what: str) -> dict[str, float]:
    weights = dict(weights or {})
    unknown = set(weights) - set(known)
    if unknown:
        raise InputError(f"Weight for {', '.join(sorted(unknown))}, but the {what} are {', '.join(known)}.")
    if any(weight < 0 or not math.isfinite(weight) for weight in weights.values()):
        raise InputError(f"Weights must be 0 or more: {weights}.")
    return weights


def _allocate(shares: Mapping[Any, float], steps: int) -> dict[Any, int]:
    """Whole numbers in proportion to the shares (largest remainder), at least one for each that has any."""
    wanted = [task for task, share in shares.items() if share > 0]
    if steps < len(wanted) or not wanted:
        raise InputError(f"{steps} steps an epoch for {len(wanted)} tasks with a weight: each needs at least one.")
    total = sum(shares.values())
    exact = {task: share / total * steps for task, share in shares.items()}
    counts = {task: max(int(value), 1 if task in wanted else 0) for task, value in exact.items()}
    while sum(counts.values()) != steps:
        if sum(counts.values()) < steps:
            counts[max(wanted, key=lambda task: exact[task] - counts[task])] += 1
        else:
            counts[max((t for t in wanted if counts[t] > 1), key=lambda task: counts[task] - exact[task])] -= 1
    return counts
