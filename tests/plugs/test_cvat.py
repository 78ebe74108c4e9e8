"""CVAT's own driver annotates a task with the shipped checkpoint; the task and its server are stand-ins."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unihema import Analyzer, SmearResult
from unihema.results.smear_result import Cell


cvat = pytest.importorskip("cvat_sdk.auto_annotation")
driver = pytest.importorskip("cvat_sdk.auto_annotation.driver")
masks = pytest.importorskip("cvat_sdk.masks")
models = pytest.importorskip("cvat_sdk.models")


@pytest.fixture(scope="module")
def function(demo):
    """As `cvat-cli` loads it, with two of its `-p` parameters."""
    common = pytest.importorskip("cvat_cli._internal.common")
    parameters = {"checkpoint": str(demo / "unihema"), "device": "cpu", "attributes": True, "tiles": "off"}
    return common.FunctionLoader("unihema.plugs.cvat", None, parameters).load()


def labels_of(spec, kind="any"):
    """The labels of a task that was made for a function, with numbers of the server."""
    return [
        SimpleNamespace(
            id=100 + label.id,
            name=label.name,
            type=kind,
            sublabels=[],
            attributes=[
                SimpleNamespace(id=1000 + 10 * label.id + each.id, name=each.name, input_type=each.input_type, values=each.values)
                for each in label.attributes
            ],
        )
        for label in spec.labels
    ]  # fmt: skip


def annotate(monkeypatch, function, images, labels, **options):
    """The shapes that CVAT's driver sends to the server."""
    media = [SimpleNamespace(load_image=lambda image=image: image) for image in images]
    samples = [
        SimpleNamespace(frame_index=7 + number, frame_name=f"{number}.jpg", media=each)
        for number, each in enumerate(media)
    ]
    monkeypatch.setattr(driver, "TaskDataset", lambda *_, **__: SimpleNamespace(labels=labels, samples=samples))
    sent = []

    def upload(action, task, patched_labeled_data_request):
        sent.append((action, task, patched_labeled_data_request))

    api = SimpleNamespace(partial_update_annotations=upload)
    client = SimpleNamespace(logger=logging.getLogger("cvat"), tasks=SimpleNamespace(api=api))
    cvat.annotate_task(client, 5, function, **options)
    ((action, task, request),) = sent
    assert (action, task, request.tags) == ("create", 5, [])
    return request.shapes


def test_a_task_gets_the_cells_of_its_images(monkeypatch, function, demo):
    image = Image.open(demo / "smears/field_1.jpg")
    shapes = annotate(monkeypatch, function, [image], labels_of(function.spec))
    own = function.analyzer(image, "detection", tiles="off").cells
    names = {100 + number: name for name, number in function.labels.items()}
    assert len(own) > 20 and [names[shape.label_id] for shape in shapes] == [cell.label for cell in own]
    for shape, cell in zip(shapes, own, strict=True):
        assert shape.points == pytest.approx(cell.box) and shape.score == pytest.approx(cell.score)
        assert (shape.type.value, shape.frame, shape.source) == ("rectangle", 7, "auto")
        values = [cell.attributes[name]["value"] for name, _ in function.morphology if name in cell.attributes]
        assert [attribute.value for attribute in shape.attributes] == values
    assert any(shape.attributes for shape in shapes)


def test_a_threshold_is_kept_and_a_task_without_the_labels_is_refused_or_asked(monkeypatch, function, demo):
    image = Image.open(demo / "smears/field_1.jpg")
    scores = sorted(cell.score for cell in function.analyzer(image, "detection", tiles="off").cells)
    few = annotate(monkeypatch, function, [image], labels_of(function.spec), conf_threshold=scores[-3] - 1e-6)
    assert sorted(shape.score for shape in few) == pytest.approx(scores[-3:])
    with pytest.raises(cvat.BadFunctionError, match="is not in dataset"):
        annotate(monkeypatch, function, [image], labels_of(function.spec)[1:])
    some = annotate(monkeypatch, function, [image], labels_of(function.spec)[:1], allow_unmatched_labels=True)
    assert some and {shape.label_id for shape in some} == {100}


def test_masks_are_those_of_the_cells_and_polygons_where_asked(monkeypatch, function):
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:, 10:25] = True
    mask[0, 29] = True
    box = (10.5, 20.2, 39.5, 39.9)
    cells = [
        Cell(1, box, "RBC", 0.9, {}, mask),
        Cell(2, (50, 20, 60, 40), "RBC", 0.8),
        Cell(3, (0, 0, 4, 4), "WBC", 0.7, {}, np.zeros((4, 4), dtype=bool)),
    ]
    result = SmearResult(100, 80, cells, ["RBC", "WBC"])
    monkeypatch.setattr(Analyzer, "__call__", lambda self, image, *_, **__: result)
    monkeypatch.setattr(function, "gives_masks", True)
    monkeypatch.delitem(vars(function), "spec", raising=False)
    shapes = annotate(monkeypatch, function, [Image.new("RGB", (100, 80))], labels_of(function.spec, "mask"))
    decoded = [masks.decode_mask(shape.points, image_width=100, image_height=80) for shape in shapes]
    assert (decoded[0][20:40, 10:40] == mask).all() and [each.sum() for each in decoded] == [mask.sum(), 200, 16]
    assert decoded[1][20:40, 50:60].all() and decoded[2][:4, :4].all()
    polygons = annotate(
        monkeypatch,
        function,
        [Image.new("RGB", (100, 80))],
        labels_of(function.spec, "polygon"),
        conv_mask_to_poly=True,
    )
    corners = [set(zip(shape.points[::2], shape.points[1::2], strict=True)) for shape in polygons]
    assert corners[0] == {(20, 25), (35, 25), (35, 40), (20, 40)} and len(corners) == 3
    monkeypatch.delitem(vars(function), "spec", raising=False)
