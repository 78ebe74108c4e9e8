"""The image processor: sizes, padding, aligned annotations and masks, results in original pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from unihema.errors import InputError
from unihema.modeling_unihema.outputs import UniHemaDetectionOutput, UniHemaSegmentationOutput
from unihema.processing_unihema.image_processing_unihema import UniHemaImageProcessor
from unihema.processing_unihema.post_processing import distinct_cells


SIZES = {"detection": {"shortest_edge": 96, "longest_edge": 128}, "single_cell": {"longest_edge": 64}}


@pytest.fixture
def processor():
    return UniHemaImageProcessor(task_sizes=SIZES)


def field(width: int, height: int, cell: tuple[int, int, int, int]) -> np.ndarray:
    """A white image with one black cell (x, y, width, height)."""
    x, y, w, h = cell
    image = np.full((height, width, 3), 255, np.uint8)
    image[y : y + h, x : x + w] = 0
    return image


def dark_box(pixels: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Extent (x, y, x, y) of the dark cell in a processed image."""
    dark = (pixels.mean(0) < 0) & mask.bool()
    rows, columns = dark.any(1).nonzero()[:, 0], dark.any(0).nonzero()[:, 0]
    return [float(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


@pytest.mark.parametrize("kind", ["pil", "numpy", "channels first", "torch", "path"])
def test_all_kinds_of_input_give_the_same_pixels(processor, kind, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    given = {
        "pil": Image.fromarray(image),
        "numpy": image,
        "channels first": image.transpose(2, 0, 1),
        "torch": torch.from_numpy(image).permute(2, 0, 1),
        "path": tmp_path / "image.png",
    }[kind]
    Image.fromarray(image).save(tmp_path / "image.png")
    found = processor(given)
    assert found["pixel_values"].shape == (1, 3, 96, 128)
    torch.testing.assert_close(found["pixel_values"], processor(image)["pixel_values"], rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_and_tensors_of_every_type_give_the_same_pixels(processor, channels, dtype):
    image = np.random.default_rng(0).random((channels, 40, 50)) * (1 if dtype is np.float32 else np.iinfo(dtype).max)
    image = image.astype(dtype)
    expected = processor(image.transpose(1, 2, 0))["pixel_values"]
    for given in (image, torch.from_numpy(image), torch.from_numpy(image).permute(1, 2, 0)):
        torch.testing.assert_close(processor(given)["pixel_values"], expected, rtol=0, atol=0)
    assert expected.std() > 0.1


def test_floats_are_taken_as_they_are_without_rescaling(processor):
    image = torch.rand(3, 96, 128)
    plain = {"do_rescale": False, "do_normalize": False}
    for given in (image, image.numpy()):
        torch.testing.assert_close(processor(given, **plain)["pixel_values"][0], image, rtol=0, atol=0)


@pytest.mark.filterwarnings("error")
def test_arrays_in_any_order_of_bytes_and_memory_are_taken_without_a_warning(processor):
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    expected = processor(torch.from_numpy(image))["pixel_values"]
    read_only = np.asarray(Image.fromarray(image))
    assert not read_only.flags.writeable
    turned = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    for given in (
        read_only,
        np.asfortranarray(image),
        turned,
        (image / 255).astype(">f4"),
        (image / 255).astype(">f8"),
    ):
        torch.testing.assert_close(processor(given)["pixel_values"], expected, rtol=0, atol=0.02)
    for order in "<>":
        wide = (image.astype(np.uint16) * 257).astype(f"{order}u2")
        torch.testing.assert_close(processor(wide)["pixel_values"], expected, rtol=0, atol=0.02)


def test_a_batch_as_one_array(processor):
    images = np.random.default_rng(0).integers(0, 255, (2, 40, 50, 3), np.uint8)
    expected = processor(list(images))["pixel_values"]
    torch.testing.assert_close(processor(images)["pixel_values"], expected, rtol=0, atol=0)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(processor(tensor)["pixel_values"], expected, rtol=0, atol=0)


def test_size_given_on_loading_or_calling(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = UniHemaImageProcessor.from_pretrained(tmp_path, size={"longest_edge": 32})
    image = np.zeros((60, 80, 3), np.uint8)
    assert loaded(image)["pixel_values"].shape == (1, 3, 32, 32)
    assert loaded(image, task="single_cell")["pixel_values"].shape == (1, 3, 64, 64)
    assert processor(image, size={"height": 64, "width": 96})["pixel_values"].shape == (1, 3, 64, 96)
    assert processor(image, size=processor.size)["pixel_values"].shape == processor(image)["pixel_values"].shape


def test_labels_of_a_file_too_large_to_open_whole_are_in_its_own_pixels(processor, tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "slide.png")
    annotations = {"annotations": [{"bbox": [4000, 4000, 1000, 2000], "category_id": 0}]}
    labels = processor(tmp_path / "slide.png", annotations=annotations)["labels"][0]
    assert labels["boxes"][0].tolist() == pytest.approx([0.5, 5 / 9, 1 / 9, 2 / 9])
    assert labels["orig_size"].tolist() == [9000, 9000]
    mask = np.zeros((9000, 9000), bool)
    mask[:4500] = True
    found = processor(tmp_path / "slide.png", masks=mask)["labels"][0]
    assert (found[:48, :96] == 1).all() and (found[48:, :96] == 0).all()


def test_sizes_follow_the_task_and_keep_the_aspect_ratio(processor):
    wide = np.zeros((60, 160, 3), np.uint8)
    detection = processor(wide)["pixel_mask"][0]
    assert (int(detection[:, 0].sum()), int(detection[0].sum())) == (48, 128)
    crop = processor(wide, task="single_cell")["pixel_mask"][0]
    assert (int(crop[:, 0].sum()), int(crop[0].sum())) == (24, 64)
    assert crop.shape == (32, 64)


def test_a_one_pixel_wide_image_works(processor):
    assert processor(np.zeros((500, 1, 3), np.uint8))["pixel_values"].shape == (1, 3, 128, 32)


def test_boxes_and_masks_stay_on_the_cell_under_resize_and_padding(processor):
    cells = [(40, 20, 50, 30), (10, 60, 80, 40)]
    images = [field(200, 100, cells[0]), field(100, 150, cells[1])]
    annotations = [
        {"image_id": i, "annotations": [{"bbox": list(cell), "category_id": 1, "morphology": [0, -100]}]}
        for i, cell in enumerate(cells)
    ]
    detection = processor(images, annotations=annotations)
    masks = processor(images, masks=[(image[..., 0] == 0) for image in images])
    for i in range(2):
        valid = detection["pixel_mask"][i]
        width, height = int(valid[0].sum()), int(valid[:, 0].sum())
        x, y, w, h = (detection["labels"][i]["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
        expected = dark_box(detection["pixel_values"][i], valid)
        assert np.abs(np.subtract([x - w / 2, y - h / 2, x + w / 2, y + h / 2], expected)).max() <= 1.0
        mask = masks["labels"][i]
        assert ((mask == -100) == (valid == 0)).all()
        dark = (masks["pixel_values"][i].mean(0) < 0) & valid.bool()
        assert ((mask == 1) != dark).float().sum() <= 0.06 * dark.sum()
    assert detection["labels"][0]["morphology"].tolist() == [[0, -100]]
    assert detection["labels"][0]["class_labels"].tolist() == [1]


def test_boxes_partly_outside_are_clipped(processor):
    labels = processor(
        np.zeros((100, 100, 3), np.uint8),
        annotations={"image_id": 1, "annotations": [{"bbox": [-20, 50, 40, 100], "category_id": 0}]},
    )["labels"][0]
    assert labels["boxes"][0].tolist() == pytest.approx([0.1, 0.75, 0.2, 0.5])


@pytest.mark.parametrize("box", [[200, 10, 10, 10], [10, 10, 0, 10], [10, 10, -5, 10], [float("nan"), 0, 5, 5]])
def test_boxes_without_area_inside_the_image_are_named(processor, box):
    annotations = {"image_id": 7, "annotations": [{"bbox": box, "category_id": 0}]}
    with pytest.raises(ValueError, match=r"Image 7, annotation 0: box .* invalid_boxes='drop'"):
        processor(np.zeros((100, 100, 3), np.uint8), annotations=annotations)
    with pytest.warns(UserWarning, match="It is dropped"):
        labels = processor(np.zeros((100, 100, 3), np.uint8), annotations=annotations, invalid_boxes="drop")["labels"]
    assert labels[0]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"annotations": []}, "0 annotations for 1 images"),
        ({"annotations": {"image_id": 1}}, "no 'annotations' list"),
        ({"annotations": {"annotations": [{"bbox": [1, 1, 2, 2]}]}}, "no category_id"),
        (
            {
                "annotations": {
                    "annotations": [
                        {"bbox": [1, 1, 2, 2], "category_id": 0, "morphology": [0]},
                        {"bbox": [1, 1, 2, 2], "category_id": 0, "morphology": [0, 1]},
                    ]
                }
            },
            "1 and 2 values",
        ),
        (
            {"annotations": {"image_id": 4, "annotations": [{"bbox": [1, 2, 3], "category_id": 0}]}},
            r"Image 4, annotation 0: box \[1, 2, 3\] has 3 values",
        ),
        ({"annotations": {"annotations": []}, "masks": np.zeros((100, 100))}, "not both"),
        ({"resample": 1}, "resample must be"),
        ({"masks": np.zeros((5, 5))}, r"Mask 0 has shape \(5, 5\), its image \(100, 100\)"),
        ({"task": "counting"}, "Unknown task 'counting'"),
    ],
)
def test_what_does_not_fit_is_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(np.zeros((100, 100, 3), np.uint8), **arguments)


def test_what_is_no_image_or_argument_is_named(processor):
    image = np.zeros((100, 100, 3), np.uint8)
    with pytest.raises(ValueError, match="list of images is empty"):
        processor([])
    with pytest.raises(ValueError, match=r"got shape \(2, 100, 100\)"):
        processor(torch.zeros(2, 100, 100))
    with pytest.raises(TypeError, match="got int"):
        processor([image, 3])
    for entries in (complex, str, object):
        with pytest.raises(TypeError, match="Pixels must be real numbers, got an array of "):
            processor(np.zeros((4, 4, 3), entries))
    with pytest.raises(TypeError, match="no argument invalid_box"):
        processor(image, invalid_box="drop")


def test_settings_survive_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = UniHemaImageProcessor.from_pretrained(tmp_path)
    assert loaded.task_sizes == processor.task_sizes
    assert loaded.task_sizes["single_cell"] == {"longest_edge": 64}
    with pytest.raises(ValueError, match="unknown tasks"):
        UniHemaImageProcessor(task_sizes={"counting": {"longest_edge": 3}})


def detection_output() -> UniHemaDetectionOutput:
    logits = torch.full((1, 3, 2), -9.0)
    logits[0, 1, 0], logits[0, 1, 1], logits[0, 2, 1] = 3.0, 1.0, 0.0
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2], [0.25, 0.5, 0.5, 0.22]]])
    morphology = torch.zeros(1, 3, 5)
    morphology[0, 1, 1], morphology[0, 1, 4], morphology[0, 2, 0] = 5.0, 5.0, 5.0
    return UniHemaDetectionOutput(logits=logits, pred_boxes=boxes, pred_morphology=morphology)


