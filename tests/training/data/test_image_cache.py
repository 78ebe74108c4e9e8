"""Decoded images in files: once a run, never stale, whole or absent; and large images, which are reduced before their views."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from unihema.errors import OutputError
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data import image_cache
from unihema.training.data.augmentation import AugmentationConfig
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.image_cache import ImageCache


SIZE = (96, 64)


@pytest.fixture(scope="module")
def processor():
    return UniHemaProcessor.from_default(**dict.fromkeys(("detection", "segmentation"), {"longest_edge": 96}))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(path)
    return str(path)


class Decoder:
    """Counts how often it is asked."""

    def __init__(self, path):
        self.path, self.calls = path, 0

    def __call__(self):
        self.calls += 1
        pixels = np.ascontiguousarray(np.asarray(Image.open(self.path)).transpose(2, 0, 1))
        return pixels, (7, 9)


def test_an_image_is_decoded_once_and_again_when_its_file_has_changed(picture, tmp_path):
    decode, folder = Decoder(picture), tmp_path / "cache"
    first, size = ImageCache(folder, 1e9).load(picture, "", decode)
    kept, opened = ImageCache(folder, 1e9).load(picture, "", decode)
    assert decode.calls == 1 and np.array_equal(first, kept) and size == opened == (7, 9)
    # What is kept does not change with what a caller does to its array.
    kept[:] = 0
    assert np.array_equal(ImageCache(folder, 1e9).load(picture, "", decode)[0], first)
    ImageCache(folder, 1e9).load(picture, "another size", decode)
    assert decode.calls == 2
    state = os.stat(picture)
    Image.new("RGB", SIZE, "red").save(picture)
    os.utime(picture, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    assert ImageCache(folder, 1e9).load(picture, "", decode)[0].max(axis=(1, 2)).tolist() == [255, 0, 0]
    assert decode.calls == 3


@pytest.mark.parametrize("left", [0, 10, 1000])
def test_a_damaged_entry_is_written_anew(picture, tmp_path, left):
    decode, cache = Decoder(picture), ImageCache(tmp_path / "cache", 1e9)
    expected, _ = cache.load(picture, "", decode)
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:left])
    assert np.array_equal(cache.load(picture, "", decode)[0], expected) and decode.calls == 2
    assert np.array_equal(cache.load(picture, "", decode)[0], expected) and decode.calls == 2


def test_no_more_is_kept_than_the_limit_shared_out_to_all_that_write(picture, tmp_path):
    decode = Decoder(picture)
    entry = SIZE[0] * SIZE[1] * 3 + 100
    for writers, kept in ((1, 2), (2, 1), (3, 0)):
        cache = ImageCache(tmp_path / f"cache-{writers}", 2.5 * entry, writers)
        for rule in "abc":
            cache.load(picture, rule, decode)
        assert len(list(cache.folder.glob("*")) if cache.folder.is_dir() else []) == kept
    # One that goes on counts what is there.
    again = ImageCache(tmp_path / "cache-1", 2.5 * entry)
    again.load(picture, "d", decode)
    assert len(list(again.folder.iterdir())) == 2
    again.clear()
    assert not again.folder.exists()


def test_a_full_disk_ends_keeping_and_nothing_else(picture, tmp_path, monkeypatch, caplog):
    def full(path, write):
        raise OutputError(f"{path}: cannot be written (No space left on device).")

    monkeypatch.setattr(image_cache, "write_atomically", full)
    decode, cache = Decoder(picture), ImageCache(tmp_path / "cache", 1e9)
    for _ in range(2):
        assert cache.load(picture, "", decode)[0].shape == (3, SIZE[1], SIZE[0])
    assert decode.calls == 2 and caplog.text.count("No more images are kept") == 1


def field(tmp_path, suffix: str, side: int = 960):
    """A smooth field with one cell, and its row; the mask is of the cell."""
    rows, columns = np.mgrid[:side, : side * 4 // 3]
    pixels = np.stack([160 + 60 * np.sin(columns / 97), 150 + 40 * np.cos(rows / 61), 180 + 0 * rows], -1)
    cell = (rows - side / 2) ** 2 + (columns - side / 3) ** 2 < (side / 6) ** 2
    pixels[cell] = (90, 30, 120)
    path = tmp_path / f"field{suffix}"
    Image.fromarray(pixels.astype(np.uint8)).save(path, **({"quality": 95} if suffix == ".jpg" else {}))
    box = [side / 3 - side / 6, side / 2 - side / 6, side / 3, side / 3]
    row = {"image": str(path), "file_name": path.name, "dataset": "d"}
    detection = row | {
        "task": "detection",
        "objects": {"bbox": [box], "category": ["WBC"]},
        "annotated_classes": None,
    }
    return detection, row | {"task": "segmentation", "mask": cell.astype(np.uint8), "prompt": "cell"}


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_large_image_is_reduced_before_its_views_and_its_cells_stay_in_place(
    processor, tmp_path, suffix, monkeypatch
):
    detection, segmentation = field(tmp_path, suffix)
    views = AugmentationConfig(brightness=0, contrast=0, saturation=0, hue=0, stain=0, blur=0)
    whole = SmearDataset([detection], processor, "detection", views, class_names=["WBC"])
    masks = SmearDataset([segmentation], processor, "segmentation", views)
    cache = ImageCache(tmp_path / "cache", 1e9)
    kept = SmearDataset([detection], processor, "detection", views, class_names=["WBC"], cache=cache)
    reduced = [data.collate([data[0, epoch]]) for data in (whole, masks, kept) for epoch in range(6)]
    # 96 pixels of a window of at least 0.6 of the sides.
    pixels, opened = whole._decoded(detection)
    assert opened == (960, 1280) and pixels.shape == (3, 120, 160)
    monkeypatch.setattr("unihema.training.data.dataset.REDUCED_BELOW", 0.0)
    plain = SmearDataset([detection], processor, "detection", views, class_names=["WBC"])
    masks = SmearDataset([segmentation], processor, "segmentation", views)
    exact = [data.collate([data[0, epoch]]) for data in (plain, masks) for epoch in range(6)]
    for one, other in zip(reduced, exact + exact[:6]):
        assert one["pixel_values"].shape == other["pixel_values"].shape
        levels = (one["pixel_values"] - other["pixel_values"]).abs() * 0.225 * 255
        assert levels.mean() < 1.5
        if one["task"] == "detection":
            torch.testing.assert_close(one["labels"][0]["boxes"], other["labels"][0]["boxes"], atol=0.01, rtol=0)
        else:
            assert (one["labels"] != other["labels"]).float().mean() < 0.02
    for one, other in zip(reduced[:6], reduced[12:]):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_images_that_are_measured_or_not_changed_are_not_reduced(processor, tmp_path):
    detection, _ = field(tmp_path, ".jpg")
    for options in ({"evaluation": True, "augmentation": AugmentationConfig()}, {}):
        data = SmearDataset([detection], processor, "detection", class_names=["WBC"], **options)
        assert data[0]["image"].shape == (3, 960, 1280)


def test_colour_and_focus_are_changed_in_what_the_model_sees(processor, tmp_path):
    detection, _ = field(tmp_path, ".png", side=120)
    data = SmearDataset([detection], processor, "detection", AugmentationConfig(zoom=0), class_names=["WBC"])
    assert data[0]["image"].shape == (3, 72, 96)
    # A batch of a size of its own is resized when that is known.
    scaled = SmearDataset(
        [detection], processor, "detection", AugmentationConfig(zoom=0, scale=0.5), class_names=["WBC"]
    )
    assert scaled[0]["image"].shape == (3, 120, 160)
