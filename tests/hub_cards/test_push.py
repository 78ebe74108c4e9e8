"""Pushing to a Hub on this machine, through its failures, and loading back from it in a fresh interpreter."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from card_code import code_of
from local_hub import TOKEN, LocalHub
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint

import unihema
from unihema.hub_cards import DataRecord, DataSource, adapter_card, folder_card
from unihema.modeling_unihema.modeling_unihema import UniHemaForDetection


REPO, ADAPTER = "lab/smears", "lab/smears-lora"
DATA = DataRecord((DataSource("smears", "cc-by-4.0", "https://example.org/smears", {"train": 30, "val": 10}),))


@pytest.fixture
def hub():
    hub = LocalHub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with its card, and an adapter of it with its own, neither of them on any Hub."""
    root = tmp_path_factory.mktemp("made")
    checkpoint = save_tiny_checkpoint(root / "checkpoint")
    card = folder_card(checkpoint, licence="cc-by-4.0", data_licences={"smears": "cc-by-4.0"}, name="Smears")
    (checkpoint / "README.md").write_text(card, encoding="utf-8")
    for name in ("checkpoints/step-00000002/optimizer.bin", "log.jsonl", "patients.csv"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("0")
    base = UniHemaForDetection.from_pretrained(checkpoint)
    torch.manual_seed(1)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(root / "adapter")
    values = json.loads((root / "adapter" / "adapter_config.json").read_text())
    card = adapter_card(values, REPO, "detection", name="Smears, adapted", licence="cc-by-4.0", data=DATA)
    (root / "adapter" / "README.md").write_text(card, encoding="utf-8")
    return root


@pytest.fixture
def checkpoint(made, tmp_path):
    return shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")


def push(hub, home, *arguments, token=TOKEN):
    """`unihema push` in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "unihema", "push", *map(str, arguments)],
        capture_output=True, text=True, timeout=600, env=hub.environment(home, token),
    )  # fmt: skip
    assert token not in result.stdout + result.stderr and "Traceback" not in result.stderr
    return result


def python(hub, home, code, cwd):
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=600, env=hub.environment(home), cwd=cwd,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_model_and_adapter_come_back_equal_in_a_fresh_interpreter(hub, made, tmp_path):
    first = push(hub, tmp_path / "home", made / "checkpoint", REPO, "-m", "First smears")
    assert first.returncode == 0, first.stderr
    assert "checkpoints (training checkpoints with optimizer state)" in first.stdout
    assert "patients.csv (not part of a checkpoint)" in first.stdout and "(private)" in first.stdout
    files = hub.files(REPO)
    assert hub.repos[REPO].private and hub.titles(REPO) == ["initial commit", "First smears"]
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert {"modeling_unihema.py", "pipelines.py"} <= files.keys()
    assert not {"log.jsonl", "patients.csv"} & files.keys() and not [name for name in files if "/" in name]
    assert files["model.safetensors"] == (made / "checkpoint" / "model.safetensors").read_bytes()
    # The code of the card names the repository; the file here still names its folder.
    assert f'REPO = "{REPO}"' in files["README.md"].decode()
    assert 'REPO = "."' in (made / "checkpoint" / "README.md").read_text()
    assert all(TOKEN.encode() not in content for content in files.values())

    second = push(hub, tmp_path / "home", made / "adapter", ADAPTER, "--base", REPO)
    assert second.returncode == 0, second.stderr
    pushed = json.loads(hub.files(ADAPTER)["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == REPO
    assert set(hub.files(ADAPTER)) == {
        ".gitattributes",
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }

    code = f"""
import torch, unihema
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForObjectDetection, AutoProcessor
base = AutoModelForObjectDetection.from_pretrained("{REPO}").eval()
processor = AutoProcessor.from_pretrained("{REPO}")
image = torch.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).byte().numpy()
inputs = processor(images=image, task="detection")
with torch.no_grad():
    found = {{"plain": base(**inputs).logits.clone()}}
    model = PeftModel.from_pretrained(base, "{ADAPTER}").eval()
    found["adapted"] = model(**inputs).logits.clone()
    direct = AutoModelForObjectDetection.from_pretrained("{ADAPTER}").eval()
    found["direct"] = direct(**inputs).logits.clone()
