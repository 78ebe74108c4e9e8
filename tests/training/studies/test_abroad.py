"""Home and abroad: each source is left out once, what is measured on it was never trained on, and a study that was stopped
goes on."""

import json
from pathlib import Path

import pytest
from data_folders import write_photograph
from tiny_runs import run_config

from unihema.errors import DatasetError, RunConfigError
from unihema.training.run.build import load_rows
from unihema.training.run.config import RunConfig
from unihema.training.run.loop import train
from unihema.training.studies import abroad
from unihema.training.studies.abroad import run_abroad


NAMES = ["RBC", "neutrophil", "lymphocyte", "monocyte"]


def write_source(folder: Path, seed: int, names: list[str]) -> Path:
    """Two fields in each split, with a cell of each class."""
    for number, split in enumerate(("train", "val")):
        images, annotations = [], []
        for field in range(2):
            name = f"{split}{field}.png"
            write_photograph(folder / "images" / name, seed=10 * seed + 2 * number + field)
            images.append({"id": field, "file_name": name, "width": 96, "height": 72})
            for label, _ in enumerate(names):
                box = [4 + 22 * label, 10 + 20 * field, 16, 16]
                annotations.append(
                    {"id": len(annotations), "image_id": field, "category_id": label, "bbox": box, "iscrowd": 0}
                )
        categories = [{"id": label, "name": name} for label, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources; the last has a class that the others do not have."""
    folder = tmp_path_factory.mktemp("data")
    known = (NAMES[:3], NAMES[:3], NAMES)
    return [
        write_source(folder / name, seed, names) for seed, (name, names) in enumerate(zip("abc", known, strict=True))
    ]


def settings(sources, output, **changes) -> RunConfig:
    changes = {
        "data.folders": [str(folder) for folder in sources],
        "data.tasks": ["detection", "single_cell"],
        "data.boxes_as_crops": True,
        "optimisation.max_steps": 1,
        "optimisation.ema_decay": None,
        "logging.final_samples": 2,
        **changes,
    }
    return run_config(sources[0], output, **changes)


def test_each_source_is_left_out_once_and_measured(sources, tmp_path):
    out = tmp_path / "out"
    summary = run_abroad(settings(sources, out), ["a", "b"], ["c"])
    for name, other in (("a", "b"), ("b", "a")):
        trained = RunConfig.load(out / f"without-{name}").data.folders
        assert [folder.rsplit("/", 1)[-1] for folder in trained] == [other]
    found = {(row["run"], row["on"]) for row in summary["comparisons"]}
    assert found == {("a", "a"), ("a", "c"), ("b", "b"), ("b", "c")}
    figures = {row["figure"] for row in summary["comparisons"]}
    assert {"detection mAP50", "single_cell macro_f1", "single_cell kinds accuracy"} <= figures
    metrics = json.loads((out / "without-a" / "metrics.json").read_text())
    row = next(row for row in summary["comparisons"] if (row["run"], row["figure"]) == ("a", "detection mAP50"))
    assert row["home"]["value"] == metrics["detection"]["mAP50"]
    mean = summary["means"]["detection mAP50"]
    own = [
        row["abroad"]["value"]
        for row in summary["comparisons"]
        if row["run"] == row["on"] and row["figure"] == "detection mAP50"
    ]
    assert mean["sources"] == 2 and mean["abroad"] == pytest.approx(sum(own) / 2)
    assert f"| a | c | detection mAP50 | {metrics['detection']['mAP50']:.3f}" in (out / "abroad.md").read_text()
    assert json.loads((out / "abroad.json").read_text())["means"] == summary["means"]


def test_a_study_that_was_stopped_goes_on(sources, tmp_path, monkeypatch):
    done, real_train = [], abroad.train

    def train(config, **options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(config.output_dir)
        return real_train(config, **options)

    config = settings(sources[:2], tmp_path / "out", **{"data.tasks": ["single_cell"]})
    monkeypatch.setattr(abroad, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run_abroad(config)
    assert set(json.loads((tmp_path / "out" / "abroad.json").read_text())["runs"]) == {"without-a", "without-a, abroad"}
    monkeypatch.setattr(
        abroad, "train", lambda config, **options: done.append(config.output_dir) or real_train(config, **options)
    )
    with pytest.raises(RunConfigError, match="holds without-a"):
        run_abroad(config)
    resumed = run_abroad(config, resume=True)
    assert [folder.rsplit("-", 1)[-1] for folder in done] == ["a", "b"]
    assert {row["run"] for row in resumed["comparisons"]} == {"a", "b"}


@pytest.mark.parametrize(
    ("names", "held_out", "never", "said"),
    [
        (1, (), (), "there must be two to train on; there are a"),
        (2, (), ("b",), "there must be two to train on; there are a"),
        (2, ("d",), (), "'d' cannot be held out: the data folders are a, b"),
    ],
)
def test_what_cannot_be_left_out_is_said(sources, tmp_path, names, held_out, never, said):
    with pytest.raises(RunConfigError, match=said):
        run_abroad(settings(sources[:names], tmp_path / "out"), held_out, never)


def test_what_is_said_of_single_sources_goes_with_them(sources, tmp_path):
    said = {
        "data.boxes_as_crops": ["a", "b"],
        "data.questions_from_labels": ["c"],
        "data.exact_classes": {"a": ["RBC"], "b": ["RBC"]},
        "data.dataset_weights": {"a": 0.2, "c": 0.8},
        "augmentation.data_sets": {"c": {"colour": 0.1}},
    }
    config = settings(sources, tmp_path / "out", **said)
    part = config.with_folders(sources[:2])
    assert part.data.folders == [str(folder) for folder in sources[:2]]
    assert (part.data.boxes_as_crops, part.data.questions_from_labels) == (["a", "b"], [])
    assert part.data.exact_classes == said["data.exact_classes"] and part.data.dataset_weights == {"a": 0.2}
    assert part.augmentation.data_sets == {} and config.augmentation.data_sets == said["augmentation.data_sets"]
    # A set that has nothing to do with the tasks of a run is no mistake in its settings.
    train(config.with_overrides({"data.tasks": ["detection"], "data.val_split": ""}))
    with pytest.raises(DatasetError, match="dataset_weights: no data folder is called 'd'"):
        load_rows(config.with_overrides({"data.dataset_weights": {"d": 1.0}}).data, "train")