def test_detections_come_back_in_original_pixels(processor):
    output = detection_output()
    found = processor.post_process_object_detection(output, threshold=0.4, target_sizes=[(100, 200)])[0]
    assert found["queries"].tolist() == [1, 2]
    assert found["labels"].tolist() == [0, 1]
    assert found["scores"].tolist() == pytest.approx([0.9526, 0.5], abs=1e-4)
    assert found["boxes"][0].tolist() == pytest.approx([0, 40, 100, 60], abs=1e-3)
    every_class = processor.post_process_object_detection(output, threshold=0.4, one_class_per_query=False)[0]
    assert every_class["queries"].tolist() == [1, 1, 2]
    per_class = processor.post_process_object_detection(output, threshold=torch.tensor([0.99, 0.4]))[0]
    assert per_class["queries"].tolist() == [2]
    assert processor.post_process_object_detection(output, 0.4, nms_iou=0.5)[0]["queries"].tolist() == [1]
    assert len(processor.post_process_object_detection(output, 0.4, top_k=1)[0]["scores"]) == 1
    with pytest.raises(InputError, match="2 target_sizes for 1 images"):
        processor.post_process_object_detection(output, target_sizes=[(1, 1), (2, 2)])


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (5, 5, 3), ("a", "b"), 5, (float("nan"), 5)])
def test_target_sizes_that_are_none(processor, size):
    masks = UniHemaSegmentationOutput(mask_logits=torch.zeros(1, 32, 32))
    with pytest.raises(InputError, match="target_sizes are height and width of each image in pixels"):
        processor.post_process_object_detection(detection_output(), target_sizes=[size])
    with pytest.raises(InputError, match="target_sizes are height and width of each image in pixels"):
        processor.post_process_semantic_segmentation(masks, target_sizes=[size])


