"""What a push takes of a folder, and what it refuses, before any network is touched."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from tiny_checkpoint import save_tiny_checkpoint

from unihema import CheckpointError, UniHemaForDetection
from unihema.errors import CardError
from unihema.hub_cards import DataRecord, DataSource, adapter_card, folder_card, plan_push


REPO = "lab/smears"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    folder = save_tiny_checkpoint(root / "checkpoint")
    card = folder_card(folder, licence="mit", data_licences={"smears": "mit"})
    (folder / "README.md").write_text(card, encoding="utf-8")
    model = UniHemaForDetection.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root / "adapter")
    return root


@pytest.fixture
def checkpoint(made, tmp_path):
    return shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")


@pytest.fixture
def adapter(made, tmp_path):
    return shutil.copytree(made / "adapter", tmp_path / "adapter")


def test_what_loading_needs_goes_and_nothing_else(checkpoint):
    (checkpoint / "checkpoints" / "step-00000002").mkdir(parents=True)
    (checkpoint / "checkpoints" / "step-00000002" / "optimizer.bin").write_bytes(b"0")
    for name in ("log.jsonl", "notes.txt", "smear.png", "stray.py", "model-00001-of-00002.safetensors", ".hidden"):
        (checkpoint / name).write_bytes(b"0")
    (checkpoint / "metrics.json").write_text("{}")
    plan = plan_push(checkpoint, REPO)
    names = set(plan.files)
    assert {"config.json", "model.safetensors", "README.md", "metrics.json", "tasks.py", "modeling_unihema.py"} <= names
    assert plan.kind == "checkpoint" and plan.sizes.keys() == names
    assert plan.left_out == {
        "checkpoints": "training checkpoints with optimizer state",
        "log.jsonl": "log of the training",
        "model-00001-of-00002.safetensors": "not part of a checkpoint",
        "notes.txt": "not part of a checkpoint",
        "smear.png": "not part of a checkpoint",
        "stray.py": "not part of a checkpoint",
    }


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "training_args.bin", "state.pt", "model.ckpt"])
def test_pickled_files_are_refused(checkpoint, name):
    (checkpoint / name).write_bytes(b"0")
    with pytest.raises(CheckpointError, match=rf"{name}: pickled files are not pushed.*save_pretrained"):
        plan_push(checkpoint, REPO)


def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        plan_push(tmp_path / "nowhere", REPO)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged weights"):
        plan_push(checkpoint, REPO)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint without tokenizer.json"):
        plan_push(checkpoint, REPO)


def test_weights_outside_the_folder_are_refused(checkpoint, tmp_path):
    shutil.move(checkpoint / "model.safetensors", tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../elsewhere.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError,
        match=r"index.json: names the file .*elsewhere.safetensors.; it lists safetensors files of its own folder",
    ):
        plan_push(checkpoint, REPO)


def test_a_folder_without_a_card_is_refused(checkpoint):
    (checkpoint / "README.md").unlink()
    with pytest.raises(CardError, match=r"no README.md. Write the card with `unihema card .*--license"):
        plan_push(checkpoint, REPO)
    (checkpoint / "README.md").write_text("# My model\n")
    with pytest.raises(CardError, match="no metadata at its beginning"):
        plan_push(checkpoint, REPO)


def test_a_card_with_other_figures_than_those_measured_is_refused(checkpoint):
    (checkpoint / "metrics.json").write_text(json.dumps({"detection": {"mAP50": 0.71239, "rows": 5}}))
    text = folder_card(checkpoint, licence="mit", data_licences={"smears": "mit"})
    (checkpoint / "README.md").write_text(text, encoding="utf-8")
    plan_push(checkpoint, REPO)
    (checkpoint / "metrics.json").write_text(json.dumps({"detection": {"mAP50": 0.4, "rows": 5}}))
    with pytest.raises(CardError, match=r"its detection mAP50 is 0.7124, that of metrics.json 0.4000"):
        plan_push(checkpoint, REPO)


def test_a_name_that_is_no_repository_is_refused(checkpoint):
    for name in ("smears", "lab/my smears", "https://huggingface.co/lab/smears", "../lab/smears"):
        with pytest.raises(ValueError, match="is no repository id"):
            plan_push(checkpoint, name)


def test_a_token_in_a_file_is_not_published(checkpoint):
    (checkpoint / "run_config.json").write_text(json.dumps({"token": "hf_" + "a1" * 17}))
    with pytest.raises(CheckpointError, match=r"run_config.json: holds what looks like a token") as error:
        plan_push(checkpoint, REPO)
    assert "a1a1" not in str(error.value)


def test_an_adapter_needs_a_base_that_others_have(adapter):
    with pytest.raises(CheckpointError, match=r"adapter's base is .*a folder that nobody else has.*--base"):
        plan_push(adapter, REPO)
    # The card that PEFT writes has fields for somebody else to fill in.
    with pytest.raises(CardError, match="no `license` in its metadata"):
        plan_push(adapter, REPO, "lab/base")
    values = json.loads((adapter / "adapter_config.json").read_text())
    data = DataRecord((DataSource("mine", "mit"),))
    card = adapter_card(values, "lab/base", "detection", name="Mine", licence="mit", data=data)
    (adapter / "README.md").write_text(card, encoding="utf-8")
    plan = plan_push(adapter, REPO, "lab/base")
    assert set(plan.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    with pytest.raises(CardError, match="`base_model` is 'lab/base', but the adapter belongs to 'lab/another'"):
        plan_push(adapter, REPO, "lab/another")
    assert json.loads(plan.files["adapter_config.json"]) == {**values, "base_model_name_or_path": "lab/base"}
    assert json.loads((adapter / "adapter_config.json").read_text()) == values
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter without adapter_model.safetensors"):
        plan_push(adapter, REPO, "lab/base")


def test_an_endpoint_is_of_a_checkpoint(checkpoint, adapter):
    files = plan_push(checkpoint, REPO, endpoint=True).files
    assert b"class EndpointHandler" in files["handler.py"] and b"timm" in files["requirements.txt"]
    assert not {"handler.py", "requirements.txt"} & plan_push(checkpoint, REPO).files.keys()
    with pytest.raises(CheckpointError, match="an adapter is no endpoint"):
        plan_push(adapter, REPO, base_model="lab/base", endpoint=True)
