"""`unihema train`: its options become settings of the run, recipes are chosen, and repeating it goes on."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from unihema.errors import TrainingInterrupted
from unihema.training.run import loop
from unihema.training.run.config import RunConfig
from unihema.training.studies import ablations, stages
from unihema_cli import app


@pytest.fixture
def calls(monkeypatch) -> list:
    """What the command asks for: name, configuration and the rest; nothing is trained."""
    made = []

    def leave(config, name):
        Path(config.output_dir).mkdir(exist_ok=True)
        (Path(config.output_dir) / name).write_text("| the table |")

    def train(config, resume):
        made.append(("train", config, {"resume": resume}))
        return {"cloze": {"exact_match": 0.5}}

    def run_ablations(config, names, unseen, resume):
        made.append(("ablations", config, {"names": names, "unseen": unseen, "resume": resume}))
        leave(config, "ablation.md")

    def train_stages(config, **rest):
        made.append(("stages", config, rest))
        leave(config, "stages.md")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(ablations, "run_ablations", run_ablations)
    monkeypatch.setattr(stages, "train_stages", train_stages)
    return made


@pytest.fixture
def mix(tmp_path) -> Path:
    path = tmp_path / "mix.yaml"
    path.write_text("data: {folders: [one, two], tasks: [cloze]}\noptimisation: {learning_rate: 0.5, epochs: 3.0}\n")
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def said(result) -> str:
    return " ".join(result.output.split())


def test_options_are_settings_over_those_of_a_mix(calls, mix, tmp_path):
    result = invoke(
        "--config", mix, "-o", tmp_path / "out", "--max-steps", 7, "--mixed-precision", "bf16", "--batch-size", 2,
        "--batch-size", "cloze=3", "--image-size", "detection=320", "--set", "optimisation.seed=4",
    )  # fmt: skip
    assert result.exit_code == 0 and "cloze: exact_match 0.500" in result.output
    ((_, config, rest),) = calls
    assert config.data.folders == [str(tmp_path / "one"), str(tmp_path / "two")] and config.data.tasks == ["cloze"]
    assert config.data.batch_size["cloze"] == 3 and config.data.batch_size["detection"] == 2
    assert config.data.image_sizes == {"detection": {"longest_edge": 320}}
    settings = config.optimisation
    assert (settings.max_steps, settings.seed, settings.learning_rate) == (7, 4, 0.5)
    assert settings.mixed_precision == "bf16" and rest == {"resume": False}


def test_one_number_is_of_the_tasks_that_are_trained(calls, tmp_path):
    assert invoke(tmp_path, "-o", tmp_path / "out", "-t", "single_cell", "--image-size", 96).exit_code == 0
    assert calls[0][1].data.image_sizes == {"single_cell": {"longest_edge": 96}}


def test_repeated_it_goes_on_with_what_the_folder_says(calls, tmp_path):
    begun = RunConfig.from_dict({"data": {"folders": ["smears"]}, "optimisation": {"max_steps": 5}})
    begun.save(tmp_path / "out")
    assert invoke("-o", tmp_path / "out").exit_code == 0
    _, config, rest = calls[0]
    assert (config.data.folders, config.optimisation.max_steps) == (["smears"], 5)
    assert config.output_dir == str(tmp_path / "out") and rest == {"resume": True}


def test_overwrite_deletes_an_earlier_run_and_nothing_else(calls, tmp_path):
    out = tmp_path / "out"
    RunConfig.from_dict({"data": {"folders": ["smears"]}}).save(out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    refused = invoke("smears", "-o", tmp_path / "notes", "--overwrite")
    assert refused.exit_code == 2 and "holds something else than an earlier run" in said(refused)
    refused = invoke(out / "data", "-o", out, "--overwrite")
    assert refused.exit_code == 2 and "would delete" in said(refused)
    assert (out / "run_config.json").is_file() and (tmp_path / "notes" / "mine.txt").is_file() and not calls
    assert invoke("smears", "-o", out, "--overwrite").exit_code == 0
    assert [path.name for path in out.iterdir()] == [".unihema.lock"] and calls[0][2] == {"resume": False}


def test_the_ablations(calls, mix, tmp_path):
    only = ("--only", "no_fusion", "--only", "unseen=two")
    result = invoke("--config", mix, "-o", tmp_path / "out", "--recipe", "ablations", *only)
    assert result.exit_code == 0 and "| the table |" in result.output
    assert calls[0][2] == {"names": ["no_fusion", "unseen"], "unseen": "two", "resume": True}
    assert invoke(tmp_path, "-o", tmp_path / "out", "--recipe", "ablations").exit_code == 0
    assert calls[1][2] == {"names": None, "unseen": None, "resume": True}


def test_the_stages(calls, mix, tmp_path):
    mix.write_text(mix.read_text() + "stages: {text: {optimisation.epochs: 1}}\n")
    refused = invoke("--config", mix, "-o", tmp_path / "out")
    assert refused.exit_code == 2 and "add --recipe six-stages" in said(refused)
    result = invoke("--config", mix, "-o", tmp_path / "out", "--recipe", "six-stages", "--only", 2)
    assert result.exit_code == 0 and "| the table |" in result.output
    assert calls[0][2] == {"changes": {"text": {"optimisation.epochs": 1}}, "only": 2, "resume": True}
    wrong = invoke("--config", mix, "-o", tmp_path / "out", "--recipe", "six-stages", "--only", "text")
    assert wrong.exit_code == 2 and "write the number of one stage" in said(wrong)


def test_a_stopped_run_has_exit_code_three(monkeypatch, tmp_path):
    def stopped(config, resume):
        raise TrainingInterrupted("Stopped at step 3")

    monkeypatch.setattr(loop, "train", stopped)
    result = invoke(tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 3 and "Stopped at step 3" in result.output


def test_wrong_values_name_the_option(tmp_path):
    for arguments, message in (
        (("--max-steps", "many"), "'--max-steps'"),
        (("--mixed-precision", "fp16"), "'fp16' is not one of 'no', 'bf16'"),
        (("--set", "optimisation.seed"), "must be NAME=VALUE, such as optimisation.weight_decay=0.05"),
        (("--batch-size", "detection=none"), "'none' is not a number above 0"),
    ):
        result = invoke(tmp_path, "-o", tmp_path / "out", *arguments)
        assert result.exit_code == 2 and message in said(result)


def test_settings_in_json_keep_their_types(calls, tmp_path):
    overrides = {"detection": {"transpose": 0.0}}
    setting = f"augmentation.overrides={json.dumps(overrides)}"
    assert invoke(tmp_path, "-o", tmp_path / "out", "--set", setting, "--set", "data.train_split=all").exit_code == 0
    assert calls[0][1].augmentation.overrides == overrides and calls[0][1].data.train_split == "all"
