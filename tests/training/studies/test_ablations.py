"""The ablations: each changes what it says and nothing else, none is run twice, and the table compares like with like."""

import json
from importlib.util import find_spec

import pytest
from data_folders import write_coco, write_photograph
from tiny_models import very_tiny_config
from tiny_runs import TASKS, run_config

from unihema.errors import RunConfigError
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.training.data.curation.check import check_data
from unihema.training.data.synthetic.folder import write_synthetic
from unihema.training.run.build import training_rows, validation_rows
from unihema.training.run.config import RunConfig
from unihema.training.studies import ablations
from unihema.training.studies.ablations import ABLATIONS, comparison_rows, run_ablations


BY_NAME = {ablation.name: ablation for ablation in ABLATIONS}
ONE_STEP = {"optimisation.max_steps": 1, "logging.final_samples": 3, "optimisation.ema_decay": None}


@pytest.fixture(scope="module")
def other_smears(tmp_path_factory):
    """A second data set, of other fields."""
    folder = tmp_path_factory.mktemp("data") / "other"
    return write_synthetic(folder, 2, 2, seed=5, crops_per_field=2, width=224, height=168, crop_size=96, progress=False)


def test_each_ablation_is_another_model_than_the_default():
    for ablation in ABLATIONS:
        assert ablation.figures and {task for task, _ in ablation.figures} <= set(TASKS)
        assert (ablation.kind == "model") == bool(ablation.overrides)
        for name, value in ablation.overrides.items():
            assert getattr(UniHemaConfig(), name) != value
    with_parts, without = (
        {name for name, _ in UniHemaForMultiTask(very_tiny_config(**overrides)).named_parameters()}
        for overrides in ({}, {k: v for a in ABLATIONS for k, v in a.overrides.items()})
    )
    gone = {name.split(".")[2] for name in with_parts - without if name.startswith("model.hema_former")}
    assert gone == {"cross_modal_fusion", "text_guided_visual_refinement"}
    assert any(name.startswith("mask_head.") for name in with_parts - without)


@pytest.mark.parametrize("tasks", [("segmentation",), pytest.param(TASKS, marks=pytest.mark.slow)])
def test_every_question_in_one_command(smears, other_smears, tmp_path, tasks):
    config = run_config(smears, tmp_path / "out", **ONE_STEP, **{"data.tasks": list(tasks)})
    config.data.folders.append(str(other_smears))
    content = run_ablations(config, unseen="other")
    out = tmp_path / "out"
    written = json.loads((out / "ablation.json").read_text())
    assert {name: written[name] for name in content} == content
    asked = [ablation for ablation in ABLATIONS if {task for task, _ in ablation.figures} & set(tasks)]
    # Nothing can be destroyed where there is one task.
    asked = [ablation for ablation in asked if ablation.kind != "stages" or len(tasks) > 1]
    assert set(content["questions"]) == {ablation.name for ablation in asked}
    found = {(row["ablation"], row["task"], row["figure"]) for row in content["comparisons"]}
    assert found == {(a.name, task, figure) for a in asked for task, figure in a.figures if task in tasks}
    for row in content["comparisons"]:
        assert row["difference"] == pytest.approx(row["changed"] - row["whole"])
    whole = RunConfig.load(out / "whole")
    for name in (ablation.name for ablation in asked if ablation.kind == "model"):
        changed = RunConfig.load(out / name).differences(whole)
        assert set(changed) == {"output_dir", *(f"model.overrides.{field}" for field in BY_NAME[name].overrides)}
        saved = UniHemaConfig.from_pretrained(out / name)
        assert {field: getattr(saved, field) for field in BY_NAME[name].overrides} == BY_NAME[name].overrides
    metrics = json.loads((out / "bilinear_upsampler" / "metrics.json").read_text())
    dice = next(r for r in content["comparisons"] if (r["ablation"], r["figure"]) == ("bilinear_upsampler", "dice"))
    assert (dice["changed"], dice["rows"]) == (metrics["segmentation"]["dice"], metrics["segmentation"]["rows"])
    assert dice["changed_interval"] == metrics["segmentation"]["intervals"]["dice"]
    assert (out / "six_stages" / "metrics.json").is_file() == (len(tasks) > 1)
    # Both models are measured on the rows of the unseen data set alone.
    unseen = RunConfig.load(out / "unseen-other")
    assert [folder.rsplit("/", 1)[-1] for folder in unseen.data.folders] == [smears.name]
    rows = {row["task"]: row["rows"] for row in content["comparisons"] if row["on"] == "other"}
    assert rows["segmentation"] == 2 and set(rows) == set(tasks)
    table = (out / "ablation.md").read_text()
    assert f"| bilinear_upsampler | segmentation | dice | {dice['rows']} | {dice['whole']:.3f} (" in table
    assert "unseen (other)" in table and BY_NAME["bilinear_upsampler"].asks in table
    if find_spec("matplotlib"):
        assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert not [path.name for path in out.iterdir() if "partial" in path.name]


