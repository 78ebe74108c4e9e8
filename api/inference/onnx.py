"""An ONNX file of one task, called as the model."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unihema.errors import CheckpointError, InputError, PackageMissingError
from unihema.files import scratch_folder, shortened
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.outputs import UniHemaClassificationOutput, UniHemaDetectionOutput


if TYPE_CHECKING:
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor


# What each task reads beside `pixel_values`, and what it gives.
TEXT_INPUTS = {"detection": ("input_ids", "attention_mask"), "single_cell": ()}
OUTPUTS = {"detection": ("logits", "pred_boxes", "pred_morphology"), "single_cell": ("logits",)}
# Files of the checkpoint that travel in the file's metadata, under these names behind the prefix.
METADATA_PREFIX = "unihema/"
METADATA_FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
METADATA_TASK = f"{METADATA_PREFIX}task"
_OUTPUT_CLASS = {"detection": UniHemaDetectionOutput, "single_cell": UniHemaClassificationOutput}


class MissingOnnxError(PackageMissingError):
    """A package of the `onnx` extra is not installed."""

    def __init__(self, package: str):
        super().__init__(f"{package} is not installed. Install it with: pip install 'unihema[onnx]'")


class OnnxModel:
    """Runs an ONNX file made by `export_onnx` in onnxruntime, on the CPU.

    Args:
        session (`onnxruntime.InferenceSession`): The file, opened.
        config ([`UniHemaConfig`]): The configuration it was made with.
        task (`str`): What it does.
    """

    training = False
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, session, config: UniHemaConfig, task: str):
        self.session = session
        self.config = config
        self.tasks = (task,)

    def eval(self) -> "OnnxModel":
        """Nothing to do: it cannot be trained."""
        return self

    def train(self, mode: bool = True) -> "OnnxModel":
        """Stays as it is.

        Raises:
            ValueError: Training is asked for.
        """
        if mode:
            raise InputError("An ONNX file cannot be trained; train the checkpoint it was made from.")
        return self

    def __call__(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        task: str | None = None,
    ) -> UniHemaDetectionOutput | UniHemaClassificationOutput:
        """
        Args:
            pixel_values (`torch.Tensor`): `[B, 3, H, W]`.
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, 1 on the image, 0 on padding. All image when missing.
            input_ids (`torch.Tensor`, *optional*): The prompt `[B, L]`; needed for detection.
            attention_mask (`torch.Tensor`, *optional*): `[B, L]`.
            task (`str`, *optional*): The one this file does.

        Returns:
            The output of the task's model class, without states.

        Raises:
            ValueError: Another task; or images padded to a common size, of an older file, which knows no padding.
        """
        if task not in (None, *self.tasks):
            raise InputError(f"This ONNX file does {self.tasks[0]}, not {task}.")
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(pixel_values[:, 0].shape, dtype=torch.long)
        given = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        given |= {"input_ids": input_ids, "attention_mask": attention_mask}
        arguments = self.session.get_inputs()
        if not pixel_mask.all() and not any(argument.name == "pixel_mask" for argument in arguments):
            raise InputError(
                "This ONNX file knows no padding: give it images of one size, or one at a time, or export it again."
            )
        feed = {}
        for argument in arguments:
            tensor = given[argument.name]
            if argument.name in TEXT_INPUTS["detection"] and isinstance(argument.shape[1], int):
                missing = argument.shape[1] - tensor.shape[1]
                tensor = torch.nn.functional.pad(tensor, (0, missing), value=self.config.pad_token_id)
            feed[argument.name] = tensor.numpy()
        names = OUTPUTS[self.tasks[0]]
        arrays = self.session.run(list(names), feed)
        return _OUTPUT_CLASS[self.tasks[0]](**{name: torch.from_numpy(array) for name, array in zip(names, arrays)})


def load_onnx(path: str | Path) -> "tuple[OnnxModel, UniHemaProcessor]":
    """Model and processor of an exported file.

    Args:
        path (`str` or `Path`): A file made by `export_onnx`.

    Returns:
        `tuple`: The model, and the processor.

    Raises:
        CheckpointError: The file is missing, damaged, or was not made by `export_onnx`.
        MissingOnnxError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingOnnxError("onnxruntime") from error
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Make one with `unihema export`.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"{path}: not readable as ONNX ({shortened(error)}). Export it again.") from error
    metadata = session.get_modelmeta().custom_metadata_map
    if metadata.get(METADATA_TASK) not in OUTPUTS:
        raise CheckpointError(f"{path}: not made by `unihema export`: its metadata names no task of UniHema.")
    with scratch_folder() as folder:
        for name in METADATA_FILES:
            (folder / name).write_text(metadata[METADATA_PREFIX + name], encoding="utf-8")
        config = UniHemaConfig.from_pretrained(folder, local_files_only=True)
        processor = UniHemaProcessor.from_pretrained(folder, local_files_only=True)
    config.name_or_path = str(path)
    return OnnxModel(session, config, metadata[METADATA_TASK]), processor


__all__ = [
    "METADATA_FILES",
    "METADATA_PREFIX",
    "METADATA_TASK",
    "OUTPUTS",
    "TEXT_INPUTS",
    "MissingOnnxError",
    "OnnxModel",
    "load_onnx",
]
