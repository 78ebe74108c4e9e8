"""UniHema: a blood smear in; cells, attributes, masks and answers out.

`import unihema` makes the Auto classes and pipelines of Transformers know UniHema checkpoints. How other models behave
stays as it is, and the network is never touched.
"""

from .analyzer import Analyzer, QueryCapWarning
from .errors import (
    CardError,
    CheckpointError,
    DatasetError,
    DeviceError,
    FileMissingError,
    FileThereError,
    InputError,
    InputTypeError,
    NotFiniteError,
    OutputError,
    PackageMissingError,
    PreparedModelError,
    PushError,
    RequestError,
    RunConfigError,
    RunError,
    TrainingError,
    TrainingInterrupted,
    UniHemaError,
    UnreadableImageError,
)
from .inference.int8 import to_int8
from .inference.prepare import prepare_for_inference
from .modeling_unihema.configuration_unihema import UniHemaConfig
from .modeling_unihema.modeling_unihema import (
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForMultiTask,
    UniHemaForObjectDetection,
    UniHemaForQA,
    UniHemaForSegmentation,
    UniHemaModel,
)
from .modeling_unihema.tasks import TASKS
from .processing_unihema.image_processing_unihema import UniHemaImageProcessor
from .processing_unihema.processing_unihema import UniHemaProcessor
from .processing_unihema.questions import Answer
from .register import register_unihema
from .report import SmearReport
from .results.smear_result import Cell, SmearResult
from .version import __version__


__all__ = [
    "Analyzer",
    "Answer",
    "CardError",
    "Cell",
    "CheckpointError",
    "DatasetError",
    "DeviceError",
    "FileMissingError",
    "FileThereError",
    "InputError",
    "InputTypeError",
    "NotFiniteError",
    "OutputError",
    "PackageMissingError",
    "PreparedModelError",
    "PushError",
    "QueryCapWarning",
    "RequestError",
    "RunConfigError",
    "RunError",
    "SmearReport",
    "SmearResult",
    "TASKS",
    "TrainingError",
    "TrainingInterrupted",
    "UniHemaConfig",
    "UniHemaError",
    "UniHemaForDetection",
    "UniHemaForImageClassification",
    "UniHemaForMultiTask",
    "UniHemaForObjectDetection",
    "UniHemaForQA",
    "UniHemaForSegmentation",
    "UniHemaImageProcessor",
    "UniHemaModel",
    "UniHemaProcessor",
    "UnreadableImageError",
    "__version__",
    "prepare_for_inference",
    "to_int8",
]

register_unihema()
