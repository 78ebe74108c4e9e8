"""The detection or single-cell path of a checkpoint as one ONNX file."""

import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unihema.errors import InputError
from unihema.files import scratch_folder, write_atomically
from unihema.inference.onnx import (
    METADATA_FILES,
    METADATA_PREFIX,
    METADATA_TASK,
    OUTPUTS,
    TEXT_INPUTS,
    MissingOnnxError,
)
from unihema.loading import load_model, require_tasks


if TYPE_CHECKING:
    from unihema.modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
    from unihema.processing_unihema.processing_unihema import UniHemaProcessor


OPSET = 20
# An image no side of which is traced as a special case.
_TRACED_SIZE = (192, 256)


def export_onnx(checkpoint: str | Path, output: str | Path, task: str = "detection", overwrite: bool = False) -> Path:
    """Writes one task of a checkpoint as an ONNX file.

    Inputs are `pixel_values` `[batch, 3, height, width]` (float32, normalised), `pixel_mask` `[batch, height, width]` (1 on the
    image, 0 on padding below and to the right of it) and, for detection, the prompt's `input_ids` and `attention_mask`
    `[batch, tokens]`; outputs are those of the task's model class. Batch, height, width and tokens may be any, from 65 pixels
    a side on. An image gives in a padded batch what it gives alone.
    Class names, thresholds, processor and tokenizer are in the file's metadata.

    Args:
        checkpoint (`str` or `Path`): Checkpoint folder.
        output (`str` or `Path`): The new file, ending in `.onnx`. It appears when it is complete.
        task (`str`): `detection` or `single_cell`.
        overwrite (`bool`): Replace a file that is there already.

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
    if output.exists() and not overwrite:
        raise InputError(
            f"{output} is there already: choose another name, or replace it (--overwrite, or overwrite=True)."
        )
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingOnnxError(package) from error
    model, processor = load_model(checkpoint, device="cpu")
    require_tasks(model, [task])
    program = _trace(model.float(), task)
    program.model.metadata_props.update(_metadata(model, processor, task))
    program.model.producer_name = "unihema"
    contents = program.model_proto.SerializeToString()
    write_atomically(output, lambda file: file.write(contents))
    return output


def _trace(model: "UniHemaPreTrainedModel", task: str) -> torch.onnx.ONNXProgram:
    class Exported(torch.nn.Module):
        """Positional inputs in, a tuple of tensors out."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values, pixel_mask, input_ids=None, attention_mask=None):
            inputs = {} if input_ids is None else {"input_ids": input_ids, "attention_mask": attention_mask}
            if len(self.model.tasks) > 1:
                inputs["task"] = task
            output = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, **inputs)
            return tuple(output[name] for name in OUTPUTS[task])

    inputs = [torch.zeros(2, 3, *_TRACED_SIZE), torch.ones(2, *_TRACED_SIZE, dtype=torch.long)]
    axes = [{0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "height", 2: "width"}]
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
            input_names=["pixel_values", "pixel_mask", *TEXT_INPUTS[task]],
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
    with scratch_folder() as folder:
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        files = {name: (folder / name).read_text(encoding="utf-8") for name in METADATA_FILES}
    return {METADATA_TASK: task} | {METADATA_PREFIX + name: text for name, text in files.items()}


__all__ = ["export_onnx"]