@pytest.mark.parametrize("threshold", [None, "0.5", {"RBC": 0.5}, [0.5], [0.5] * 3, float("nan"), [0.5, float("nan")]])
def test_thresholds_that_are_none(processor, threshold):
    with pytest.raises(InputError, match="threshold must be one number, or one for each of 2 classes"):
        processor.post_process_object_detection(detection_output(), threshold=threshold)


def test_a_cell_boxed_twice_counts_once():
    whole, nucleus, overlapping = [0.0, 0.0, 100.0, 100.0], [30.0, 30.0, 70.0, 70.0], [60.0, 0.0, 160.0, 100.0]
    boxes, same = torch.tensor([whole, nucleus, overlapping]), torch.zeros(3, dtype=torch.long)
    assert distinct_cells(boxes, same).tolist() == [True, False, True]
    assert distinct_cells(boxes, torch.tensor([0, 1, 0])).tolist() == [True, True, True]
    assert distinct_cells(boxes[:0], same[:0]).tolist() == []
    alike = torch.tensor([whole, [0.0, 0.0, 100.0, 90.0]])
    assert distinct_cells(alike, torch.tensor([0, 1])).tolist() == [True, False]
    assert distinct_cells(alike, torch.tensor([0, 1]), across_classes=False).tolist() == [True, True]
    assert distinct_cells(alike, same[:2], iou=0.95, within=None).tolist() == [True, True]
    within_a_class = distinct_cells(
        torch.tensor([whole, whole, nucleus]), torch.tensor([0, 1, 1]), across_classes=False
    )
    assert within_a_class.tolist() == [True, True, False]
    # What a dropped cell covers is free for the next one.
    chain = torch.tensor([[0.0, 0, 100, 10], [20.0, 0, 120, 10], [40.0, 0, 140, 10]])
    assert distinct_cells(chain, same, within=None).tolist() == [True, False, True]


