"""The detection or single-cell path of a checkpoint as one ONNX file, and such a file called as the model."""

import importlib
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unihema.checkpoint_files import CheckpointError
from unihema.errors import InputError, PackageMissingError
from unihema.files import write_atomically
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.outputs import UniHemaClassificationOutput, UniHemaDetectionOutput


if TYPE_CHECKING:
    from unihema.modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor


# What each task reads beside `pixel_values`, and what it gives.
TEXT_INPUTS = {"detection": ("input_ids", "attention_mask"), "single_cell": ()}
OUTPUTS = {"detection": ("logits", "pred_boxes", "pred_morphology"), "single_cell": ("logits",)}
OPSET = 20
# Files of the checkpoint that travel in the file's metadata, under these names behind the prefix.
METADATA_PREFIX = "unihema/"
METADATA_FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
METADATA_TASK = f"{METADATA_PREFIX}task"
# An image no side of which is traced as a special case.
_TRACED_SIZE = (192, 256)
_OUTPUT_CLASS = {"detection": UniHemaDetectionOutput, "single_cell": UniHemaClassificationOutput}


class MissingOnnxError(PackageMissingError):
    """A package of the `onnx` extra is not installed."""

    def __init__(self, package: str):
        super().__init__(f"{package} is not installed. Install it with: pip install 'unihema[onnx]'")


def export_onnx(checkpoint: str | Path, output: str | Path, task: str = "detection") -> Path:
    """Writes one task of a checkpoint as an ONNX file.

    Inputs are `pixel_values` `[batch, 3, height, width]` (float32, normalised) and, for detection, the prompt's
    `input_ids` and `attention_mask` `[batch, tokens]`; outputs are those of the task's model class. Batch, height, width
    and tokens may be any, from 65 pixels a side on. There is no `pixel_mask`: the images of a batch have one size.
    Class names, thresholds, processor and tokenizer are in the file's metadata.

    Args:
        checkpoint (`str` or `Path`): Checkpoint folder.
        output (`str` or `Path`): The new file, ending in `.onnx`. It appears when it is complete.
        task (`str`): `detection` or `single_cell`.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: There is no ONNX path for this task, or the file is there already or not called `.onnx`.
        CheckpointError: The checkpoint is incomplete or lacks the head.
        MissingOnnxError: The `onnx` extra is not installed.
    """
    output = Path(output)
    if task not in OUTPUTS:
        raise InputError(f"Task '{task}' has no ONNX export; choose one of {', '.join(OUTPUTS)}.")
    if output.suffix != ".onnx":
        raise InputError(f"{output}: name the file .onnx, by which `unihema predict` knows it.")
    if output.exists():
        raise InputError(f"{output} is there already: choose another name or delete it.")
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingOnnxError(package) from error
    from unihema.analyzer import require_tasks
    from unihema.loading import load_model

    model, processor = load_model(checkpoint, device="cpu")
    require_tasks(model, [task])
    program = _trace(model.float(), task)
    program.model.metadata_props.update(_metadata(model, processor, task))
    program.model.producer_name = "unihema"
    contents = program.model_proto.SerializeToString()
    write_atomically(output, lambda file: file.write(contents))
    return output


def _trace(model: "UniHemaPreTrainedModel", task: str):
    class Exported(torch.nn.Module):
        """Positional inputs in, a tuple of tensors out."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values, input_ids=None, attention_mask=None):
            inputs = {} if input_ids is None else {"input_ids": input_ids, "attention_mask": attention_mask}
            if len(self.model.tasks) > 1:
                inputs["task"] = task
            output = self.model(pixel_values=pixel_values, **inputs)
            return tuple(output[name] for name in OUTPUTS[task])

    inputs = [torch.zeros(2, 3, *_TRACED_SIZE)]
    axes = [{0: "batch", 2: "height", 3: "width"}]
    # The official maths lets padding take part, so that its text has one length.
    whole = model.config.attend_to_padding
    for _ in TEXT_INPUTS[task]:
        inputs.append(torch.ones(2, model.config.fusion_queries if whole else 5, dtype=torch.long))
        axes.append({0: "batch"} if whole else {0: "batch", 1: "tokens"})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*axis name.*will not be used")
        program = torch.onnx.export(
            Exported().eval(),
            tuple(inputs),
            dynamo=True,
            input_names=["pixel_values", *TEXT_INPUTS[task]],
            output_names=list(OUTPUTS[task]),
            dynamic_shapes=tuple(axes),
            opset_version=OPSET,
            verbose=False,
        )
    if task == "detection":
        import onnx_ir

        for value in program.model.graph.outputs:
            value.shape = onnx_ir.Shape(["batch", "queries", value.shape[2]])
    return program


def _metadata(model: "UniHemaPreTrainedModel", processor: "UniHemaProcessor", task: str) -> dict[str, str]:
    # An image alone needs no padding, and the file has no mask to tell padding from image.
    processor.image_processor.pad_multiple = 1
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        files = {name: (Path(folder) / name).read_text(encoding="utf-8") for name in METADATA_FILES}
    return {METADATA_TASK: task} | {METADATA_PREFIX + name: text for name, text in files.items()}


class OnnxModel:
    """Runs an ONNX file made by [`export_onnx`] in onnxruntime, on the CPU.

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
            pixel_mask (`torch.Tensor`, *optional*): `[B, H, W]`, all ones: the file knows no padding.
            input_ids (`torch.Tensor`, *optional*): The prompt `[B, L]`; needed for detection.
            attention_mask (`torch.Tensor`, *optional*): `[B, L]`.
            task (`str`, *optional*): The one this file does.

        Returns:
            The output of the task's model class, without states.

        Raises:
            ValueError: Another task, or images padded to a common size.
        """
        if task not in (None, *self.tasks):
            raise InputError(f"This ONNX file does {self.tasks[0]}, not {task}.")
        if pixel_mask is not None and not pixel_mask.all():
            raise InputError("An ONNX file knows no padding: give it images of one size, or one at a time.")
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        feed = {}
        for argument in self.session.get_inputs():
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
        path (`str` or `Path`): A file made by [`export_onnx`].

    Returns:
        `tuple`: The model, and the processor.

    Raises:
        CheckpointError: The file is missing, damaged, or was not made by [`export_onnx`].
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
        raise CheckpointError(f"{path}: not readable as ONNX ({error}). Export it again.") from error
    metadata = session.get_modelmeta().custom_metadata_map
    if metadata.get(METADATA_TASK) not in OUTPUTS:
        raise CheckpointError(f"{path}: not made by `unihema export`: its metadata names no task of UniHema.")
    with tempfile.TemporaryDirectory() as folder:
        for name in METADATA_FILES:
            (Path(folder) / name).write_text(metadata[METADATA_PREFIX + name], encoding="utf-8")
        config = UniHemaConfig.from_pretrained(folder, local_files_only=True)
        processor = UniHemaProcessor.from_pretrained(folder, local_files_only=True)
    config.name_or_path = str(path)
    return OnnxModel(session, config, metadata[METADATA_TASK]), processor


__all__ = ["MissingOnnxError", "OnnxModel", "export_onnx", "load_onnx"]
