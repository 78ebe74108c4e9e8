"""What `import unihema` costs and does."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint


def python(code: str, cwd=None) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


TRAINING_ONLY = ["datasets", "pandas", "pyarrow", "matplotlib", "peft", "evaluate", "sacrebleu", "faster_coco_eval"]


def test_the_packages_of_training_and_the_import_system_are_left_alone():
    code = (
        "import sys, unihema\n"
        "from pathlib import Path\n"
        "files = Path(unihema.__file__).parent / 'shipped_files'\n"
        "unihema.Analyzer.from_pretrained(files / 'checkpoint')(files / 'examples' / 'white_cell_1.jpg')\n"
        f"print([name for name in {TRAINING_ONLY} if name in sys.modules],"
        " [hook for hook in sys.meta_path if 'unihema' in repr(hook)])"
    )
    assert python(code).strip() == "[] []"


def test_an_analysis_needs_no_package_of_training(tmp_path):
    """Also where a light install has left them out, accelerate among them, which Transformers takes where it is there."""
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint")
    Image.new("RGB", (32, 24)).save(tmp_path / "smear.png")
    arguments = ["unihema", "predict", str(checkpoint), str(tmp_path / "smear.png"), "-o", str(tmp_path / "results")]
    code = (
        f"import sys\nsys.modules |= dict.fromkeys({[*TRAINING_ONLY, 'accelerate']})\nsys.argv = {arguments}\n"
        "from unihema_cli import main\nmain()"
    )
    assert "1 analysed, 0 already done, 0 failed." in python(code)
    assert (tmp_path / "results" / "cells.csv").is_file()


def test_import_touches_no_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import unihema\n"
        "from transformers import AutoModel, AutoProcessor, pipeline\n"
        "print(unihema.__version__)"
    )
    assert python(code).startswith("0.")


@pytest.mark.parametrize(
    "first",
    [
        "transformers.pipelines",
        "unihema.modeling_unihema.visual_backbone",
        "unihema.processing_unihema.pipelines",
    ],
)
def test_everything_is_registered_whatever_module_comes_first(first):
    code = (
        f"import {first}, unihema\n"
        "from transformers import AutoConfig, AutoModelForObjectDetection, pipelines\n"
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING\n"
        "config = AutoConfig.for_model('unihema')\n"
        "print(type(config) is unihema.UniHemaConfig, type(config) in AutoModelForObjectDetection._model_mapping,"
        " type(config) in PROCESSOR_MAPPING,"
        " 'visual-question-answering' in pipelines.PIPELINE_REGISTRY.get_supported_tasks())"
    )
    assert python(code).split() == ["True"] * 4


def test_registering_again_changes_nothing():
    from unihema.register import register_unihema

    before = {task: dict(entry) for task, entry in transformers.pipelines.PIPELINE_REGISTRY.supported_tasks.items()}
    register_unihema()
    assert before == transformers.pipelines.PIPELINE_REGISTRY.supported_tasks


def test_the_private_names_that_registration_needs_are_there():
    """A release of Transformers that fails here needs another way in `register.py`."""
    from transformers.models.auto import modeling_auto

    registry = transformers.pipelines.PIPELINE_REGISTRY
    assert "impl" in getattr(registry, "supported_tasks", {}).get("object-detection", {}), (
        "Transformers no longer keeps the class of a pipeline in PIPELINE_REGISTRY.supported_tasks[task]['impl']."
    )
    tasks = ["OBJECT_DETECTION", "IMAGE_SEGMENTATION", "SEMANTIC_SEGMENTATION", "IMAGE_CLASSIFICATION"]
    tasks += ["VISUAL_QUESTION_ANSWERING", "IMAGE_TEXT_TO_TEXT"]
    names = ["MODEL_MAPPING_NAMES", *(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in tasks)]
    missing = [name for name in names if not isinstance(getattr(modeling_auto, name, None), dict)]
    assert not missing, f"Transformers no longer keeps names of model classes in modeling_auto.{', '.join(missing)}."

    import unihema.register
    from unihema.modeling_unihema.tasks import auto_classes

    assert [unihema.register.mapping_names(auto_class) for auto_class in auto_classes()] == names
    try:
        transformers.pipelines.check_task("visual-question-answering")
    except KeyError as error:
        pytest.fail(f"Transformers refuses visual question answering by something else than REMOVED_TASKS: {error}")


OTHERS = """
import hashlib, json
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

found = {}
for task in ("object-detection", "image-segmentation", "image-classification"):
    run = pipeline(task, model=task)
    options = {"threshold": 0.0} if task == "object-detection" else {"top_k": 2} if "class" in task else {}
    results = run(["smear.png", "smear.png"], batch_size=2, **options)
    for entry in results[0] + results[1]:
        if "mask" in entry:
            entry["mask"] = hashlib.sha256(entry["mask"].tobytes()).hexdigest()
    found[task] = [type(run).__module__, type(run).__name__, results]
model = AutoModelForImageClassification.from_pretrained("image-classification")
run = pipeline("image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained("image-classification"))
found["a model"] = [type(run).__module__, type(run).__name__, run("smear.png")]
print(json.dumps(found))
"""


def test_models_of_others_have_the_pipelines_and_results_they_had(tmp_path):
    torch.manual_seed(0)
    size, small = {"height": 32, "width": 32}, {"image_size": 32, "num_labels": 3}
    yolos = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_detection_tokens=4,
        image_size=[32, 32], num_labels=3,
    )  # fmt: skip
    segformer = transformers.SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], num_attention_heads=[1], patch_sizes=[7],
        strides=[4], mlp_ratios=[2], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=16, **small
    )
    for task, model, processor in (
        ("object-detection", transformers.YolosForObjectDetection(yolos), transformers.YolosImageProcessor(size=size)),
        (
            "image-segmentation",
            transformers.SegformerForSemanticSegmentation(segformer),
            transformers.SegformerImageProcessor(size=size),
        ),
        (
            "image-classification",
            transformers.ViTForImageClassification(vit),
            transformers.ViTImageProcessor(size=size),
        ),
    ):
        model.save_pretrained(tmp_path / task)
        processor.save_pretrained(tmp_path / task)
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "smear.png")

    before = json.loads(python(OTHERS, tmp_path))
    assert [entry[1] for entry in before.values()] == [
        "ObjectDetectionPipeline",
        "ImageSegmentationPipeline",
        "ImageClassificationPipeline",
        "ImageClassificationPipeline",
    ]
    assert all(results for _, _, results in before.values())
    assert json.loads(python("import unihema\n" + OTHERS, tmp_path)) == before


def test_every_public_name_is_there():
    import unihema

    assert [name for name in unihema.__all__ if getattr(unihema, name, None) is None] == []


def test_a_checkpoint_folder_named_unihema_does_not_hide_the_package(tmp_path):
    (tmp_path / "unihema").mkdir()
    assert python("import unihema; print(unihema.UniHemaConfig.model_type)", cwd=tmp_path).strip() == "unihema"