def test_morphology_belongs_to_the_detected_queries(processor):
    output = detection_output()
    found = processor.post_process_object_detection(output, threshold=0.4)
    attributes = {"vacuoles": ["absent", "prominent"], "shape": ["round", "oval", "irregular"]}
    cells = processor.post_process_morphology(output, found, attributes)[0]
    assert [cell["vacuoles"]["value"] for cell in cells] == ["prominent", "absent"]
    assert cells[0]["shape"]["value"] == "irregular"
    assert cells[0]["vacuoles"]["score"] == pytest.approx(torch.tensor([0.0, 5.0]).softmax(0)[1].item())
    with pytest.raises(ValueError, match="2 values, the model's output 5"):
        processor.post_process_morphology(output, found, {"vacuoles": ["absent", "prominent"]})


def test_nothing_found_keeps_shapes_and_types(processor):
    output = detection_output()
    found = processor.post_process_object_detection(output, threshold=0.999, target_sizes=[(10, 10)])
    assert found[0]["boxes"].shape == (0, 4)
    assert found[0]["labels"].dtype == found[0]["queries"].dtype == torch.int64
    attributes = {"vacuoles": ["absent", "prominent"], "shape": ["round", "oval", "irregular"]}
    assert processor.post_process_morphology(output, found, attributes) == [[]]


def test_masks_lose_their_padding_before_they_are_resized(processor):
    logits = torch.full((1, 32, 64), -8.0)
    logits[0, :16, 32:] = 8.0
    pixel_mask = torch.zeros(1, 32, 64, dtype=torch.long)
    pixel_mask[0, :16, :48] = 1
    output = UniHemaSegmentationOutput(mask_logits=logits)
    mask = processor.post_process_semantic_segmentation(output, [(32, 96)], pixel_mask=pixel_mask)[0]
    assert mask.shape == (32, 96) and mask.dtype == torch.int64
    assert mask[:, 66:].all() and not mask[:, :62].any()
    with pytest.raises(ValueError, match="2 target_sizes for 1 images"):
        processor.post_process_semantic_segmentation(output, [(1, 1), (2, 2)])
    probabilities = processor.post_process_semantic_segmentation(output, threshold=None)[0]
    assert probabilities.shape == (32, 64) and probabilities.is_floating_point()
