"""UniHema: a blood smear in; cells, attributes, masks and answers out.

`import unihema` makes the Auto classes and pipelines of Transformers know UniHema checkpoints. It costs next to nothing
and never touches the network: the names below are imported when they are first used, and the registrations happen when
the part of Transformers they belong to is imported (see `registration.py`).
"""

from importlib import import_module
from typing import Any

from .registration import install as _install_registrations
from .version import __version__


_SOURCES = {
    "modeling_unihema.configuration_unihema": ["UniHemaConfig"],
    "modeling_unihema.tasks": ["TASKS"],
    "modeling_unihema.modeling_unihema": [
        "UniHemaModel",
        "UniHemaForDetection",
        "UniHemaForSegmentation",
        "UniHemaForImageClassification",
        "UniHemaForQA",
        "UniHemaForMultiTask",
    ],
    "processing_unihema.image_processing_unihema": ["UniHemaImageProcessor"],
    "processing_unihema.processing_unihema": ["UniHemaProcessor"],
    "results.smear_result": ["Cell", "SmearResult"],
    "analyzer": ["Analyzer", "QueryCapWarning"],
    "checkpoint_files": ["CheckpointError"],
    "errors": ["UniHemaError"],
    "inference.int8": ["to_int8"],
    "inference.prepare": ["prepare_for_inference"],
}
_HOME = {name: module for module, names in _SOURCES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unihema' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_install_registrations()
