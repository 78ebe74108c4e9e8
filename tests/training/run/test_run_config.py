import pytest

from unihema.errors import InputError, RunConfigError
from unihema.training.run.config import DataConfig, RunConfig


def test_round_trip(tmp_path):
    config = RunConfig(data=DataConfig(folders=["a", "b"], image_sizes={"detection": {"longest_edge": 320}}))
    config.save(tmp_path)
    loaded = RunConfig.load(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert "torch" in str(loaded.provenance)


def test_overrides_and_differences():
    config = RunConfig(data=DataConfig(folders=["a"]))
    other = config.with_overrides({"optimisation.learning_rate": 0.5, "data.tasks": ["detection"]})
    assert config.differences(other) == {
        "optimisation.learning_rate": (2e-4, 0.5),
        "data.tasks": (None, ["detection"]),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimisation": {"learning_rat": 1}}, "learning_rate"),
        ({"optimisation": {"learning_rate": "fast"}}, "learning_rate"),
        ({"model": {"preset": "huge"}}, "preset"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(RunConfigError, match=message):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.folders": []}, "data.folders is empty"),
        ({"data.tasks": ["counting"]}, "counting"),
        ({"optimisation.epochs": -1.0}, "optimisation.epochs=-1.0"),
        ({"optimisation.ema_decay": 1.5}, "ema_decay=1.5"),
        ({"augmentation.data_sets": {"lab": {"colou": 0.0}}}, "augmentation.data_sets.lab.*colour"),
    ],
)
def test_impossible_runs_are_refused_before_data_are_read(overrides, message):
    config = RunConfig(data=DataConfig(folders=["a"]))
    with pytest.raises(RunConfigError, match=message):
        config.with_overrides(overrides).check()


def test_broken_file_is_named(tmp_path):
    (tmp_path / "run_config.json").write_text("{\n broken")
    with pytest.raises(RunConfigError, match=r"run_config.json: not readable as JSON .*line 2"):
        RunConfig.load(tmp_path)
    with pytest.raises(RunConfigError, match="no such file"):
        RunConfig.load(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_setting_is_a_number_that_can_be_computed_with(value):
    with pytest.raises(RunConfigError, match=r"adapter\.alpha=(nan|inf) has the wrong type; expected float"):
        RunConfig.from_dict({"output_dir": "run", "adapter": {"alpha": value}})


@pytest.mark.parametrize("setting", ["overrides", "data_sets"])
def test_views_that_cannot_be_are_refused_before_data_are_read(setting):
    config = RunConfig(data=DataConfig(folders=["a"]))
    with pytest.raises(InputError, match=r"AugmentationConfig.colour=5.0 must lie in \[0, 2\]"):
        config.with_overrides({f"augmentation.{setting}": {"detection": {"colour": 5.0}}}).check()
