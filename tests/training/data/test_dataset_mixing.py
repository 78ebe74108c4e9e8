"""Data sets within a task: shares as asked, every sample in its turn, and blocks that stay together."""

from collections import Counter

import numpy as np
import pytest

from unihema.training.data.mixing import TaskMixer
from unihema.training.data.shards import WINDOW
from unihema.training.run.batches import ProcessShare


SIZES = {"large": 900, "small": 100}
LENGTHS = {"detection": 1000, "segmentation": 20}
SOURCES = {
    "detection": [("large", [range(900)]), ("small", [range(900, 1000)])],
    "segmentation": [("masks", [range(20)])],
}


def mixer(**options) -> TaskMixer:
    return TaskMixer(LENGTHS, 10, seed=3, sources=SOURCES, **options)


def drawn(mixed: TaskMixer, task: str = "detection") -> list[int]:
    return [index for batch in mixed for name, index, _ in batch if name == task]


def shares(mixed: TaskMixer) -> Counter:
    return Counter("small" if index >= SIZES["large"] else "large" for index in drawn(mixed))


def test_by_size_the_order_is_that_without_data_sets():
    assert list(mixer()) == list(TaskMixer(LENGTHS, 10, seed=3))


@pytest.mark.parametrize(
    ("options", "small"),
    [
        ({"dataset_temperature": 0.0}, 500),
        # Square roots: 30 to 10.
        ({"dataset_temperature": 0.5}, 250),
        ({"dataset_weights": {"small": 3, "large": 1}}, 750),
        ({"dataset_weights": {"large": 0}}, 1000),
        # Weights and what the temperature gives add up: 0.9 of a part beside 0.1.
        ({"dataset_weights": {"small": 0.9}}, 500),
    ],
)
def test_temperature_and_weights(options, small):
    assert shares(mixer(**options)) == Counter(
        {"small": small, "large": 1000 - small} if small < 1000 else {"small": small}
    )
    assert len(drawn(mixer(**options), "segmentation")) == 20


def test_every_sample_in_its_turn():
    counts = Counter(index for index in drawn(mixer(dataset_temperature=0.0)) if index >= 900)
    assert set(counts) == set(range(900, 1000)) and set(counts.values()) == {5}
    large = Counter(index for index in drawn(mixer(dataset_temperature=0.0)) if index < 900)
    assert set(large.values()) == {1}
    mixed = mixer(dataset_temperature=0.0)
    first = set(drawn(mixed))
    mixed.set_epoch(1)
    assert len(first | set(drawn(mixed))) > len(first), "another part of the large set in the next epoch"


def test_a_schedule_of_seed_and_epoch_that_resumes_anywhere():
    whole = mixer(dataset_temperature=0.3)
    whole.set_epoch(2)
    batches = list(whole)
    again = mixer(dataset_temperature=0.3)
    for first in (0, 1, 57):
        again.set_epoch(2, first)
        assert list(again) == batches[first:]
    again.set_epoch(3)
    assert list(again) != batches


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one_order(processes):
    together = [ProcessShare(mixer(dataset_temperature=0.3), process, processes) for process in range(processes)]
    for batch, *parts in zip(mixer(dataset_temperature=0.3), *together):
        assert sorted(key for part in parts for key in part) == sorted(batch)


def test_samples_of_a_window_of_blocks_stay_together():
    blocks = [range(start, start + 4) for start in range(0, 4 * 5 * WINDOW, 4)]
    total = len(blocks) * 4
    mixed = TaskMixer({"detection": total}, 8, seed=1, sources={"detection": [("stored", blocks)]})
    order = drawn(mixed)
    assert sorted(order) == list(range(total))
    for start in range(0, total, 4 * WINDOW):
        window = order[start : start + 4 * WINDOW]
        assert len({index // 4 for index in window}) == WINDOW
        assert window != sorted(window)
    # Which blocks share a window is drawn anew.
    mixed.set_epoch(1)
    assert {index // 4 for index in drawn(mixed)[: 4 * WINDOW]} != {index // 4 for index in order[: 4 * WINDOW]}


def test_blocks_and_shares_together():
    blocks = [range(start, start + 3) for start in range(0, 30, 3)]
    sources = {"detection": [("stored", blocks), ("small", [range(30, 33)])]}
    counts = Counter(drawn(TaskMixer({"detection": 33}, 4, sources=sources, dataset_temperature=0.0)))
    assert sum(count for index, count in counts.items() if index >= 30) in (16, 17)
    by_size = Counter(drawn(TaskMixer({"detection": 33}, 4, sources=sources)))
    assert set(by_size.values()) == {1} and len(by_size) == 33


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset_weights": {"other": 1}}, "Weight for other, but the data sets are large, small, masks"),
        ({"dataset_weights": {"small": -1}}, "Weights must be 0 or more"),
        ({"dataset_weights": {"small": float("nan")}}, "Weights must be 0 or more"),
        ({"dataset_weights": {"masks": 0}}, "The weights leave segmentation without any data set"),
    ],
)
def test_impossible_shares(options, words):
    with pytest.raises(ValueError, match=words):
        mixer(**options)


def test_evaluation_order_is_plain():
    mixed = TaskMixer(LENGTHS, 10, shuffle=False, sources=SOURCES, dataset_temperature=0.0)
    assert drawn(mixed) == list(np.arange(1000))
