"""`unihema adapt`, and what can be done with the folder that it leaves."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from card_code import code_of
from click.testing import CliRunner
from local_hub import LocalHub
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint

from unihema.errors import CheckpointError, DatasetError, RunConfigError
from unihema.hub_cards import check_card, folder_card
from unihema.loading import load_model
from unihema.training.data.synthetic.cells import CLASSES
from unihema.training.data.synthetic.fields import SyntheticSmears
from unihema.training.data.synthetic.folder import write_synthetic
from unihema.training.run.build import build, training_rows
from unihema.training.studies.adapt import adapt, adapt_config, find_base
from unihema_cli.app import app


BASE, ADAPTER = "lab/base", "lab/our-stain"
SHORT = {"optimisation.max_steps": 2, "optimisation.warmup_steps": 1, "logging.progress": False}


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A base, a lab's data, one image, and the adapter that `unihema adapt` made of them, with a card."""
    root = tmp_path_factory.mktemp("lab")
    names = dict(enumerate(CLASSES))
    base = save_tiny_checkpoint(root / "base", num_queries=12, id2label=names, trained={"tasks": ["detection"]})
    card = folder_card(base, licence="cc-by-4.0", data_licences={"old": "cc-by-4.0"}, name="Base")
    (base / "README.md").write_text(card, encoding="utf-8")
    write_synthetic(root / "smears", 4, 2, crops_per_field=1, width=224, height=168, crop_size=96, progress=False)
    Image.fromarray(SyntheticSmears(seed=2)[1].image).save(root / "smear.png")
    made = run(
        "adapt", base, root / "smears", "--task", "detection", "-o", root / "adapter", "--max-steps", 2,
        "--image-size", 64, "--batch-size", 2, "--set", "logging.evaluate_every=1", "--set", "adapter.rank=4",
        "--set", 'data.rename={"neutrophil": "PMN"}', "--start-from", "PMN=neutrophil", "--base-data", root / "smears",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    card = ("--license", "cc-by-4.0", "--data-license", "smears=cc0-1.0", "--base", BASE, "--task", "detection")
    written = run("card", root / "adapter", *card)
    assert written.exit_code == 0, written.output
    return root, made.stdout


def test_it_leaves_an_adapter_with_figures_and_a_card(lab):
    root, shown = lab
    folder = root / "adapter"
    values = json.loads((folder / "before_after.json").read_text())
    assert "boxes, whatever their class" in shown and "detection mAP50" in shown
    assert "adapter of" in shown and (folder / "before_after.md").read_text().splitlines()[0] in shown
    # The base does not know one of the lab's classes, and the adapter not one of the base's.
    lab_figures, base_figures = values["lab"]["figures"], values["base"]["figures"]
    assert lab_figures["detection"]["before"] is None and lab_figures["detection"]["after"] is not None
    assert base_figures["detection"]["adapter on"] is None
    for figures in base_figures.values():
        assert figures["adapter off"] == figures["before"] is not None
    card = check_card((folder / "README.md").read_text())
    assert card.data.base_model == BASE and "lora" in card.data.tags and card.data.license == "cc-by-4.0"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == str(root / "base")
    assert "PMN" in config["auto_mapping"]["unihema"]["id2label"].values()
    assert not [path for path in folder.rglob("*.bin") if "checkpoints" not in path.parts]


def test_the_code_of_its_card_runs(lab, monkeypatch, tmp_path, capsys):
    root, _ = lab
    card = (root / "adapter" / "README.md").read_text()
    folder = shutil.copytree(root / "adapter", tmp_path / "adapter")
    shutil.copy(root / "smear.png", folder)
    monkeypatch.chdir(folder)
    # The base of the card is on no Hub.
    exec(compile(code_of(card).replace(f'"{BASE}"', repr(str(root / "base"))), "card", "exec"), {})
    assert "boxes" in capsys.readouterr().out


def test_the_commands_take_the_adapter_for_a_checkpoint(lab, tmp_path):
    root, _ = lab
    folder = root / "adapter"
    predicted = run("predict", folder, root / "smear.png", "-o", tmp_path / "results", "--threshold", 0)
    assert predicted.exit_code == 0 and "PMN" in predicted.stdout
    provenance = json.loads(next((tmp_path / "results" / "records").glob("*.json")).read_text())["result"]["provenance"]
    assert provenance["adapters"] == ["adapter"] and "base/model.safetensors" in provenance["checkpoint_sha256"]
    told = run("info", folder)
    assert told.exit_code == 0 and f"adapter (LORA, rank 4) of {root / 'base'}" in told.stdout and "PMN" in told.stdout
    listed = run("push", folder, ADAPTER, "--base", BASE, "--dry-run")
    assert listed.exit_code == 0, listed.output
    assert "before_after.md" in listed.stdout and "adapter_model.safetensors" in listed.stdout


def test_a_fresh_interpreter_loads_base_and_adapter_from_a_hub(lab, tmp_path):
    root, _ = lab
    hub = LocalHub()
    code = f"""
import torch, unihema
from peft import AutoPeftModel, PeftModel
from safetensors.torch import save_file
from unihema.hub_cards import push_folder
push_folder({str(root / "base")!r}, "{BASE}")
push_folder({str(root / "adapter")!r}, "{ADAPTER}", base_model="{BASE}")
pixels = {{"pixel_values": torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)}}
base = unihema.UniHemaForDetection.from_pretrained("{BASE}")
beside = unihema.UniHemaForDetection.from_pretrained("{BASE}")
beside.load_adapter("{ADAPTER}", "stain")
models = {{
    "wrapped": PeftModel.from_pretrained(base, "{ADAPTER}"),
    "beside": beside,
    "auto": AutoPeftModel.from_pretrained("{ADAPTER}", import_allowlist=["unihema"]),
    "direct": unihema.UniHemaForDetection.from_pretrained("{ADAPTER}"),
}}
with torch.no_grad():
    found = {{name: model.eval()(**pixels).logits.clone() for name, model in models.items()}}
assert all("PMN" in model.config.label2id for model in models.values())
assert unihema.UniHemaProcessor.from_pretrained("{ADAPTER}").default_prompts["detection"].count("PMN") == 1
# An adapter that lies on this disk finds its base among what was downloaded.
import huggingface_hub
huggingface_hub.snapshot_download("{BASE}")
folder = huggingface_hub.snapshot_download("{ADAPTER}", local_files_only=True)
from unihema.loading import load_model
assert load_model(folder, "cpu")[0].config.label2id.keys() == beside.config.label2id.keys()
save_file(found, {str(tmp_path / "found.safetensors")!r})
"""
    try:
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=hub.environment(tmp_path)
        )
        assert result.returncode == 0, result.stderr
    finally:
        hub.close()
    model = load_model(root / "adapter", "cpu")[0]
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(task="detection", pixel_values=pixels).logits
    for name, value in load_file(tmp_path / "found.safetensors").items():
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_folds_without_validation_data_and_then_all_images(lab, tmp_path):
    root, _ = lab
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "train").symlink_to(root / "smears" / "train")
    report = adapt(
        root / "base", tmp_path / "few", "classification", tmp_path / "run", folds=2, method="ia3",
        overrides={**SHORT, "data.image_sizes": {"single_cell": {"longest_edge": 32}}, "data.batch_size": {"single_cell": 2},
                   "logging.evaluate_every": 1},
    )  # fmt: skip
    assert [run["fold"] for run in report["folds"]] == [1, 2] and report["lab"]["rows"] == {}
    assert all(0 <= run["single_cell macro_f1"] <= 1 for run in report["folds"])
    settings = json.loads((tmp_path / "run" / "run_config.json").read_text())
    assert settings["data"]["folds"] is None and settings["optimisation"]["max_steps"] <= 2
    model, _ = load_model(tmp_path / "run", "cpu")
    assert model.config.trained.tasks == ["detection", "single_cell"]