save_file(found, "found.safetensors")
"""
    python(hub, tmp_path / "fresh", code, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    torch.testing.assert_close(found["plain"], outputs(made / "checkpoint"), rtol=0, atol=0)
    torch.testing.assert_close(found["adapted"], outputs(made / "checkpoint", made / "adapter"), rtol=0, atol=0)
    torch.testing.assert_close(found["direct"], found["adapted"], rtol=0, atol=1e-6)
    assert (found["plain"] - found["adapted"]).abs().max() > 1e-3


def outputs(checkpoint, adapter=None):
    """What the folders on this disk answer."""
    from peft import PeftModel

    model = UniHemaForDetection.from_pretrained(checkpoint).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    image = torch.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).byte().numpy()
    inputs = unihema.UniHemaProcessor.from_pretrained(checkpoint)(images=image, task="detection")
    with torch.no_grad():
        return model(**inputs).logits


def test_nothing_goes_up_but_what_was_listed(hub, checkpoint, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("of nobody's business")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text("{}")
    (checkpoint / "link.json").symlink_to(secret)
    (checkpoint / "linked").symlink_to(tmp_path / "private")
    (checkpoint / "metrics").mkdir()
    for stray in (".env", ".token", "notes.md", "model-old.safetensors", "[m]*.json", "metrics/metrics.json"):
        (checkpoint / stray).write_text("of nobody's business")
    listed = push(hub, tmp_path, checkpoint, REPO, "--dry-run")
    assert listed.returncode == 0, listed.stderr
    promised = {line.split()[1] for line in listed.stdout.splitlines() if re.match(r" +[\d,]+  \S+$", line)}
    pushed = push(hub, tmp_path, checkpoint, REPO)
    assert pushed.returncode == 0, pushed.stderr
    files = hub.files(REPO)
    assert set(files) - {".gitattributes"} == promised
    assert not any(b"of nobody's business" in content for content in [*files.values(), *hub.stored.values()])
    # Not even what was sent and then left out of the commit.
    assert set(hub.stored.values()) <= set(files.values())


def test_a_checkpoint_that_was_downloaded_is_pushed(hub, checkpoint, tmp_path):
    # The Hub's cache is made of links.
    blobs = shutil.move(checkpoint, tmp_path / "blobs")
    checkpoint.mkdir()
    for path in Path(blobs).iterdir():
        (checkpoint / path.name).symlink_to(Path("..") / "blobs" / path.name)
    pushed = push(hub, tmp_path, checkpoint, REPO)
    assert pushed.returncode == 0, pushed.stderr
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "blobs" / "model.safetensors").read_bytes()


def test_an_adapter_is_not_put_beside_its_base(hub, made, tmp_path):
    assert push(hub, tmp_path, made / "checkpoint", REPO).returncode == 0
    before = set(hub.files(REPO))
    own = push(hub, tmp_path, made / "adapter", REPO, "--base", REPO)
    assert own.returncode == 2 and f"{REPO}: the adapter's base is there, and would be replaced" in own.stderr
    assert set(hub.files(REPO)) == before and "model.safetensors" in before


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, made, tmp_path):
    result = push(hub, tmp_path, made / "checkpoint", REPO, "--dry-run", "--revision", "try")
    assert result.returncode == 0, result.stderr
    assert "model.safetensors" in result.stdout and "Nothing was sent." in result.stdout
    assert f"to {REPO} at try (private)" in result.stdout and hub.requests == []


def test_a_revision_is_made_and_main_stays(hub, made, tmp_path):
    result = push(hub, tmp_path, made / "checkpoint", REPO, "--revision", "try", "--public")
    assert result.returncode == 0, result.stderr
    assert set(hub.files(REPO)) == {".gitattributes"} and "model.safetensors" in hub.files(REPO, "try")
    assert not hub.repos[REPO].private and "(public)" in result.stdout


def test_a_push_that_changes_nothing_makes_no_commit(hub, made, tmp_path):
    assert push(hub, tmp_path, made / "checkpoint", REPO).returncode == 0
    again = push(hub, tmp_path, made / "checkpoint", REPO)
    assert again.returncode == 0, again.stderr
    assert hub.titles(REPO) == ["initial commit", "Upload checkpoint"] and hub.count("PUT") == 1


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(hub, made, checkpoint, tmp_path):
    assert push(hub, tmp_path, checkpoint, REPO).returncode == 0
    model = unihema.UniHemaForMultiTask.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="100KB")
    again = push(hub, tmp_path, checkpoint, REPO)
    assert again.returncode == 0, again.stderr
    assert "model.safetensors" not in hub.files(REPO) and "model.safetensors.index.json" in hub.files(REPO)


def test_a_public_repository_is_not_pushed_to_unasked(hub, made, tmp_path):
    assert push(hub, tmp_path, made / "checkpoint", REPO, "--public").returncode == 0
    refused = push(hub, tmp_path, made / "checkpoint", REPO)
    assert refused.returncode == 2 and f"{REPO}: is public already" in refused.stderr and "--public" in refused.stderr


def test_an_adapter_whose_base_is_not_on_the_hub_is_not_pushed(hub, made, tmp_path):
    result = push(hub, tmp_path, made / "adapter", ADAPTER, "--base", REPO)
    assert result.returncode == 2 and f"{REPO} (the adapter's base): 404" in result.stderr and hub.repos == {}


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("POST /api/repos/create", 403, "the token may not write there"),
        ("commit/main", 403, "the token may not write there"),
        ("commit/main", 409, "somebody else is writing to it"),
        ("commit/main", 412, "somebody else has written to it meanwhile"),
        ("commit/main", 418, "the Hub refused it"),
    ],
)
def test_a_refusal_names_the_repository_and_the_remedy(hub, made, tmp_path, pattern, status, message):
    hub.fail(pattern, status)
    result = push(hub, tmp_path, made / "checkpoint", REPO)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith(f"unihema: {REPO}: {status} (as the test asked for): ")
    assert message in result.stderr
    assert "model.safetensors" not in (hub.files(REPO) if REPO in hub.repos else {})


def test_a_wrong_token_is_refused_and_not_shown(hub, made, tmp_path):
    result = push(hub, tmp_path, made / "checkpoint", REPO, token="hf_wrongtokenwrongtokenwrongtokenwrong")
    assert result.returncode == 2 and f"{REPO}: 401" in result.stderr and "hf auth login" in result.stderr
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("pattern", "status", "headers"),
    [
        ("POST /api/repos/create", 429, {"Retry-After": "1"}),
        ("commit/main", 429, {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}),
        pytest.param("commit/main", 503, {}, marks=pytest.mark.slow),
        pytest.param("commit/main", None, {}, marks=pytest.mark.slow),
        pytest.param("preupload/main", 429, {"Retry-After": "0"}, marks=pytest.mark.slow),
    ],
)
def test_what_passes_is_tried_again(hub, made, tmp_path, pattern, status, headers):
    hub.fail(pattern, status, **headers)
    result = push(hub, tmp_path, made / "checkpoint", REPO)
    assert result.returncode == 0, result.stderr
    assert hub.count(pattern) == 2 and hub.titles(REPO) == ["initial commit", "Upload checkpoint"]


def test_too_many_requests_for_too_long_end_with_a_remedy(hub, made, tmp_path):
    hub.fail("POST /api/repos/create", 429, times=99, **{"Retry-After": "0"})
    result = push(hub, tmp_path, made / "checkpoint", REPO)
    assert result.returncode == 2 and f"{REPO}: 429" in result.stderr and "Wait some minutes" in result.stderr
    assert hub.count("repos/create") == 5


def test_a_connection_cut_in_mid_upload_is_taken_up_again(hub, made, tmp_path):
    hub.fail("PUT /storage/", None, times=2)
    result = push(hub, tmp_path, made / "checkpoint", REPO)
    assert result.returncode == 0, result.stderr
    assert hub.count("PUT /storage/") == 3
    assert hub.files(REPO)["model.safetensors"] == (made / "checkpoint" / "model.safetensors").read_bytes()


def test_a_push_that_broke_off_sends_only_what_had_not_arrived(hub, checkpoint, tmp_path):
    model = unihema.UniHemaForMultiTask.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="100KB")
    shards = len(list(checkpoint.glob("model-*.safetensors")))
    assert shards > 2
    hub.fail("commit/main", 409)
    assert push(hub, tmp_path, checkpoint, REPO).returncode == 2
    # One of them did not arrive after all.
    hub.stored.pop(sorted(hub.stored)[0])
    sent = hub.count("PUT /storage/")
    again = push(hub, tmp_path, checkpoint, REPO)
    assert again.returncode == 0, again.stderr
    assert (sent, hub.count("PUT /storage/")) == (shards, shards + 1)
    assert hub.count("commit/main") == 2


def test_metadata_that_the_hub_refuses_are_named_before_anything_is_uploaded(hub, checkpoint, tmp_path):
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace("license: cc-by-4.0", "license: osl-3.0"))
    result = push(hub, tmp_path, checkpoint, REPO)
    assert result.returncode == 2 and "README.md" in result.stderr and "must be one of the others" in result.stderr
    assert hub.count("PUT") == 0


def test_models_processors_and_adapters_push_from_python(hub, made, tmp_path):
    code = f"""
