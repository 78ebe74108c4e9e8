"""What Transformers expects of processors and image processors, of both backends."""

import json

import numpy as np
import pytest
import torch
from both_backends import BACKENDS, SIZES, assert_same, noise
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
from transformers.image_utils import ChannelDimension

from unihema import UniHemaImageProcessor, UniHemaProcessor


CHANGED = {
    "size": {"shortest_edge": 33, "longest_edge": 77},
    "pad_multiple": 16,
    "invalid_boxes": "drop",
    "task": "segmentation",
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "resample": 3,
    "rescale_factor": 1 / 128,
    "do_resize": False,
    "do_normalize": False,
    "do_pad": False,
    "pad_size": {"height": 96, "width": 96},
}
# One of the 255 levels of a pixel, after division by the smallest of the standard deviations.
ONE_LEVEL = 1 / 255 / 0.224


# Saving and loading


def test_the_settings_as_json(image_processor, processor, tmp_path):
    settings = json.loads(image_processor.to_json_string())
    assert settings["image_processor_type"] == "UniHemaImageProcessor"
    assert settings["task_sizes"] == SIZES
    image_processor.to_json_file(tmp_path / "settings.json")
    assert type(image_processor).from_json_file(tmp_path / "settings.json").to_dict() == image_processor.to_dict()
    settings = json.loads(processor.to_json_string())
    assert settings["image_processor"]["task_sizes"] == SIZES
    assert settings["max_text_length"] == 64 and settings["processor_class"] == "UniHemaProcessor"
    assert "tokenizer" not in settings and "chat_template" not in settings


def test_the_image_processor_needs_no_settings(backend):
    assert BACKENDS[backend]().backend == backend
    assert BACKENDS[backend].model_input_names == ["pixel_values", "pixel_mask"]


@pytest.mark.parametrize("name", CHANGED)
def test_every_changed_setting_of_the_image_processor_is_saved(backend, name, tmp_path):
    given = BACKENDS[backend](task_sizes=SIZES, **{name: CHANGED[name]})
    assigned = BACKENDS[backend](task_sizes=SIZES)
    unchanged = assigned.to_dict()
    setattr(assigned, name, CHANGED[name])
    for changed in (given, assigned):
        changed.save_pretrained(tmp_path)
        for loaded in (
            BACKENDS[backend].from_pretrained(tmp_path),
            AutoImageProcessor.from_pretrained(tmp_path, backend=backend),
        ):
            assert loaded.to_json_string() == changed.to_json_string()
            assert loaded.to_dict() != unchanged | {"auto_map": loaded.auto_map}
            image = noise(50, 60)
            assert_same(loaded(image), changed(image))


def test_an_assigned_size_is_the_size_of_detection(image_processor):
    image_processor.size = {"longest_edge": 32}
    assert dict(image_processor.size) == image_processor.task_sizes["detection"] == {"longest_edge": 32}
    assert image_processor(noise(50, 60))["pixel_mask"].sum() == 32 * 27
    assert image_processor(noise(50, 60), task="single_cell")["pixel_mask"].sum() == 40 * 33


@pytest.mark.parametrize("loading", [UniHemaProcessor, AutoProcessor])
def test_a_saved_processor_is_the_same(processor, backend, loading, tmp_path):
    processor.default_prompts["detection"] = "RBC, WBC"
    processor.max_text_length = 40
    processor.image_processor.pad_multiple = 16
    processor.save_pretrained(tmp_path)
    loaded = loading.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is UniHemaProcessor and type(loaded.image_processor) is BACKENDS[backend]
    # Where the code is belongs to the folder, and only saving notes it.
    assert loaded.to_dict() | {"auto_map": {}} == processor.to_dict() | {"auto_map": {}}
    assert repr(loaded.image_processor) == repr(processor.image_processor)
    assert loaded.tokenizer.backend_tokenizer.to_str() == processor.tokenizer.backend_tokenizer.to_str()
    assert loaded.tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map
    for inputs in ({}, {"task": "single_cell"}, {"text": "Which cell is this?", "answers": ["neutrophil"]}):
        assert_same(loaded(images=noise(50, 60), **inputs), processor(images=noise(50, 60), **inputs))


