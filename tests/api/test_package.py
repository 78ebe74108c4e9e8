"""What `import unihema` costs and does."""

import subprocess
import sys

import pytest


def python(code: str, cwd=None) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_costs_less_than_a_second_more_than_transformers():
    code = "import time, transformers\nstart = time.perf_counter()\nimport unihema\nprint(time.perf_counter() - start)"
    assert float(python(code)) < 1.0


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


def test_auto_classes_know_unihema_whatever_is_imported_first():
    for first, second in (("transformers", "unihema"), ("unihema", "transformers")):
        code = (
            f"import {first}, {second}\n"
            "from transformers import AutoConfig, AutoModelForObjectDetection\n"
            "config = AutoConfig.for_model('unihema')\n"
            "print(type(config).__name__, type(config) in AutoModelForObjectDetection._model_mapping)"
        )
        assert python(code).split() == ["UniHemaConfig", "True"]


@pytest.mark.parametrize(
    "first",
    [
        # Each imports Auto classes or pipelines while it is itself half imported.
        "unihema.modeling_unihema.visual_backbone",
        "unihema.processing_unihema.pipelines",
        "unihema, transformers.models.resnet.modeling_resnet",
    ],
)
def test_everything_is_registered_whatever_module_comes_first(first):
    code = (
        f"import {first}\n"
        "from transformers import AutoModel, AutoProcessor, pipelines\n"
        "from unihema import UniHemaConfig as C\n"
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING\n"
        "print(C in AutoModel._model_mapping, C in PROCESSOR_MAPPING,"
        " 'visual-question-answering' in pipelines.PIPELINE_REGISTRY.get_supported_tasks())"
    )
    assert python(code).split() == ["True"] * 3


def test_every_public_name_is_there():
    import unihema

    assert [name for name in unihema.__all__ if getattr(unihema, name, None) is None] == []


def test_a_checkpoint_folder_named_unihema_does_not_hide_the_package(tmp_path):
    (tmp_path / "unihema").mkdir()
    assert python("import unihema; print(unihema.UniHemaConfig.model_type)", cwd=tmp_path).strip() == "unihema"
