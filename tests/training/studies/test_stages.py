"""Training in stages: what is frozen stays to the byte, nothing is done twice, and what is forgotten is shown."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import very_tiny_config
from tiny_runs import TASKS, run_config

from unihema.errors import RunConfigError
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.training.run.build import PARTS, TrainedParts
from unihema.training.run.config import read_mix
from unihema.training.run.loop import train
from unihema.training.studies.stages import SIX_STAGES, train_stages


ONE_STEP = {"optimisation.max_steps": 1, "logging.final_samples": 2}


def in_part(key: str, part: str) -> bool:
    return key.startswith(f"{PARTS[part]}.")


def test_every_parameter_belongs_to_one_part():
    model = UniHemaForMultiTask(very_tiny_config())
    for name, _ in model.named_parameters():
        assert sum(in_part(name, part) for part in PARTS) == 1, name
    for stage in SIX_STAGES:
        assert set(stage.trained_parts) <= set(PARTS)


@pytest.mark.parametrize("stage", SIX_STAGES, ids=lambda stage: stage.folder)
def test_frozen_parts_are_in_evaluation_mode_without_gradient(stage):
    model = UniHemaForMultiTask(very_tiny_config(freeze_backbone_norm=False))
    TrainedParts(model, stage.trained_parts).train(model)
    for part, path in PARTS.items():
        module = model.get_submodule(path)
        trained = part in stage.trained_parts
        assert all(parameter.requires_grad == trained for parameter in module.parameters()), part
        assert all(inner.training == trained for inner in module.modules()), part


def test_an_unknown_part_is_named():
    with pytest.raises(RunConfigError, match="unknown part 'decoder'; parts are backbone, input_projection"):
        TrainedParts(UniHemaForMultiTask(very_tiny_config()), ["decoder"])
    with pytest.raises(RunConfigError, match="empty; parts are"):
        TrainedParts(UniHemaForMultiTask(very_tiny_config()), [])


def test_a_frozen_part_keeps_its_bytes_and_has_no_optimizer_state(smears, tmp_path):
    """Statistics of BatchNorm, and dropout, are part of that; the optimizer's weight decay must not reach it either."""
    first = run_config(smears, tmp_path / "first", **ONE_STEP, **{"data.val_split": ""})
    first.model.overrides["freeze_backbone_norm"] = False
    train(first)
    trained = ["cross_modal_fusion", "text_decoder", "language_head"]
    second = run_config(
        smears,
        tmp_path / "second",
        **{
            "data.val_split": "",
            "data.tasks": ["question_answering", "cloze"],
            "model.initial_checkpoint": str(tmp_path / "first"),
            "model.trained_parts": trained,
            "optimisation.max_steps": 3,
            "optimisation.weight_decay": 0.5,
        },
    )
    second.model.overrides = {}
    train(second)
    before = load_file(tmp_path / "first" / "model.safetensors")
    after = load_file(tmp_path / "second" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(any(in_part(name, part) for part in trained) for name in changed)
    for part in trained:
        assert any(in_part(name, part) for name in changed), part
    (checkpoint,) = (tmp_path / "second" / "checkpoints").iterdir()
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    parameters = sum(in_part(name, part) for name in before for part in trained)
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"]) == parameters


def test_the_six_stages(smears, tmp_path):
    """All of them run; each is measured on what was trained before; nothing is run again."""
    config = run_config(smears, tmp_path / "run", **ONE_STEP)
    text = {"optimisation.learning_rate": 2e-3}
    rows = train_stages(config, changes={"text": text})
    assert [row["stage"] for row in rows] == [stage.name for stage in SIX_STAGES]
    assert list(rows[0]["metrics"]) == ["single_cell"]
    assert set(rows[1]["metrics"]) == {"single_cell", "question_answering", "cloze"}
    assert set(rows[5]["metrics"]) == set(TASKS)
    alone = [[row["metrics"][task]["text_only"] for row in rows[1:]] for task in ("question_answering", "cloze")]
    assert alone == [[True, True, True, True, False]] * 2
    # What a stage does not train it does not move: the single cell's figure after stage 3 is that after stage 6.
    assert rows[2]["metrics"]["single_cell"] == rows[5]["metrics"]["single_cell"]
    assert rows[3]["metrics"]["detection"] == rows[5]["metrics"]["detection"]
    table = (tmp_path / "run" / "stages.md").read_text()
    assert table.startswith("| task | after 1 single_cell | after 2 text |") and "(text alone)" in table

    model = UniHemaForMultiTask.from_pretrained(tmp_path / "run")
    assert model.config.trained.tasks == list(TASKS)
    assert (tmp_path / "run" / "metrics.json").is_file() and not (tmp_path / "run" / "checkpoints").exists()

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/stages/*/model.safetensors")}
    assert len(times) == 7
    assert train_stages(config, changes={"text": text}, resume=True) == rows
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())

    with pytest.raises(RunConfigError, match=r"holds 0-initial, single_cell, text, .* of an earlier run.*--overwrite"):
        train_stages(config)
    with pytest.raises(
        RunConfigError,
        match=r"text in .*stages.json is finished and was made with optimisation.learning_rate=0.002; now",
    ):
        train_stages(config, resume=True)
    # What was written under this name can be read again.
    mix = read_mix(tmp_path / "run" / "mix.json")
    assert mix.stages == {"text": text} and not mix.run.differences(config)


def test_a_killed_stage_is_resumed_where_it_was(smears, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(line):
        if line.get("step") == 2 and line["task"] == "detection":
            raise Killed

    changes = {"detection": {"optimisation.max_steps": 3, "logging.checkpoint_steps": 1}}
    stages = tuple(stage for stage in SIX_STAGES if stage.name in ("single_cell", "detection"))
    config = run_config(smears, tmp_path / "run", **ONE_STEP, **{"data.val_split": ""})
    with pytest.raises(Killed):
        train_stages(config, stages, changes, callbacks=[kill])
    seen = []
    train_stages(config, stages, changes, resume=True, callbacks=[seen.append])
    assert [line["step"] for line in seen if line["event"] == "step"] == [2, 3]


def test_one_stage_at_a_time(smears, tmp_path):
    config = run_config(smears, tmp_path / "run", **ONE_STEP, **{"data.val_split": ""})
    with pytest.raises(RunConfigError, match=r"Stage 2 goes on from stage 1 \(single_cell\), which is not finished"):
        train_stages(config, only=2)
    assert [row["stage"] for row in train_stages(config, only=1)] == ["single_cell"]
    assert [row["stage"] for row in train_stages(config, only=2)] == ["single_cell", "text"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(RunConfigError, match="There is no stage 7; stages are 1 to 6: single_cell"):
        train_stages(config, only=7)


def test_stages_without_data_are_left_out(smears, tmp_path):
    folder = tmp_path / "fields"
    shutil.copytree(smears, folder)
    for split in ("train", "val"):
        shutil.rmtree(folder / split / "crops")
        for name in ("qa.jsonl", "cloze.jsonl"):
            (folder / split / name).unlink()
    config = run_config(folder, tmp_path / "run", **ONE_STEP, **{"data.val_split": ""})
    rows = train_stages(config)
    assert [row["number"] for row in rows] == [3, 4, 5]
    with pytest.raises(RunConfigError, match="Stage 1 trains single_cell, which the data do not have"):
        train_stages(config, only=1, resume=True)


def test_the_text_stage_reads_no_image(smears, tmp_path):
    folder = tmp_path / "texts"
    shutil.copytree(smears, folder)
    stages = SIX_STAGES[1:2]
    config = run_config(folder, tmp_path / "run", **ONE_STEP, **{"data.tasks": ["question_answering"]})
    for path in folder.glob("*/crops/*/*.png"):
        path.write_bytes(b"not an image")
    for path in folder.glob("*/images/*"):
        path.write_bytes(b"not an image")
    (row,) = train_stages(config, stages)
    assert row["metrics"]["question_answering"]["text_only"]


def test_a_stage_that_does_not_exist_is_named(smears, tmp_path):
    with pytest.raises(RunConfigError, match="unknown stage 'detections'; stages are single_cell, text"):
        train_stages(run_config(smears, tmp_path / "run"), changes={"detections": {}})


def test_a_mix_is_read_beside_its_folders(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text(
        "data: {folders: [cbc, ../other]}\noptimisation: {learning_rate: 4.0e-4}\n"
        "stages: {text: {optimisation.epochs: 2}}\n"
    )
    mix = read_mix(path)
    assert mix.run.data.folders == [str(tmp_path / "cbc"), str(tmp_path.parent / "other")]
    assert mix.run.optimisation.learning_rate == 4e-4 and mix.stages == {"text": {"optimisation.epochs": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("true: 1", "unknown setting 'True'"),
        ("data: {folder: [a]}", "unknown setting 'data.folder'. Did you mean 'data.folders'"),
        ("- a\n- b", "a mix is a set of settings"),
        ("data: [", "broken YAML"),
        ("data: {folders: [a]}\nstages: [text]", "'stages' must be stage names"),
    ],
)
def test_a_mix_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "mix.yaml"
    path.write_text(content)
    with pytest.raises(RunConfigError, match=message) as raised:
        read_mix(path)
    assert str(path) in str(raised.value)
    with pytest.raises(RunConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        read_mix(tmp_path / "none.yaml")


def test_trackers_get_the_figures(smears, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"data.val_split": "", "data.tasks": ["single_cell"], "logging.trackers": ["tensorboard"]}
    train(run_config(smears, tmp_path / "run", **changes, **{"optimisation.max_steps": 2}))
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "unihema"))
    events.Reload()
    values = [event.value for event in events.Scalars("loss")]
    assert values == pytest.approx([line["loss"] for line in logged if line["event"] == "step"], rel=1e-6)
    with pytest.raises(RunConfigError, match="'tensorbord' is not there; Accelerate finds"):
        train(run_config(smears, tmp_path / "other", **changes | {"logging.trackers": ["tensorbord"]}))