from pathlib import Path
from peft import PeftModel
import unihema
from unihema.hub_cards import push_to_hub
made = Path({str(made)!r})
model = unihema.UniHemaForDetection.from_pretrained(made / "checkpoint")
processor = unihema.UniHemaProcessor.from_pretrained(made / "checkpoint")
card = (made / "checkpoint" / "README.md").read_text()
done = push_to_hub(model, "{REPO}", processor=processor, card=card, commit_message="From Python")
print(done.private, done.plan.kind)
try:
    push_to_hub(model, "{REPO}", card=card)
except unihema.CheckpointError as error:
    print(error)
adapted = PeftModel.from_pretrained(model, made / "adapter")
card = (made / "adapter" / "README.md").read_text()
done = push_to_hub(adapted, "{ADAPTER}", card=card, base_model="{REPO}", private=False)
print(done.private, done.plan.kind)
"""
    shown = python(hub, tmp_path, code, tmp_path).splitlines()
    assert shown[0] == "True checkpoint" and shown[-1] == "False adapter"
    assert "processor_config.json" in shown[1]
    assert hub.titles(REPO)[-1] == "From Python" and hub.repos[REPO].private and not hub.repos[ADAPTER].private


def test_the_libraries_own_push_to_hub_works_as_well(hub, made, tmp_path):
    code = f"""
