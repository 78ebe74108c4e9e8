"""Checkpoints that bring their code: loaded with `trust_remote_code=True` where `unihema` cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint
from transformers import AutoConfig, AutoModelForObjectDetection, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import unihema
from unihema.modeling_unihema.remote_code import auto_map, code_files, custom_pipelines, write_code


CUSTOM_PIPELINES = custom_pipelines()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUESTION = "What type of white blood cell is this?"
HEADS = {
    "AutoModelForObjectDetection": ("detection", "logits"),
    "AutoModelForImageSegmentation": ("segmentation", "mask_logits"),
    "AutoModelForSemanticSegmentation": ("segmentation", "mask_logits"),
    "AutoModelForImageClassification": ("single_cell", "logits"),
}

# Runs here with the package and in another interpreter without it; `trust` tells the two apart.
RESULTS = f"""
import torch, transformers

def results(folder, image, **trust):
    processor = transformers.AutoProcessor.from_pretrained(folder, **trust)
    found = {{}}
    for auto, (task, output) in {HEADS!r}.items():
        model = getattr(transformers, auto).from_pretrained(folder, **trust).eval()
        with torch.no_grad():
            found[auto] = model(**processor(images=image, task=task))[output]
    model = transformers.AutoModel.from_pretrained(folder, **trust).eval()
    with torch.no_grad():
        found["AutoModel"] = model(**processor(images=image, task="detection"))[0]
    asked = processor(images=image, text={QUESTION!r})
    for auto in ("AutoModelForVisualQuestionAnswering", "AutoModelForImageTextToText"):
        model = getattr(transformers, auto).from_pretrained(folder, **trust).eval()
        found[auto] = model.generate(**asked, max_new_tokens=6, do_sample=False)
    image_processor = transformers.AutoImageProcessor.from_pretrained(folder, **trust)
    found["pixels"] = image_processor(image)["pixel_values"]
    for task in {list(CUSTOM_PIPELINES)!r}:
        pipe = transformers.pipeline(task, model=folder, **trust)
        options = {{"question": {QUESTION!r}, "max_new_tokens": 6}} if "question" in task else {{}}
        entries = pipe(image, **options)
        found[task] = torch.tensor([entry["score"] for entry in entries])
        found[task + " names"] = [entry.get("label", entry.get("answer")) for entry in entries]
    return found
"""

WITHOUT_UNIHEMA = """
try:
    import unihema
except ImportError:
    pass
else:
    raise AssertionError(f"unihema can be imported: {unihema.__file__}")
"""

LOADED_FROM_CHECKPOINT = """
import os, sys
own = [name for name in sys.modules if "unihema" in name]
assert own and all(name.startswith("transformers_modules.") for name in own), own
cache = os.path.realpath(os.environ["HF_MODULES_CACHE"])
assert all(os.path.realpath(sys.modules[n].__file__).startswith(cache) for n in own if sys.modules[n].__file__), own
"""


@pytest.fixture(scope="module")
def without_unihema(tmp_path_factory):
    """Runs code in a virtual environment that has everything but `unihema`, with no cached code of checkpoints."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, symlinks=True, with_pip=False)
    bare = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    for kind in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(kind)).iterdir():
            # Another .pth file may lead to where the package is, or import it.
            if "unihema" not in entry.name and entry.suffix != ".pth" and not (bare / entry.name).exists():
                (bare / entry.name).symlink_to(entry)

    def run(code: str, cwd: Path) -> None:
        environment = os.environ | {
            "HF_MODULES_CACHE": str(cwd / "modules"),
            "HF_HUB_CACHE": str(cwd / "hub"),
            "HF_HUB_OFFLINE": "1",
        }
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
        result = subprocess.run(
            [home / "bin" / "python", "-c", WITHOUT_UNIHEMA + code],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=cwd,
            env=environment,
        )
        assert result.returncode == 0, result.stderr

    return run


