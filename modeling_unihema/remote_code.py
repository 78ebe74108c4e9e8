"""Code beside the weights: a saved checkpoint also loads with `trust_remote_code=True` where `unihema` is not installed.

Transformers copies the file of one class, and its imports from the same folder. A UniHema checkpoint serves several classes,
processors and pipelines from several folders of the package. So their files are written here, into one flat folder, with
their imports made flat.
"""

import copy
import re
import sys
from pathlib import Path
from typing import Any

from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .tasks import TASK_TABLE, auto_classes


# Every file that a checkpoint needs is imported by one of these.
ENTRIES = ("configuration_unihema", "modeling_unihema", "processing_unihema", "pipelines")
_IMPORT = re.compile(r"^( *from )(?:unihema(?:\.\w+)*)?\.(\w+)( import )", re.MULTILINE)
_HERE = Path(__file__).parent


def auto_map() -> dict[str, str]:
    """Auto class -> file and class, as `config.json` names them."""
    models = {auto: f"modeling_unihema.{name}" for auto, name in auto_classes().items()}
    return {"AutoConfig": "configuration_unihema.UniHemaConfig", **models}


def custom_pipelines() -> dict[str, dict[str, Any]]:
    """Pipeline -> our class of it, as `config.json` names them."""
    return {
        task.pipeline: {"impl": f"pipelines.{task.pipeline_class}", "pt": [task.auto_classes[0]]}
        for task in TASK_TABLE.values()
    }


def is_remote(cls: type) -> bool:
    """Whether a class was loaded from a checkpoint's own code."""
    return cls.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def code_files(checkpoint: Path | None = None) -> dict[str, Path]:
    """The files that model, processor and pipelines consist of.

    Args:
        checkpoint (`Path`, *optional*): A checkpoint that has them; the package when missing.

    Returns:
        `dict[str, Path]`: File name -> where it is.
    """
    if checkpoint is None:
        package = _HERE.parent
        folders = [_HERE, package / "processing_unihema", package]
    else:
        folders = [checkpoint]
    found: dict[str, Path] = {}
    waiting = list(ENTRIES)
    while waiting:
        name = f"{waiting.pop()}.py"
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None or name in found:
            continue
        found[name] = path
        waiting += [match[2] for match in _IMPORT.finditer(path.read_text(encoding="utf-8"))]
    return dict(sorted(found.items()))


def write_code(folder: str | Path, checkpoint: Path | None = None) -> list[str]:
    """Writes the code into a checkpoint folder, imports made flat.

    Args:
        folder (`str` or `Path`): The folder; made when missing.
        checkpoint (`Path`, *optional*): Where the code is taken from, see [`code_files`].

    Returns:
        `list[str]`: Names of the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = code_files(checkpoint)
    for name, path in files.items():
        if path.resolve() != (folder / name).resolve():
            text = _IMPORT.sub(r"\1.\2\3", path.read_text(encoding="utf-8"))
            (folder / name).write_text(text, encoding="utf-8")
    return list(files)


def code_source(instance: Any, name_or_path: str = "") -> Path | None:
    """Folder with the code of a configuration or processor: a checkpoint's, or the download from the Hub; `None` for the
    installed package."""
    if not is_remote(type(instance)):
        return None
    checkpoint = Path(name_or_path)
    return (
        checkpoint
        if name_or_path and checkpoint.is_dir()
        else Path(sys.modules[type(instance).__module__].__file__).parent
    )


class SavedWithCode:
    """Part of a configuration class: saving it writes the code files and says which class each Auto class takes."""

    def __post_init__(self, **kwargs: Any):
        # Otherwise Transformers asks to trust the checkpoint's pipelines although the installed ones are used.
        if not is_remote(type(self)):
            kwargs.pop("auto_map", None)
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the configuration, and the code of model, processor and pipelines beside it.

        Args:
            save_directory (`str` or `Path`): The folder; made when missing.
            **kwargs: See [`~PreTrainedConfig.save_pretrained`].
        """
        files = write_code(save_directory, code_source(self, self.name_or_path))
        written = copy.copy(self)
        written.auto_map = auto_map()
        # The code of a checkpoint from the Hub lacks the pipelines unless they were used.
        written.custom_pipelines = custom_pipelines() if "pipelines.py" in files else {}
        super(SavedWithCode, written).save_pretrained(save_directory, **kwargs)


class ProcessorWithCode:
    """Part of a processor class: saving it writes the code files beside its settings."""

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Saves the processor, and the code of model, processor and pipelines beside it.

        Args:
            save_directory (`str` or `Path`): The folder; made when missing.
            push_to_hub (`bool`): Also push it to the Hub, under `repo_id` or the folder's name.
            **kwargs: See [`~PushToHubMixin.push_to_hub`].

        Returns:
            `list[str]`: The files.
        """
        saved = super().save_pretrained(save_directory)
        write_code(save_directory, code_source(self))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved


__all__ = [
    "ProcessorWithCode",
    "SavedWithCode",
    "auto_map",
    "code_files",
    "code_source",
    "custom_pipelines",
    "write_code",
]
