"""Code beside the weights: a saved checkpoint also loads with `trust_remote_code=True` where `unihema` is not installed.

Transformers copies the file of one class and what that imports, and notes that one class. A UniHema checkpoint serves
several classes, processors and pipelines, so the configuration, which every way of saving a model writes, adds the rest.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


AUTO_MAP = {
    "AutoConfig": "configuration_unihema.UniHemaConfig",
    "AutoModel": "modeling_unihema.UniHemaModel",
    "AutoModelForObjectDetection": "modeling_unihema.UniHemaForDetection",
    "AutoModelForImageSegmentation": "modeling_unihema.UniHemaForSegmentation",
    "AutoModelForSemanticSegmentation": "modeling_unihema.UniHemaForSegmentation",
    "AutoModelForImageClassification": "modeling_unihema.UniHemaForImageClassification",
    "AutoModelForVisualQuestionAnswering": "modeling_unihema.UniHemaForQA",
    "AutoModelForImageTextToText": "modeling_unihema.UniHemaForQA",
}

CUSTOM_PIPELINES = {
    "visual-question-answering": {
        "impl": "pipelines.VisualQuestionAnsweringPipeline",
        "pt": ["AutoModelForVisualQuestionAnswering"],
    },
    "object-detection": {
        "impl": "pipelines.UniHemaObjectDetectionPipeline",
        "pt": ["AutoModelForObjectDetection"],
    },
    "image-segmentation": {
        "impl": "pipelines.UniHemaImageSegmentationPipeline",
        "pt": ["AutoModelForImageSegmentation"],
    },
    "image-classification": {
        "impl": "pipelines.UniHemaImageClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
    },
}

_ENTRIES = ("configuration_unihema.py", "modeling_unihema.py", "processing_unihema.py", "pipelines.py")
_HERE = Path(__file__).parent


def code_files(folders: list[Path]) -> list[Path]:
    """The files that model, processor and pipelines consist of.

    Args:
        folders (`list[Path]`): Where they are: the folders of the package, or a checkpoint.

    Returns:
        `list[Path]`: Those found there, with everything they import from their own folder.
    """
    entries = [folder / name for name in _ENTRIES for folder in folders if (folder / name).is_file()]
    return sorted({Path(file) for entry in entries for file in (entry, *get_relative_import_files(entry))})


class SavedWithCode:
    """Part of a configuration class: saving it writes the code files and says which class each Auto class takes."""

    def __post_init__(self, **kwargs: Any):
        # Transformers asks for trust in a configuration's own pipelines even where the installed ones would do.
        if not self._is_remote():
            kwargs.pop("auto_map", None)
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    @classmethod
    def _is_remote(cls) -> bool:
        """Whether this class was itself read from a checkpoint."""
        return cls.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")

    def _code_folders(self) -> list[Path]:
        """Where the code to save is: the package, the checkpoint on this disk, or what was fetched of one on the Hub."""
        if not self._is_remote():
            return [_HERE, _HERE.parent / "processing_unihema"]
        checkpoint = Path(self._name_or_path)
        return [checkpoint if checkpoint.is_dir() else _HERE]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the configuration, and the code of model, processor and pipelines beside it.

        Args:
            save_directory (`str` or `Path`): The folder; made when missing.
            **kwargs: See [`~PreTrainedConfig.save_pretrained`].
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for file in code_files(self._code_folders()):
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        written = copy.copy(self)
        written.auto_map = dict(AUTO_MAP)
        # A configuration from the Hub does not bring the pipelines along unless they were used.
        written.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES) if (folder / "pipelines.py").is_file() else {}
        super(SavedWithCode, written).save_pretrained(save_directory, **kwargs)


__all__ = ["AUTO_MAP", "CUSTOM_PIPELINES", "SavedWithCode", "code_files"]
