"""Registers UniHema with the Auto classes and pipelines of Transformers, each when that part of it is imported.

Registering a class means importing it, and with it torch and torchvision: seconds that `import unihema` should not
cost. So a hook on Python's import system waits for the modules of Transformers that hold the Auto classes and registers
as soon as one of them is there. It acts only when no module of Transformers or of this package is half imported.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


def _register_config() -> None:
    from transformers import AutoConfig

    from .modeling_unihema.configuration_unihema import UniHemaConfig

    AutoConfig.register(UniHemaConfig.model_type, UniHemaConfig, exist_ok=True)


def _register_models() -> None:
    import transformers
    from transformers.models.auto import modeling_auto

    from .modeling_unihema.configuration_unihema import UniHemaConfig
    from .modeling_unihema.modeling_unihema import (
        UniHemaForDetection,
        UniHemaForImageClassification,
        UniHemaForQA,
        UniHemaForSegmentation,
        UniHemaModel,
    )

    for auto_class, names, model_class in (
        ("AutoModel", "MODEL_MAPPING_NAMES", UniHemaModel),
        ("AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", UniHemaForDetection),
        ("AutoModelForImageSegmentation", "MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES", UniHemaForSegmentation),
        ("AutoModelForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES", UniHemaForSegmentation),
        (
            "AutoModelForImageClassification",
            "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
            UniHemaForImageClassification,
        ),
        ("AutoModelForVisualQuestionAnswering", "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES", UniHemaForQA),
        ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", UniHemaForQA),
    ):
        getattr(transformers, auto_class).register(UniHemaConfig, model_class, exist_ok=True)
        # The pipelines look a model's class name up here before they call it supported.
        getattr(modeling_auto, names)[UniHemaConfig.model_type] = model_class.__name__


def _register_image_processor() -> None:
    from transformers import AutoImageProcessor

    from .modeling_unihema.configuration_unihema import UniHemaConfig
    from .processing_unihema.image_processing_pil_unihema import UniHemaImageProcessorPil
    from .processing_unihema.image_processing_unihema import UniHemaImageProcessor

    AutoImageProcessor.register(
        UniHemaConfig,
        image_processor_classes={"torchvision": UniHemaImageProcessor, "pil": UniHemaImageProcessorPil},
        exist_ok=True,
    )


def _register_processor() -> None:
    from transformers import AutoProcessor

    from .modeling_unihema.configuration_unihema import UniHemaConfig
    from .processing_unihema.processing_unihema import UniHemaProcessor

    AutoProcessor.register(UniHemaConfig, UniHemaProcessor, exist_ok=True)


def _register_pipelines() -> None:
    from .processing_unihema.pipelines import register_pipelines

    register_pipelines()


class _RegisterAfterImport(MetaPathFinder):
    """Finds modules as before, and runs the registration that waits for a module once that module is imported."""

    packages = ("transformers", __name__.rpartition(".")[0])

    def __init__(self, pending: dict[str, Callable[[], None]]):
        self.pending = pending
        self.finding: set[str] = set()
        self.importing = 0

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if not self.pending or name in self.finding or name.partition(".")[0] not in self.packages:
            return None
        self.finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.finding.discard(name)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def execute_and_settle(module) -> None:
            self.importing += 1
            try:
                execute(module)
            finally:
                self.importing -= 1
            self.settle()

        spec.loader.exec_module = execute_and_settle
        return spec

    def settle(self) -> None:
        """Runs what no longer has to wait, unless a module is half imported."""
        while not self.importing and (ready := next((name for name in self.pending if name in sys.modules), None)):
            register = self.pending.pop(ready)
            self.importing += 1  # what it imports must not start the next registration in its midst
            try:
                register()
            finally:
                self.importing -= 1


def install() -> None:
    """Registers with what is imported already, and waits for the rest. Called once, by `import unihema`."""
    auto = "transformers.models.auto"
    finder = _RegisterAfterImport(
        {
            f"{auto}.configuration_auto": _register_config,
            f"{auto}.modeling_auto": _register_models,
            f"{auto}.image_processing_auto": _register_image_processor,
            f"{auto}.processing_auto": _register_processor,
            "transformers.pipelines": _register_pipelines,
        }
    )
    sys.meta_path.insert(0, finder)
    finder.settle()


__all__ = ["install"]