def test_the_image_processor_of_a_saved_processor_alone(processor, backend, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is BACKENDS[backend]
    assert loaded.to_dict() == processor.image_processor.to_dict()


def test_each_backend_loads_what_the_other_saved(backend, tmp_path):
    saved = BACKENDS[backend](task_sizes=SIZES, pad_multiple=16)
    saved.save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is UniHemaImageProcessor
    for name, expected in BACKENDS.items():
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
        assert type(loaded) is expected and loaded.backend == name
        assert loaded.to_dict() == saved.to_dict()


# Images


def test_both_backends_give_the_same_pixels():
    images = [noise(30, 40), noise(200, 150), noise(97, 31), noise(48, 64)]
    labels = {"annotations": [{"annotations": [{"bbox": [3, 4, 20, 15], "category_id": 1}]}] * 4}
    masks = {"masks": [image[..., 0] > 128 for image in images]}
    for given in (labels, masks):
        ours, pil = (one(task_sizes=SIZES)(images, **given) for one in BACKENDS.values())
        assert_same(pil, ours, atol=ONE_LEVEL * 1.001)
        assert (pil["pixel_values"] - ours["pixel_values"]).abs().mean() < ONE_LEVEL / 10
    plain = {"do_rescale": False, "do_normalize": False}
    floats = [(image / 255).astype(np.float32) for image in images]
    ours, pil = (one(task_sizes=SIZES)(floats, **plain) for one in BACKENDS.values())
    assert_same(pil, ours, atol=1e-4)


@pytest.mark.parametrize("resample", [0, 3])
def test_both_backends_resize_in_the_same_places(resample):
    # Smooth, so that a shift by part of a pixel shows and the last bit of the arithmetic does not.
    rows, columns = np.mgrid[:90, :120]
    smooth = np.stack((rows * 2, columns * 2, rows + columns), -1).astype(np.uint8)
    plain = {"do_rescale": False, "do_normalize": False, "resample": resample}
    ours, pil = (one(task_sizes=SIZES)(smooth, **plain)["pixel_values"].float() for one in BACKENDS.values())
    assert (ours - pil).abs().max() <= (2 if resample == 3 else 0)


@pytest.mark.parametrize("size", [(30, 40), (48, 64), (90, 70)])
def test_pil_numpy_and_torch_images_give_equal_pixels(image_processor, size):
    image = noise(*size)
    fractions = (image / 255).astype(np.float32)
    expected = image_processor(Image.fromarray(image))["pixel_values"]
    assert expected.dtype == torch.float32
    for given in (
        image,
        image.transpose(2, 0, 1),
        fractions,
        fractions.astype(np.float64),
        fractions.transpose(2, 0, 1),
        torch.from_numpy(image),
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(fractions),
        torch.from_numpy(fractions).permute(2, 0, 1),
        torch.from_numpy(fractions).double(),
    ):
        torch.testing.assert_close(image_processor(given)["pixel_values"], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(image_processor([given] * 2)["pixel_values"][1:], expected, rtol=0, atol=1e-6)


def test_given_images_are_not_changed(image_processor):
    for image in (noise(48, 64), torch.from_numpy(noise(48, 64) / 255).float()):
        before = image.copy() if isinstance(image, np.ndarray) else image.clone()
        image_processor(image)
        image_processor(image, do_rescale=False)
        assert (image == before).all()


def test_the_order_of_channels(image_processor):
    # Three rows, three columns and three channels: only `input_data_format` tells.
    image = noise(3, 3)
    expected = image_processor(Image.fromarray(image))["pixel_values"]
    for last in (image, torch.from_numpy(image)):
        first = last.transpose(2, 0, 1) if isinstance(last, np.ndarray) else last.permute(2, 0, 1)
        for given, channels in ((last, "channels_last"), (first, "channels_first"), (first, ChannelDimension.FIRST)):
            found = image_processor(given, input_data_format=channels)["pixel_values"]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"got shape \(60, 80, 3\)"):
        image_processor(noise(60, 80), input_data_format="channels_first")
    with pytest.raises(ValueError, match="channels_middle"):
        image_processor(image, input_data_format="channels_middle")


def test_red_stays_red(image_processor):
    image = np.zeros((48, 64, 3), np.uint8)
    image[..., 0], image[..., 1] = 255, 51
    for given in (image, image.transpose(2, 0, 1), Image.fromarray(image), torch.from_numpy(image)):
        pixels = image_processor(given, do_normalize=False)["pixel_values"][..., :48, :]
        torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor([1, 0.2, 0]), rtol=0, atol=1e-6)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    pixels = image_processor(image, image_mean=mean, image_std=std)["pixel_values"][..., :48, :]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor([1.8, 0, -0.15]), rtol=0, atol=1e-5)
    pixels = image_processor(image, image_mean=0, image_std=0.5)["pixel_values"][..., :48, :]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor([2, 0.4, 0]), rtol=0, atol=1e-5)