def results(folder: Path, image: Path, **trust) -> dict:
    names = {}
    exec(RESULTS, names)
    return names["results"](str(folder), str(image), **trust)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                found[name], value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert found[name] == value, name


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a checkpoint, the same one as the Hub's cache keeps it, and an image."""
    root = tmp_path_factory.mktemp("lab")
    save_tiny_checkpoint(root / "checkpoint")
    cached = root / "hub" / "models--someone--blood-1.0"
    shutil.copytree(root / "checkpoint", cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(root / "smear.png")
    return root


@pytest.mark.parametrize("source", ["checkpoint", "someone/blood-1.0"])
def test_a_checkpoint_gives_the_same_results_without_the_package(lab, without_unihema, source):
    code = (
        RESULTS
        + f"found = results({source!r}, 'smear.png', trust_remote_code=True)\n"
        + "torch.save(found, 'found.pt')\n"
        + LOADED_FROM_CHECKPOINT
    )
    without_unihema(code, lab)
    expected = results(lab / "checkpoint", lab / "smear.png")
    assert expected["visual-question-answering names"] and expected["object-detection names"]
    assert_same(torch.load(lab / "found.pt"), expected)


@pytest.mark.parametrize(
    ("source", "pipelines"),
    # Of a repository on the Hub only what was used is there to be saved again.
    [("checkpoint", CUSTOM_PIPELINES), ("someone/blood-1.0", {})],
)
def test_a_checkpoint_saved_again_without_the_package_brings_its_code(lab, without_unihema, source, pipelines):
    shutil.rmtree(lab / "again", ignore_errors=True)
    shutil.rmtree(lab / "modules", ignore_errors=True)
    code = f"""
from transformers import AutoModelForObjectDetection, AutoProcessor
AutoModelForObjectDetection.from_pretrained({source!r}, trust_remote_code=True).save_pretrained("again")
AutoProcessor.from_pretrained({source!r}, trust_remote_code=True).save_pretrained("again")
again = AutoModelForObjectDetection.from_pretrained("again", trust_remote_code=True)
assert type(again).__name__ == "UniHemaForDetection"
"""
    without_unihema(code, lab)
    first, again = ({path.name: path for path in (lab / name).iterdir()} for name in ("checkpoint", "again"))
    assert first.keys() - again.keys() == {"generation_config.json"} | (
        set() if pipelines else {"pipelines.py", "questions.py"}
    )
    assert all(again[name].read_bytes() == first[name].read_bytes() for name in again if name.endswith(".py"))
    settings = json.loads(again["config.json"].read_text(encoding="utf-8"))
    assert settings["auto_map"] == auto_map()
    assert settings["custom_pipelines"] == pipelines
    assert type(unihema.UniHemaForDetection.from_pretrained(lab / "again")) is unihema.UniHemaForDetection


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_the_installed_classes_are_used_where_there_are_any(lab, trust, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the checkpoint's code"))
    folder = str(lab / "checkpoint")
    assert type(AutoConfig.from_pretrained(folder, **trust)) is unihema.UniHemaConfig
    assert type(AutoModelForObjectDetection.from_pretrained(folder, **trust)) is unihema.UniHemaForDetection
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert type(processor) is unihema.UniHemaProcessor
    assert type(processor.image_processor) is unihema.UniHemaImageProcessor
    for task in CUSTOM_PIPELINES:
        pipe = pipeline(task, model=folder, **trust)
        assert type(pipe).__module__ == "unihema.processing_unihema.pipelines"
        assert type(pipe.model).__module__.startswith("unihema.modeling_unihema.")


def test_without_its_code_a_checkpoint_still_loads_with_the_package(lab, tmp_path):
    save_tiny_checkpoint(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.unlink()
    image = lab / "smear.png"
    assert_same(results(tmp_path, image, trust_remote_code=True), results(lab / "checkpoint", image))


def test_every_registered_class_can_be_loaded_from_a_checkpoint():
    config_class = unihema.UniHemaConfig
    registered = {"AutoConfig": config_class}
    for name in filter(lambda name: name.startswith("AutoModel"), dir(transformers)):
        mapping = getattr(getattr(transformers, name), "_model_mapping", {})
        if config_class in mapping:
            registered[name] = mapping[config_class]
    assert {name: cls.__name__ for name, cls in registered.items()} == {
        name: reference.partition(".")[2] for name, reference in auto_map().items()
    }
    for reference in auto_map().values():
        module, _, name = reference.partition(".")
        assert hasattr(import_module(f"unihema.modeling_unihema.{module}"), name)
    for task, entry in CUSTOM_PIPELINES.items():
        module, _, name = entry["impl"].partition(".")
        implementation = transformers.pipelines.PIPELINE_REGISTRY.supported_tasks[task]["impl"]
        assert (implementation.__module__.rpartition(".")[2], implementation.__name__) == (module, name)


def test_the_code_is_flat_and_needs_nothing_but_what_the_page_says(tmp_path):
    names = write_code(tmp_path)
    assert names == list(code_files()) and len(names) <= 32
    files = [tmp_path / name for name in names]
    assert {f"{name}.py" for file in files for name in get_relative_imports(file)} <= set(names)
    standard = set(sys.stdlib_module_names)
    assert {name for file in files for name in get_imports(file)} - standard == {
        *("huggingface_hub", "numpy", "PIL", "scipy", "torch", "torchvision", "transformers"),
    }


def test_saving_a_configuration_leaves_it_as_it_was_and_writes_no_package(tmp_path):
    config = unihema.UniHemaConfig.tiny()
    before = config.to_dict()
    config.save_pretrained(tmp_path)
    assert config.to_dict() == before
    assert not (tmp_path / "__init__.py").exists() and not list(tmp_path.glob("*/"))
    assert unihema.UniHemaConfig.from_pretrained(tmp_path).to_dict().keys() == before.keys()


def test_an_image_processor_alone_brings_its_code(tmp_path, without_unihema):
    unihema.UniHemaImageProcessor().save_pretrained(tmp_path)
    without_unihema(
        "from transformers import AutoImageProcessor\n"
        "processor = AutoImageProcessor.from_pretrained('.', trust_remote_code=True)\n"
        "assert type(processor).__name__ == 'UniHemaImageProcessor'\n",
        tmp_path,
    )