def test_finished_runs_are_kept_and_others_go_on(smears, tmp_path, monkeypatch):
    config = run_config(smears, tmp_path / "out", **ONE_STEP, **{"data.tasks": ["segmentation"]})
    trained = []

    def train(run, resume=False):
        trained.append((run.output_dir.rsplit("/", 1)[-1], resume))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_really(run, resume=resume)

    train_really = ablations.train
    monkeypatch.setattr(ablations, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run_ablations(config, ["bilinear_upsampler"])
    with pytest.raises(RunConfigError, match="ablation.json holds whole of an earlier run.*--overwrite"):
        run_ablations(config, ["bilinear_upsampler"])
    first = run_ablations(config, ["bilinear_upsampler"], resume=True)
    assert trained == [("whole", False), ("bilinear_upsampler", False), ("bilinear_upsampler", False)]
    second = run_ablations(config, ["no_refinement"], resume=True)
    assert trained[3:] == [("no_refinement", False)]
    assert second["comparisons"][: len(first["comparisons"])] == first["comparisons"]
    assert {row["ablation"] for row in second["comparisons"]} == {"bilinear_upsampler", "no_refinement"}
    # By itself, every question about segmentation that is not answered yet would be asked, and no other.
    again = run_ablations(config, resume=True)
    assert again == second and len(trained) == 4
    with pytest.raises(
        RunConfigError, match="whole in .* is finished and was made with optimisation.learning_rate=0.001; now"
    ):
        run_ablations(config.with_overrides({"optimisation.learning_rate": 0.1}), resume=True)


@pytest.mark.parametrize(
    ("names", "unseen", "changes", "message"),
    [
        (["no_fusions"], None, {}, "Unknown ablation 'no_fusions'; there are no_fusion, "),
        (["unseen"], None, {}, "needs a data set to hold out"),
        (
            ["no_fusion"],
            None,
            {"data.tasks": ["detection"]},
            "is about question_answering, cloze; the data have detection",
        ),
        (["six_stages"], None, {"data.tasks": ["cloze"]}, "two of them at least; the data have cloze"),
        (None, "nowhere", {}, "'nowhere' cannot be held out: the data folders are smears"),
        (None, "room=3", {}, "unknown group 'room'; groups are patient, slide, source_image"),
        (["bilinear_upsampler"], None, {"model.overrides.upsampler": "bilinear"}, "changes nothing"),
        (None, None, {"data.val_split": ""}, "data.val_split is empty"),
    ],
)
def test_bad_settings_are_named_before_anything_is_trained(smears, tmp_path, names, unseen, changes, message):
    config = run_config(smears, tmp_path / "out", **ONE_STEP)
    overrides = {name: value for name, value in changes.items() if not name.startswith("model.")}
    config = config.with_overrides(overrides)
    config.model.overrides |= {k.rsplit(".", 1)[-1]: v for k, v in changes.items() if k.startswith("model.")}
    with pytest.raises(RunConfigError, match=message):
        run_ablations(config, names, unseen)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limits", "shares"),
    [
        ({"max_steps": 10, "epochs": None}, {"max_steps": 4, "epochs": None}),
        ({"max_steps": None, "epochs": 6.0}, {"max_steps": None, "epochs": 3.0}),
        ({"max_steps": None, "epochs": None}, {"max_steps": None, "epochs": 12.0}),
        (
            {"max_steps": None, "epochs": None, "time_limit_minutes": 30.0},
            {"epochs": None, "time_limit_minutes": 10.0},
        ),
    ],
)
def test_stages_have_the_steps_of_the_whole_model_between_them(smears, tmp_path, monkeypatch, limits, shares):
    calls = []

    def train_stages(run, stages, resume):
        calls.append((run, stages))
        (tmp_path / "six_stages").mkdir()
        (tmp_path / "six_stages" / "metrics.json").write_text('{"cloze": {"rows": 1}}')

    monkeypatch.setattr(ablations, "train_stages", train_stages)
    monkeypatch.setattr(ablations, "train", lambda run, resume: {"cloze": {"exact_match": 0.5}})
    changes = {f"optimisation.{name}": value for name, value in limits.items()}
    run_ablations(
        run_config(smears, tmp_path, **{"data.tasks": ["single_cell", "segmentation"], **changes}), ["six_stages"]
    )
    ((run, stages),) = calls
    assert [(stage.name, stage.tasks) for stage in stages] == [
        ("single_cell", ("single_cell",)),
        ("joint_visual", ("segmentation", "single_cell")),
        ("segmentation", ("segmentation",)),
    ]
    assert {name: getattr(run.optimisation, name) for name in shares} == shares