def test_transparent_pixels_are_white_whether_rescaled_or_not(image_processor):
    image = noise(48, 64, 4)
    expected = image_processor(image, do_normalize=False)["pixel_values"]
    # Rounding to 8 bits here, none in floats.
    given = (image / 255).astype(np.float32)
    found = image_processor(given, do_normalize=False, do_rescale=False)["pixel_values"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255)


def test_images_of_several_types_in_one_batch(image_processor):
    image, plain = noise(48, 64), {"do_rescale": False, "do_normalize": False}
    fractions = torch.rand(3, 48, 64)
    pixels = image_processor([image, fractions], **plain)["pixel_values"]
    torch.testing.assert_close(pixels[1, :, :48, :64], fractions, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_floats_of_every_precision_become_single_precision(image_processor, dtype):
    fractions = torch.rand(3, 50, 60)
    for plain in ({"do_rescale": False, "do_normalize": False}, {"do_rescale": False}, {}):
        expected = image_processor(fractions, **plain)["pixel_values"]
        found = image_processor(fractions.to(dtype), **plain)["pixel_values"]
        assert found.dtype == expected.dtype == torch.float32
        # Half precision may round an image that is rescaled to the next of its 255 levels.
        torch.testing.assert_close(found, expected, rtol=0, atol=ONE_LEVEL * 1.001)


def test_none_is_an_argument_not_given(image_processor):
    given = dict.fromkeys(("size", "resample", "image_mean", "do_rescale", "device", "input_data_format", "task"))
    assert_same(image_processor(noise(50, 60), **given), image_processor(noise(50, 60)))


def test_sizes_of_some_tasks_in_a_call(image_processor):
    image, sizes = noise(50, 60), {"single_cell": {"longest_edge": 20}}
    assert_same(image_processor(image, task_sizes=sizes), image_processor(image))
    assert image_processor(image, task="single_cell", task_sizes=sizes)["pixel_mask"].sum() == 20 * 17


def test_every_image_of_a_batch_is_as_alone(image_processor):
    sizes = [(48, 64), (64, 48), (20, 90), (90, 20), (7, 7), (300, 400)]
    images = [noise(*size) for size in sizes]
    batch = image_processor(images)
    assert batch["pixel_values"].shape == (6, 3, 64, 64)
    for image, pixels, mask in zip(images, batch["pixel_values"], batch["pixel_mask"], strict=True):
        alone = image_processor(image)
        height, width = int(alone["pixel_mask"][0, :, 0].sum()), int(alone["pixel_mask"][0, 0].sum())
        expected = torch.zeros(64, 64, dtype=torch.long)
        expected[:height, :width] = 1
        assert torch.equal(mask, expected)
        torch.testing.assert_close(
            pixels[:, :height, :width], alone["pixel_values"][0, :, :height, :width], rtol=0, atol=0
        )
        assert (pixels * (1 - mask) == 0).all()


def test_padding_to_a_given_size(image_processor):
    images = [noise(48, 64), noise(64, 48)]
    mask = {"masks": [image[..., 0] > 128 for image in images]}
    wide = image_processor(images, pad_size={"height": 80, "width": 100}, **mask)
    narrow = image_processor(images, **mask)
    assert wide["pixel_values"].shape == (2, 3, 80, 100)
    for name, outside in (("pixel_values", 0), ("pixel_mask", 0), ("labels", -100)):
        expected = torch.full_like(wide[name], outside)
        expected[..., :64, :64] = narrow[name]
        torch.testing.assert_close(wide[name], expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="pad_size 64x63 is smaller than the batch's largest image, 64x64"):
        image_processor(images, pad_size={"height": 64, "width": 63})
    with pytest.raises(ValueError, match="pad_size must have"):
        image_processor(images, pad_size={"heigth": 64})
    with pytest.raises(ValueError, match="pad_size needs height and width, got longest_edge"):
        image_processor(images, pad_size={"longest_edge": 64})


def test_what_would_silently_be_otherwise_is_refused(image_processor):
    with pytest.raises(ValueError, match="do_center_crop would cut cells off"):
        image_processor(noise(48, 64), do_center_crop=True, crop_size={"height": 8, "width": 8})
    with pytest.raises(ValueError, match="channels_first, not channels_last"):
        image_processor(noise(48, 64), data_format="channels_last")
    with pytest.raises(ValueError, match="resample must be"):
        image_processor(noise(48, 64), resample=Image.Resampling.LANCZOS)


# Annotations


@pytest.mark.parametrize("options", [{}, {"size": {"height": 37, "width": 80}}, {"do_resize": False}, {"resample": 0}])
def test_boxes_and_masks_stay_on_a_bright_cell(image_processor, options):
    cells = [((60, 100), (11, 7, 30, 19)), ((300, 200), (120, 180, 80, 120)), ((20, 30), (0, 0, 9, 5))]
    images, annotations, masks = [], [], []
    for (height, width), (x, y, w, h) in cells:
        image = np.zeros((height, width, 3), np.uint8)
        image[y : y + h, x : x + w] = 255
        images.append(image)
        annotations.append({"annotations": [{"bbox": [x, y, w, h], "category_id": 2}]})
        masks.append(image[..., 0] == 255)
    options = options | {"do_normalize": False}
    boxed = image_processor(images, annotations=annotations, **options)
    masked = image_processor(images, masks=masks, **options)
    torch.testing.assert_close(masked["pixel_values"], boxed["pixel_values"], rtol=0, atol=0)
    for i, (original, (_, _, w, h)) in enumerate(cells):
        label, valid = boxed["labels"][i], boxed["pixel_mask"][i].bool()
        height, width = label["size"].tolist()
        assert (height, width) == (int(valid[:, 0].sum()), int(valid[0].sum()))
        assert label["orig_size"].tolist() == list(original)
        scale = height * width / (original[0] * original[1])
        assert label["area"].item() == pytest.approx(w * h * scale, rel=1e-5)
        bright = boxed["pixel_values"][i].mean(0) > 0.5
        rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
        x, y, w, h = (label["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # A side of the cell may fall anywhere within a pixel.
        assert [x - w / 2, y - h / 2, x + w / 2, y + h / 2] == pytest.approx([float(v) for v in expected], abs=0.51)
        mask = masked["labels"][i]
        assert torch.equal(mask == -100, ~valid)
        rows, columns = (mask == 1).any(1).nonzero(), (mask == 1).any(0).nonzero()
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(np.subtract(found, expected)).max() <= 1
        assert (mask == 1).sum() == (columns.max() + 1 - columns.min()) * (rows.max() + 1 - rows.min())