def test_settings_follow_the_number_of_images(lab, tmp_path):
    root, _ = lab
    config = adapt_config(root / "base", [root / "smears"], "qa", tmp_path / "run")
    assert config.data.tasks == ["question_answering", "cloze"] and config.data.folds is None
    assert config.optimisation.patience and config.logging.keep_best
    # 4 fields make a batch of each of the two tasks: an evaluation every 25 epochs is one every 50 steps.
    assert config.logging.evaluate_every == 25
    fields = adapt_config(root / "base", [root / "smears"], "detection", tmp_path / "run")
    assert fields.augmentation.for_task("detection").stain > 0.15


def test_slides_without_a_val_split_are_held_out_whole_however_few(lab, tmp_path):
    root, _ = lab
    data = tmp_path / "three_slides"
    shutil.copytree(root / "smears" / "train", data / "train")
    index = data / "train" / "annotations.json"
    coco = json.loads(index.read_text())
    for number, image in enumerate(coco["images"]):
        image["slide"] = min(number, 2)
    index.write_text(json.dumps(coco))
    assert adapt_config(root / "base", [data], "detection", tmp_path / "run").data.folds == 3


def test_attributes_of_crops_that_the_base_lacks_are_read_and_said_to_be_lost(lab, tmp_path, caplog):
    root, _ = lab
    for split in ("train", "val"):
        shutil.copytree(root / "smears" / split / "crops", tmp_path / "cells" / split / "crops")
        crops = sorted((tmp_path / "cells" / split / "crops").rglob("*.png"))
        lines = [
            f"{path.relative_to(tmp_path / 'cells' / split)},{('fine', 'coarse')[n % 2]}"
            for n, path in enumerate(crops)
        ]
        (tmp_path / "cells" / split / "attributes.csv").write_text("\n".join(["file_name,granules", *lines]))
    reading = {"data.attributes_as_detection": True}
    config = adapt_config(root / "base", [tmp_path / "cells"], "detection", tmp_path / "run", overrides=reading)
    rows = training_rows(config)
    assert {name for row in rows["detection"] for cell in row["objects"]["morphology"] for name in cell} == {"granules"}
    build(config, rows)
    assert "Not learned: granules." in caplog.text


