"""`unihema evaluate` on several folders: what is said and written."""

import json
import shutil

import pytest
from click.testing import CliRunner
from tiny_checkpoint import save_tiny_checkpoint

from unihema.errors import DatasetError, InputError, OutputError
from unihema.loading import load_model
from unihema.training.data.synthetic.folder import write_synthetic
from unihema_cli import app


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A checkpoint and two data folders, `one` and `two`."""
    root = tmp_path_factory.mktemp("lab")
    labels = [
        "neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil", "red blood cell", "platelet",
    ]  # fmt: skip
    save_tiny_checkpoint(root / "unihema", single_cell_labels=labels, text_length=64)
    for seed, name in enumerate(("one", "two")):
        write_synthetic(
            root / name, 1, 3, seed=seed, crops_per_field=2, width=224, height=168, crop_size=96, progress=False
        )
    return root


def test_two_folders_in_one_report(lab, tmp_path):
    arguments = ["evaluate", lab / "unihema", lab / "one", lab / "two", "-t", "single_cell", "-t", "segmentation"]
    result = CliRunner().invoke(app, [*map(str, arguments), "-o", str(tmp_path / "out"), "--bootstrap", "50"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {name: part["rows"] for name, part in report["single_cell"]["datasets"].items()} == {"one": 6, "two": 6}
    assert report["single_cell"]["rows"] == 12 and report["segmentation"]["bootstrap"]["draws"] == 50
    low, high = report["segmentation"]["intervals"]["dice"]
    assert f"dice {report['segmentation']['dice']:.3f} ({low:.3f} to {high:.3f})" in result.output
    for line in ("single_cell (12 rows)", "  one (6 rows): accuracy", "  two (6 rows): accuracy"):
        assert f"\n{line}" in f"\n{result.output}"
    assert "| segmentation | two | 3 |" in (tmp_path / "out" / "metrics.md").read_text()


def test_names_of_the_data_become_those_of_the_checkpoint(lab, tmp_path):
    data = tmp_path / "renamed"
    for label, count in (("RBC", 2), ("NEU", 1)):
        folder = data / "val" / "crops" / label
        folder.mkdir(parents=True)
        crops = sorted((lab / "one" / "val" / "crops").rglob("*.png"))
        for number in range(count):
            (folder / f"{number}.png").write_bytes(crops[number].read_bytes())
    arguments = ["evaluate", str(lab / "unihema"), str(data), "-t", "single_cell"]
    names = ["--rename", "RBC=red blood cell", "--rename", "NEU=neutrophil"]
    result = CliRunner().invoke(app, [*arguments, *names])
    assert result.exit_code == 0, result.output
    wrong = CliRunner().invoke(app, [*arguments, "--rename", "RBC"])
    assert wrong.exit_code == 2 and "'RBC' must be NAME=VALUE" in " ".join(wrong.output.split())


def test_int8_beside_the_exact_model(lab):
    arguments = ["evaluate", str(lab / "unihema"), str(lab / "one"), "-t", "single_cell", "--int8", "--bootstrap", "0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "single_cell (6 rows): accuracy" in result.output
    assert "\n  without int8: accuracy" in result.output


def test_an_image_size_of_ones_own(lab, monkeypatch):
    seen = []

    def measured(model, processor, *rest, **options):
        seen.append(dict(processor.image_processor.task_sizes))
        return {"single_cell": {"rows": 6, "accuracy": 1.0}}

    monkeypatch.setattr("unihema.training.evaluation.evaluate_model", measured)
    arguments = ["evaluate", str(lab / "unihema"), str(lab / "one"), "-t", "single_cell"]
    result = CliRunner().invoke(app, [*arguments, "--image-size", "single_cell=48"])
    assert result.exit_code == 0, result.output
    assert [seen[0][task]["longest_edge"] for task in ("single_cell", "detection")] == [48, 64]
    wrong = CliRunner().invoke(app, [*arguments, "--image-size", "single_cell=small"])
    assert wrong.exit_code == 2 and "'small' is not a number above 0" in " ".join(wrong.output.split())


def test_repeated_it_measures_nothing_twice(lab, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    arguments = ["evaluate", str(lab / "unihema"), str(lab / "one"), "--bootstrap", "0", "-o", out]
    first = CliRunner().invoke(app, [*arguments, "-t", "single_cell"])
    assert first.exit_code == 0, first.output
    measured = []

    def measure(model, processor, rows, **options):
        measured.extend(rows)
        return {task: {"rows": 3, "images": 3, "intervals": {}} for task in rows}

    monkeypatch.setattr("unihema.training.evaluation.evaluate_model", measure)
    again = CliRunner().invoke(app, [*arguments, "-t", "single_cell"])
    assert again.exit_code == 0 and measured == [] and again.stdout == first.stdout
    more = CliRunner().invoke(app, [*arguments, "-t", "single_cell", "-t", "segmentation"])
    assert more.exit_code == 0 and measured == ["segmentation"] and "single_cell (6 rows): accuracy" in more.output
    other = CliRunner().invoke(app, [*arguments, "--max-samples", "2"])
    assert isinstance(other.exception, OutputError) and "max_samples was None, now it is 2" in str(other.exception)
    anew = CliRunner().invoke(app, [*arguments, "-t", "single_cell", "--max-samples", "2", "--overwrite"])
    assert anew.exit_code == 0 and measured == ["segmentation", "single_cell"]
    # Figures that training wrote are not those of this command.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("{}")
    refused = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "run")])
    assert "holds metrics.json of something else" in str(refused.exception)


def test_figures_are_not_taken_for_those_of_other_data_or_settings(lab, tmp_path):
    checkpoint, data, out = tmp_path / "unihema", tmp_path / "site" / "one", str(tmp_path / "out")
    shutil.copytree(lab / "unihema", checkpoint)
    shutil.copytree(lab / "two", data)
    arguments = ["evaluate", str(checkpoint), str(data), "--bootstrap", "0", "-t", "single_cell", "-o", out]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    # Moved, the data are the same.
    moved = data.rename(tmp_path / "one")
    again = CliRunner().invoke(app, [str(moved) if part == str(data) else part for part in arguments])
    assert again.exit_code == 0, again.output
    other = CliRunner().invoke(app, [str(lab / "one") if part == str(data) else part for part in arguments])
    assert isinstance(other.exception, OutputError) and "data_sha256 has changed" in str(other.exception)
    config = json.loads((checkpoint / "config.json").read_text())
    config["trained"]["calibration"] = {"single_cell": {"slope": 1.0, "shift": 0.0, "shifts": {}}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    arguments[2] = str(moved)
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    config["trained"]["segmentation_threshold"] = 0.01
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "checkpoint_sha256 has changed" in str(CliRunner().invoke(app, arguments).exception)


def test_two_folders_of_one_name_are_refused(lab, tmp_path):
    other = shutil.copytree(lab / "two", tmp_path / "one")
    for folders in ((lab / "one", other), (lab / "one", lab / "one")):
        result = CliRunner().invoke(app, ["evaluate", str(lab / "unihema"), *map(str, folders), "-t", "single_cell"])
        assert isinstance(result.exception, DatasetError) and "are both called one" in str(result.exception)


def test_calibrate_keeps_the_other_head_and_takes_no_option_that_it_would_not_use(lab, tmp_path):
    checkpoint = shutil.copytree(lab / "unihema", tmp_path / "unihema")
    config = json.loads((checkpoint / "config.json").read_text())
    of_fields = {"slope": 2.0, "shift": 0.0, "shifts": {}}
    config["trained"]["calibration"] = {"detection": of_fields}
    (checkpoint / "config.json").write_text(json.dumps(config))
    data = tmp_path / "crops"
    write_synthetic(data, 1, 12, seed=5, crops_per_field=4, width=224, height=168, crop_size=96, progress=False)
    arguments = ["evaluate", str(checkpoint), str(data), "-t", "single_cell", "--calibrate"]
    for option in (["--int8"], ["--bootstrap", "5"], ["-o", str(tmp_path / "out")], ["--name-classes"]):
        wrong = CliRunner().invoke(app, [*arguments, *option])
        assert wrong.exit_code == 2 and "--calibrate writes into the checkpoint" in " ".join(wrong.output.split())
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "detection: as it was" in done.output
    found = json.loads((checkpoint / "config.json").read_text())["trained"]["calibration"]
    assert found.keys() == {"detection", "single_cell"} and found["detection"] == of_fields


def test_a_checkpoint_in_half_precision_is_measured(lab, tmp_path):
    model, processor = load_model(lab / "unihema", "cpu", "bfloat16")
    model.save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    for options in ([], ["--int8"]):
        arguments = ["evaluate", str(tmp_path / "half"), str(lab / "one"), "--bootstrap", "0", *options]
        arguments += ["-t", "segmentation", "-t", "single_cell"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        assert all(f"{task} (" in result.output for task in ("segmentation", "single_cell"))


def test_density_is_of_fields(lab, tmp_path):
    arguments = ["evaluate", str(lab / "unihema"), str(lab / "one"), "-t", "segmentation", "--corruption", "density"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError) and "density is of fields of cells" in str(result.exception)


def test_corrupted_images(lab, tmp_path):
    arguments = ["evaluate", str(lab / "unihema"), str(lab / "one"), "--corruption", "defocus", "--bootstrap", "0"]
    arguments += ["--severity", "1", "-t", "single_cell", "--image-size", "48"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert f"2 points in {tmp_path / 'out' / 'stress.json'}" in result.output
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "add --output" in " ".join(refused.output.split())
    refused = CliRunner().invoke(app, [*arguments, "--shuffle-images", "-o", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "not measured under corruptions" in " ".join(refused.output.split())