from pathlib import Path
from peft import PeftModel
import unihema
made = Path({str(made)!r})
model = unihema.UniHemaForMultiTask.from_pretrained(made / "checkpoint")
model.push_to_hub("{REPO}", private=True)
unihema.UniHemaProcessor.from_pretrained(made / "checkpoint").push_to_hub("{REPO}")
detector = unihema.UniHemaForDetection.from_pretrained("{REPO}")
PeftModel.from_pretrained(detector, made / "adapter").push_to_hub("{ADAPTER}", private=True)
unihema.UniHemaProcessor.from_pretrained("{REPO}")
PeftModel.from_pretrained(detector, "{ADAPTER}")
"""
    python(hub, tmp_path, code, tmp_path)
    assert {"model.safetensors", "processor_config.json", "tokenizer.json"} <= hub.files(REPO).keys()
    assert hub.repos[REPO].private and hub.repos[ADAPTER].private


def test_the_code_of_pushed_cards_runs(hub, made, tmp_path):
    assert push(hub, tmp_path / "home", made / "checkpoint", REPO).returncode == 0
    assert push(hub, tmp_path / "home", made / "adapter", ADAPTER, "--base", REPO).returncode == 0
    for name in ("smear.png", "cell.png"):
        Image.new("RGB", (64, 48), "pink").save(tmp_path / name)
    for repo_id in (REPO, ADAPTER):
        code = code_of(hub.files(repo_id)["README.md"].decode())
        assert f'REPO = "{repo_id}"' in code
        assert python(hub, tmp_path / "fresh", code, tmp_path)


def test_offline_is_said(hub, made, tmp_path):
    environment = {**hub.environment(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "unihema", "push", str(made / "checkpoint"), REPO],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert result.returncode == 2 and "HF_HUB_OFFLINE is set" in result.stderr and hub.requests == []