def test_what_is_said_of_the_data_is_said_once(lab, tmp_path, caplog):
    root, _ = lab
    shutil.copytree(root / "smears", tmp_path / "smears")
    path = tmp_path / "smears" / "train" / "annotations.json"
    content = json.loads(path.read_text())
    gone = content["categories"][-1]
    content["annotations"] = [cell for cell in content["annotations"] if cell["category_id"] != gone["id"]]
    content["annotations"].append(content["annotations"][0] | {"id": 10**6})
    path.write_text(json.dumps(content))
    adapt(
        root / "base", tmp_path / "smears", "detection", tmp_path / "run",
        overrides=SHORT | {"data.image_sizes": {"detection": {"longest_edge": 64}}},
    )  # fmt: skip
    assert caplog.text.count("1 boxes that stand in their image already") == 1
    (unseen,) = (message for message in caplog.messages if message.endswith("in the training data: not learned."))
    assert gone["name"] in unseen


def test_one_language_task_is_adapted_alone_and_its_batch_size_is_its_own(lab, tmp_path):
    root, _ = lab
    options = {"overrides": SHORT | {"data.batch_size": {"cloze": 2}}}
    alone = adapt_config(root / "base", [root / "smears"], "cloze", tmp_path / "cloze", **options)
    both = adapt_config(root / "base", [root / "smears"], "qa", tmp_path / "qa", **options)
    assert alone.data.tasks == ["cloze"] and both.data.tasks == ["question_answering", "cloze"]
    assert both.data.batch_size["cloze"] == 2 and both.data.batch_size["question_answering"] == 8


def test_stopped_while_the_base_is_measured_it_goes_on_or_starts_anew(lab, tmp_path, monkeypatch):
    root, _ = lab
    arguments = [
        "adapt",
        root / "base",
        root / "smears",
        "-t",
        "single_cell",
        "-o",
        tmp_path / "mine",
        "--max-steps",
        2,
    ]
    arguments += ["--image-size", "32", "--batch-size", "2"]

    def stopped(*given, **named):
        raise KeyboardInterrupt

    for more in ([], ["--overwrite"]):
        with monkeypatch.context() as patched:
            patched.setattr("unihema.training.studies.adapt.train", stopped)
            assert run(*arguments, *more).exit_code == 130
        assert (tmp_path / "mine" / "before_after.json").is_file()
        assert not (tmp_path / "mine" / "run_config.json").exists()
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_adapted_is_said(lab, tmp_path):
    root, _ = lab
    with pytest.raises(RunConfigError, match="Unknown task 'counting'; choose among detection, segmentation"):
        adapt(root / "base", root / "smears", "counting", tmp_path)
    with pytest.raises(RunConfigError, match="Unknown method 'prompt'"):
        adapt(root / "base", root / "smears", "detection", tmp_path, method="prompt")
    for more in ({"labels": ["blast"]}, {"start_from": {"blast": "WBC"}}):
        with pytest.raises(
            RunConfigError, match=f"{next(iter(more))}: segmentation has no classes; they are of detection"
        ):
            adapt(root / "base", root / "smears", "segmentation", tmp_path, **more)
    other = run(
        "adapt", root / "base", root / "smears", "-t", "cloze", "-o", tmp_path / "a", "--batch-size", "detection=2"
    )
    assert other.exit_code == 2 and "detection=N: that task is not asked for (--task cloze)" in other.output
    with pytest.raises(CheckpointError, match="is an adapter itself; adapt its base"):
        find_base(root / "adapter")
    with pytest.raises(CheckpointError, match="no such checkpoint folder, and no name of a repository"):
        find_base(tmp_path / "nothing" / "here")
    with pytest.raises(CheckpointError, match="lab/none: no such checkpoint folder, and not to be had from the Hub"):
        find_base("lab/none")
    before = sorted((root / "base").iterdir())
    again = ("adapt", root / "base", root / "smears", "--task", "detection", "-o", root / "base")
    with pytest.raises(RunConfigError, match="is the base itself, which stays as it is. Name another folder"):
        run(*again)
    shutil.copytree(root / "base", tmp_path / "other")
    with pytest.raises(RunConfigError, match="other holds model.safetensors of an earlier run"):
        run(*again[:-1], tmp_path / "other")
    assert sorted((root / "base").iterdir()) == before
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [path.name for path in before]
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DatasetError):
        adapt(root / "base", tmp_path / "empty", "detection", tmp_path / "run")
