"""Makes the Auto classes and pipelines of Transformers know UniHema checkpoints."""

import re

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, pipelines
from transformers.models.auto import modeling_auto

from .modeling_unihema import modeling_unihema
from .modeling_unihema.configuration_unihema import UniHemaConfig
from .modeling_unihema.tasks import TASK_TABLE, auto_classes
from .processing_unihema import pipelines as unihema_pipelines
from .processing_unihema.image_processing_pil_unihema import UniHemaImageProcessorPil
from .processing_unihema.image_processing_unihema import UniHemaImageProcessor
from .processing_unihema.processing_unihema import UniHemaProcessor


def register_unihema() -> None:
    """Registers everything; calling it again changes nothing."""
    AutoConfig.register(UniHemaConfig.model_type, UniHemaConfig, exist_ok=True)
    backends = {"torchvision": UniHemaImageProcessor, "pil": UniHemaImageProcessorPil}
    AutoImageProcessor.register(UniHemaConfig, image_processor_classes=backends, exist_ok=True)
    AutoProcessor.register(UniHemaConfig, UniHemaProcessor, exist_ok=True)
    for auto_class, model_class in auto_classes().items():
        model = getattr(modeling_unihema, model_class)
        getattr(transformers, auto_class).register(UniHemaConfig, model, exist_ok=True)
        # Private: stock pipelines and model cards look here, and nowhere else, which classes do a task.
        getattr(modeling_auto, mapping_names(auto_class))[UniHemaConfig.model_type] = model_class

    # Private: a task named here is refused before the registry is asked.
    getattr(pipelines, "REMOVED_TASKS", {}).pop("visual-question-answering", None)
    registry = pipelines.PIPELINE_REGISTRY
    for task in TASK_TABLE.values():
        pipeline_class = getattr(unihema_pipelines, task.pipeline_class)
        if task.pipeline in registry.supported_tasks:
            # Private: register_pipeline would warn, and take away the task's default model.
            registry.supported_tasks[task.pipeline]["impl"] = pipeline_class
        else:
            models = tuple(getattr(transformers, name) for name in task.auto_classes[:1])
            registry.register_pipeline(task.pipeline, pipeline_class, pt_model=models, type="multimodal")


def mapping_names(auto_class: str) -> str:
    """The table of class names that belongs to an Auto class: `AutoModelForX` -> `MODEL_FOR_X_MAPPING_NAMES`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", auto_class.removeprefix("Auto"))
    return f"{words.upper()}_MAPPING_NAMES"


__all__ = ["mapping_names", "register_unihema"]
