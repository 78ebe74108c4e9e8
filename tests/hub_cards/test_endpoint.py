"""What answers on an Inference Endpoint: from a repository that was pushed, where only what the Hub installs is there."""

import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from local_hub import TOKEN, LocalHub
from packaging.requirements import Requirement
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from unihema.hub_cards import folder_card


REPO = "lab/smears"
QUESTION = "What type of white blood cell is this?"
# The image of an endpoint has these, and what they require.
OF_THE_HUB = ("transformers", "torch", "torchvision", "pillow", "huggingface_hub", "safetensors")

ASKED = f"""
import base64, io, json, sys
from huggingface_hub import snapshot_download
folder = snapshot_download({REPO!r}, local_dir="repository")
sys.path.insert(0, folder)
from handler import EndpointHandler
from PIL import Image
answer = EndpointHandler(folder)
image = base64.b64encode(open("smear.png", "rb").read()).decode()
cells = answer({{"inputs": image}})
assert cells and cells == answer({{"inputs": Image.open("smear.png")}}) and {{"label", "score", "box"}} <= cells[0].keys()
assert cells == answer({{"inputs": "data:image/png;base64," + image}})
asked = {{"image": image, "question": {QUESTION!r}}}
told = answer({{"inputs": asked, "parameters": {{"max_new_tokens": 6}}}})
assert told[0].keys() >= {{"answer", "score"}}
assert answer({{"inputs": image, "parameters": {{"task": "image-classification"}}}})[0]["score"] <= 1
(mask,) = answer({{"inputs": image, "parameters": {{"task": "image-segmentation"}}}})
Image.open(io.BytesIO(base64.b64decode(mask["mask"]))).load()
json.dumps([cells, mask, told])
bomb = io.BytesIO()
Image.new("1", (9000, 9000)).save(bomb, "PNG")
larger = io.BytesIO()
Image.new("1", (20000, 20000)).save(larger, "PNG")
for inputs, parameters, said in (
    (None, {{}}, "an image is needed"),
    ("http://127.0.0.1/smear.png", {{}}, "an image is sent as base64"),
    ("/etc/passwd.", {{}}, "an image is sent as base64"),
    (base64.b64encode(b"no image").decode(), {{}}, "cannot identify image file"),
    (image[: len(image) // 8 * 4], {{}}, "truncated or damaged"),
    (bomb.getvalue(), {{}}, "9000 x 9000 pixels"),
    (larger.getvalue(), {{}}, "decompression bomb"),
    (image, {{"task": "dancing"}}, "there is no task 'dancing'"),
    (image, {{"task": "visual-question-answering"}}, "a question is a text"),
    (image, {{"nonsense": 1}}, ""),
    (image, [1], ""),
):
    found = answer({{"inputs": inputs, "parameters": parameters}})
    assert set(found) == {{"error"}} and said in found["error"], (found, said)
for name in ("unihema", "peft", "datasets", "accelerate", "evaluate"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{{name}} is here")
"""


def required(names: list[str]) -> set[Path]:
    """What lies in site-packages of distributions and of all that they require, without extras."""
    found, waiting, seen = set(), list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            one = distribution(name)
        except PackageNotFoundError:
            continue
        for file in one.files or ():
            if ".." not in file.parts and Path(file.parts[0]).suffix != ".pth":
                found.add(Path(one.locate_file(file.parts[0])))
        for each in map(Requirement, one.requires or ()):
            if each.marker is None or each.marker.evaluate({"extra": ""}):
                waiting.append(each.name)
    return found


def test_an_endpoint_answers_where_only_what_the_hub_installs_is_there(tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint")
    card = folder_card(checkpoint, licence="mit", data_licences={"smears": "mit"})
    (checkpoint / "README.md").write_text(card, encoding="utf-8")
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "smear.png")
    hub = LocalHub()
    try:
        pushed = subprocess.run(
            [sys.executable, "-m", "unihema", "push", str(checkpoint), REPO, "--endpoint"],
            capture_output=True, text=True, timeout=600, env=hub.environment(tmp_path / "home"),
        )  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr
        requirements = hub.files(REPO)["requirements.txt"].decode().splitlines()
        home = tmp_path / "endpoint"
        venv.create(home, symlinks=True, with_pip=False)
        bare = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
        for entry in required([*OF_THE_HUB, *(Requirement(line).name for line in requirements)]):
            if entry.exists() and not (bare / entry.name).exists():
                (bare / entry.name).symlink_to(entry)
        environment = hub.environment(tmp_path / "other_home", TOKEN) | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
        done = subprocess.run(
            [home / "bin" / "python", "-c", ASKED],
            capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    finally:
        hub.close()


def test_what_an_endpoint_requires_is_what_the_checkpoints_code_imports(tmp_path):
    """Every library that the code beside the weights imports stands in requirements.txt."""
    from transformers.dynamic_module_utils import get_imports

    from unihema.hub_cards.push import _REQUIREMENTS
    from unihema.modeling_unihema.remote_code import write_code

    named = {Requirement(line.strip()).name for line in _REQUIREMENTS}
    imported = {name for file in write_code(tmp_path) for name in get_imports(tmp_path / file)} - set(
        sys.stdlib_module_names
    )
    distributions = {"PIL": "pillow"}
    # Transformers brings these.
    assert {distributions.get(name, name) for name in imported} - named <= {"numpy", "huggingface_hub"}