def test_a_slide_is_held_out_of_training_and_validation_and_measured_by_itself(tmp_path):
    for split in ("train", "val"):
        names = {f"{split}-{slide}.png": [[5, 5, 20, 20]] for slide in "abc"}
        for number, name in enumerate(names):
            write_photograph(tmp_path / "fields" / "images" / name, number)
        slides = {f"{split}-{slide}": {"slide": slide} for slide in "abc"}
        write_coco(tmp_path / "fields" / f"{split}.json", names, **slides)
    config = run_config(tmp_path / "fields", tmp_path / "out", **{"data.hold_out": {"slide": ["b"]}})
    for rows in (training_rows(config), validation_rows(config, ["detection"])):
        assert [row["slide"] for row in rows["detection"]] == ["a", "c"]
    config = run_config(tmp_path / "fields", tmp_path / "out", **ONE_STEP)
    content = run_ablations(config, ["unseen"], unseen="slide=b")
    assert [(row["task"], row["on"], row["rows"]) for row in content["comparisons"]] == [("detection", "slide=b", 1)]
    assert RunConfig.load(tmp_path / "out" / "unseen-slide-b").data.hold_out == {"slide": ["b"]}
    with pytest.raises(RunConfigError, match="No row of split 'val' is of"):
        run_ablations(config.with_overrides({"output_dir": str(tmp_path / "none")}), ["unseen"], unseen="slide=z")


def test_a_microscope_is_held_out_by_any_of_its_names_and_is_no_group_of_a_split(tmp_path):
    for number, name in enumerate("abc"):
        for split in ("train", "val"):
            write_photograph(tmp_path / "fields" / "images" / f"{split}-{name}.png", 10 * number + len(split))
    for split in ("train", "val"):
        names = {f"{split}-{name}.png": [[5, 5, 20, 20]] for name in "abc"}
        origins = {
            f"{split}-a": {"microscope": "one"},
            f"{split}-b": {"origin": "two"},
            f"{split}-c": {"scanner": "one"},
        }
        write_coco(tmp_path / "fields" / f"{split}.json", names, **origins)
    config = run_config(tmp_path / "fields", tmp_path / "out", **{"data.hold_out": {"origin": ["one"]}})
    assert [row["file_name"] for row in training_rows(config)["detection"]] == ["train-b.png"]
    assert check_data([tmp_path / "fields"]).shared_groups == []
    with pytest.raises(RunConfigError, match="unknown group 'stain'; groups are patient, slide, source_image, origin"):
        training_rows(config.with_overrides({"data.hold_out": {"stain": ["x"]}}))


def report_of(value: float) -> dict:
    return {"segmentation": {"dice": value, "iou": None, "rows": 3, "intervals": {"dice": [value - 0.1, value + 0.1]}}}


def test_a_figure_that_one_of_two_lacks_is_not_compared():
    (row,) = comparison_rows(BY_NAME["bilinear_upsampler"], report_of(0.9), report_of(0.85))
    assert (row["figure"], row["whole"], row["changed"], row["rows"]) == ("dice", 0.9, 0.85, 3)
    assert row["difference"] == pytest.approx(-0.05) and row["changed_interval"] == pytest.approx([0.75, 0.95])
