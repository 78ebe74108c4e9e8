"""Mixing: one task a batch, shares as asked, and a schedule that a resumed run finds again."""

from collections import Counter

import pytest

from unihema.training.data.mixing import MixedSmears, TaskMixer


LENGTHS = {"detection": 40, "segmentation": 8, "single_cell": 160}


def test_one_pass_sees_everything_once():
    mixer = TaskMixer(LENGTHS, 4, seed=3)
    batches = list(mixer)
    assert len(batches) == len(mixer) == 52
    assert all(len({task for task, _, _ in batch}) == 1 for batch in batches)
    seen = Counter((task, index) for batch in batches for task, index, _ in batch)
    assert set(seen.values()) == {1}
    assert Counter(task for task, _ in seen) == LENGTHS


def test_schedule_is_a_function_of_seed_and_epoch():
    first, second = TaskMixer(LENGTHS, 4, seed=3), TaskMixer(LENGTHS, 4, seed=3)
    list(first)
    for mixer in (first, second):
        mixer.set_epoch(2)
    assert list(first) == list(second)
    assert first.schedule(0) != first.schedule(1)
    assert TaskMixer(LENGTHS, 4, seed=4).schedule(0) != first.schedule(0)
    assert {epoch for batch in first for _, _, epoch in batch} == {2}


def test_resuming_skips_exactly_what_was_done():
    mixer = TaskMixer(LENGTHS, {"detection": 2, "segmentation": 4, "single_cell": 16}, temperature=0.5, seed=1)
    mixer.set_epoch(1)
    whole = list(mixer)
    mixer.set_epoch(1, first_step=7)
    assert len(mixer) == len(whole) - 7
    assert list(mixer) == whole[7:]


def test_a_sample_that_comes_again_has_another_view_also_when_resumed():
    arguments = {"lengths": {"single_cell": 5}, "batch_size": 2, "steps_per_epoch": 20, "seed": 1}
    mixer = TaskMixer(**arguments)
    mixer.set_epoch(3)
    whole = list(mixer)
    keys = [key for batch in whole for key in batch]
    assert len(keys) > 30 and len(set(keys)) == len(keys)
    first = {index: view for _, index, view in reversed(keys)}
    assert set(first.values()) == {3}
    mixer.set_epoch(3, first_step=11)
    assert list(mixer) == whole[11:]


def test_temperature_and_weights():
    by_size = TaskMixer(LENGTHS, 4, steps_per_epoch=104).steps
    alike = TaskMixer(LENGTHS, 4, temperature=0.0, steps_per_epoch=99).steps
    assert by_size == {"detection": 20, "segmentation": 4, "single_cell": 80}
    assert alike == {"detection": 33, "segmentation": 33, "single_cell": 33}
    weighted = TaskMixer(LENGTHS, 4, weights={"detection": 2, "segmentation": 1, "single_cell": 1}, steps_per_epoch=80)
    assert weighted.steps == {"detection": 40, "segmentation": 20, "single_cell": 20}
    assert Counter(weighted.schedule(5)) == weighted.steps
    without = TaskMixer(LENGTHS, 4, weights={"detection": 1, "segmentation": 0, "single_cell": 1}, steps_per_epoch=10)
    assert without.steps["segmentation"] == 0
    assert len(list(without)) == 10


def test_shares_of_data_sets_are_told():
    """A weight is a share, as those of the sets without one are: beside one of 3 they have little."""
    sources = {"detection": [("a", [range(25)]), ("b", [range(25, 50)]), ("c", [range(50, 100)])]}
    mixer = TaskMixer({"detection": 100}, 4, sources=sources, dataset_weights={"a": 3.0})
    assert mixer.shares() == {
        "detection": {"a": 0.8, "b": pytest.approx(0.07, abs=0.01), "c": pytest.approx(0.13, abs=0.01)}
    }
    assert TaskMixer({"detection": 100}, 4, sources=sources).shares() == {}


def test_small_tasks_are_repeated_round_by_round():
    mixer = TaskMixer(LENGTHS, 4, temperature=0.0, steps_per_epoch=60)
    indices = [index for batch in mixer for task, index, _ in batch if task == "segmentation"]
    assert len(indices) == 80
    for start in range(0, 80, 8):
        assert sorted(indices[start : start + 8]) == list(range(8))


def test_evaluation_order():
    batches = list(TaskMixer({"detection": 3, "cloze": 2}, 2, shuffle=False))
    assert batches == [
        [("detection", 0, 0), ("detection", 1, 0)],
        [("detection", 2, 0)],
        [("cloze", 0, 0), ("cloze", 1, 0)],
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lengths": {}}, "No task"),
        ({"lengths": {"cloze": 0}}, "No samples for cloze"),
        ({"lengths": LENGTHS, "weights": {"cloze": 1}}, "Weight for cloze, but the tasks are detection"),
        ({"lengths": LENGTHS, "weights": {"detection": -1}}, "0 or more"),
        ({"lengths": LENGTHS, "steps_per_epoch": 2}, "2 steps an epoch for 3 tasks"),
        ({"lengths": LENGTHS, "batch_size": 0}, "Batch sizes must be 1 or more"),
    ],
)
def test_impossible_mixes(arguments, words):
    with pytest.raises(ValueError, match=words):
        TaskMixer(**({"batch_size": 4} | arguments))


def test_batch_of_two_tasks_is_refused():
    with pytest.raises(ValueError, match="one task, got cloze, detection"):
        MixedSmears({}).collate([("detection", {}), ("cloze", {})])
