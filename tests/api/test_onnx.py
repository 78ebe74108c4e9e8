"""A checkpoint exported to ONNX: named inputs and outputs of any size, the model's own numbers, and `unihema predict`."""

import sys

import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image
from same_results import assert_same
from tiny_checkpoint import save_tiny_checkpoint
from tiny_models import batch, lively

from unihema import Analyzer
from unihema.errors import CheckpointError
from unihema.inference.onnx import OUTPUTS, TEXT_INPUTS, MissingOnnxError, OnnxModel
from unihema.loading import load_model
from unihema.onnx_export import export_onnx
from unihema_cli.app import app


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")
OPTIONS = {"num_queries": 12}
TASKS = [pytest.param("detection", marks=pytest.mark.slow), "single_cell"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("onnx") / "checkpoint", **OPTIONS)
    model, _ = load_model(folder, device="cpu")
    torch.manual_seed(1)
    lively(model).save_pretrained(folder)
    return folder


class Exported(dict):
    """File of each task, made when it is first asked for: detection's takes minutes, so its tests are slow ones."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint

    def __missing__(self, task):
        self[task] = export_onnx(self.checkpoint, self.checkpoint.parent / f"{task}.onnx", task)
        return self[task]


@pytest.fixture(scope="module")
def exported(checkpoint):
    return Exported(checkpoint)


@pytest.fixture(scope="module")
def smear(checkpoint):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (90, 130, 3), generator=generator, dtype=torch.uint8)
    path = checkpoint.parent / "smear.png"
    Image.fromarray(pixels.numpy()).resize((520, 360)).save(path)
    return path


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("images", "size"), [(1, (65, 131)), (2, (192, 256)), (3, (160, 97))])
def test_any_batch_and_size_gives_the_models_numbers(checkpoint, exported, task, images, size):
    model, _ = load_model(checkpoint, device="cpu")
    session = onnxruntime.InferenceSession(exported[task])
    inputs = batch(task, images, size)
    names = [argument.name for argument in session.get_inputs()]
    assert names == ["pixel_values", "pixel_mask"] + ["input_ids", "attention_mask"] * (task == "detection")
    assert [result.name for result in session.get_outputs()] == list(OUTPUTS[task])
    found = session.run(None, {name: inputs[name].numpy() for name in names})
    with torch.no_grad():
        expected = model(task=task, **{name: inputs[name] for name in names})
    for name, array in zip(OUTPUTS[task], found, strict=True):
        assert array.shape[0] == images
        torch.testing.assert_close(torch.from_numpy(array), expected[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
def test_axes_and_metadata_are_named(exported):
    model = onnx.load(exported["detection"])
    onnx.checker.check_model(model)
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert axes == {
        "pixel_values": ["batch", 3, "height", "width"],
        "pixel_mask": ["batch", "height", "width"],
        "input_ids": ["batch", "tokens"],
        "attention_mask": ["batch", "tokens"],
        "logits": ["batch", "queries", 3],
        "pred_boxes": ["batch", "queries", 4],
        "pred_morphology": ["batch", "queries", 5],
    }
    assert "unihema/config.json" in {entry.key for entry in model.metadata_props}


@pytest.mark.slow
def test_predict_takes_the_file_as_a_checkpoint(checkpoint, exported, smear, tmp_path):
    from click.testing import CliRunner

    tables = {}
    for name, source in (("folder", checkpoint), ("file", exported["detection"])):
        arguments = [str(source), str(smear), "-o", str(tmp_path / name), "-t", "detection", "--prompt", "platelet"]
        result = CliRunner().invoke(app, ["predict", *arguments])
        assert result.exit_code == 0, result.output
        tables[name] = pd.read_csv(tmp_path / name / "cells.csv")
    assert len(tables["folder"]) > 3
    pd.testing.assert_frame_equal(tables["file"], tables["folder"], rtol=0, atol=0.05)


def test_single_cell_class_is_the_models(checkpoint, exported, smear):
    expected = Analyzer.from_pretrained(checkpoint, device="cpu")(smear, tasks=["single_cell"]).single_cell
    found = Analyzer.from_pretrained(exported["single_cell"])(smear).single_cell
    assert found["label"] == expected["label"]
    assert found["score"] == pytest.approx(expected["score"], abs=1e-5)


@pytest.mark.slow
def test_it_finds_the_cells_that_the_model_finds(checkpoint, exported, smear):
    model, detector = (Analyzer.from_pretrained(source, device="cpu") for source in (checkpoint, exported["detection"]))
    assert detector.tasks == ("detection",)
    pixels = Image.open(smear)
    for image, options in (
        (smear, {}),
        (pixels.resize((90, 130)), {"prompt": "neutrophil"}),
        (pixels.crop((0, 0, 500, 300)), {"threshold": 0.0}),
    ):
        expected, found = model(image, ["detection"], **options), detector(image, **options)
        assert expected.cells
        assert_same(found, expected, atol=1e-4)
        for cell, same in zip(found.cells, expected.cells, strict=True):
            assert cell.attributes.keys() == same.attributes.keys()
    assert list(detector.weights_sha256()) == ["detection.onnx"]
    assert Analyzer(detector.model, detector.processor).weights_sha256() == detector.weights_sha256()
    with pytest.raises(CheckpointError, match="no trained head for 'question_answering'"):
        detector.ask(smear, "What is it?")


def test_file_does_its_own_task_only(exported, smear):
    model, processor = load_model(exported["single_cell"])
    with pytest.raises(CheckpointError, match="no trained head for 'detection'; it does single_cell"):
        Analyzer(model, processor)(smear, tasks=["detection"])
    with pytest.raises(ValueError, match="does single_cell, not detection"):
        model(torch.zeros(1, 3, 96, 96), task="detection")
    with pytest.raises(ValueError, match="cannot be trained"):
        model.train()


@pytest.mark.parametrize("task", TASKS)
def test_an_image_gives_in_a_padded_batch_what_it_gives_alone(exported, task):
    model, _ = load_model(exported[task])
    sizes = [(96, 160), (130, 97), (65, 70)]
    alone = [batch(task, 1, size) for size in sizes]
    height, width = (max(sides) for sides in zip(*sizes))
    texts = {name: alone[0][name].repeat(3, 1) for name in TEXT_INPUTS[task]}
    # What stands in the padding has no part in it.
    padded = {
        "pixel_values": torch.full((3, 3, height, width), 5.0),
        "pixel_mask": torch.zeros(3, height, width).long(),
    }
    for number, (inputs, (down, right)) in enumerate(zip(alone, sizes)):
        padded["pixel_values"][number, :, :down, :right] = inputs["pixel_values"][0]
        padded["pixel_mask"][number, :down, :right] = 1
    together = model(**padded, **texts)
    for number, inputs in enumerate(alone):
        expected = model(inputs["pixel_values"], **{name: text[:1] for name, text in texts.items()})
        for name in OUTPUTS[task]:
            torch.testing.assert_close(together[name][number], expected[name][0], rtol=0, atol=2e-5, msg=name)


def test_an_older_file_knows_no_padding(exported):
    """One without `pixel_mask` still runs, on images of one size."""
    model, _ = load_model(exported["single_cell"])
    pixels = torch.zeros(1, 3, 96, 96)

    class Older:
        def get_inputs(self):
            return [argument for argument in model.session.get_inputs() if argument.name != "pixel_mask"]

        def run(self, names, feed):
            assert set(feed) == {"pixel_values"}
            return model.session.run(names, feed | {"pixel_mask": torch.ones(1, 96, 96).long().numpy()})

    older = OnnxModel(Older(), model.config, "single_cell")
    torch.testing.assert_close(older(pixels).logits, model(pixels).logits)
    mask = torch.ones(1, 96, 96, dtype=torch.long)
    mask[:, :, 64:] = 0
    with pytest.raises(ValueError, match="knows no padding"):
        older(pixels, mask)


def test_what_cannot_be_exported(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'segmentation' has no ONNX export"):
        export_onnx(checkpoint, tmp_path / "a.onnx", "segmentation")
    with pytest.raises(ValueError, match="name the file .onnx"):
        export_onnx(checkpoint, tmp_path / "a.bin")
    (tmp_path / "a.onnx").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export_onnx(checkpoint, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingOnnxError, match=r"pip install 'unihema\[onnx\]'"):
        export_onnx(checkpoint, tmp_path / "b.onnx")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.onnx"]


def test_file_that_is_not_ours(exported, tmp_path, monkeypatch):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(exported["single_cell"].read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"broken\.onnx: not readable as ONNX"):
        load_model(broken)
    stranger = onnx.load(exported["single_cell"])
    del stranger.metadata_props[:]
    onnx.save(stranger, tmp_path / "stranger.onnx")
    with pytest.raises(CheckpointError, match=r"stranger\.onnx: not made by `unihema export`"):
        load_model(tmp_path / "stranger.onnx")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_model(tmp_path / "missing.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingOnnxError, match="onnxruntime is not installed"):
        load_model(exported["single_cell"])


@pytest.mark.slow
def test_official_maths_exports_too(tmp_path):
    from unihema.official.convert import OFFICIAL_MATHS

    folder = save_tiny_checkpoint(tmp_path / "checkpoint", **OPTIONS, **OFFICIAL_MATHS)
    model, processor = load_model(folder, device="cpu")
    exported, _ = load_model(export_onnx(folder, tmp_path / "model.onnx"))
    inputs = processor(images=Image.new("RGB", (520, 360), "pink"), text="platelet", task="detection")
    inputs["pixel_values"] = inputs["pixel_values"].repeat(1, 1, 4, 4)
    del inputs["pixel_mask"]
    with torch.no_grad():
        expected = model(task="detection", **inputs)
    torch.testing.assert_close(exported(**inputs).logits, expected.logits, rtol=0, atol=2e-5)
