"""Images of every kind are opened upright as 8-bit RGB, and broken files are named."""

import numpy as np
import pytest
from PIL import Image

from unihema.processing_unihema.image_io import UnreadableImageError, load_image


RGB = np.zeros((20, 30, 3), np.uint8) + np.array([200, 120, 40], np.uint8)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1", "RGB"])
def test_modes(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(RGB).convert(mode).save(path)
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (30, 20)
    if mode in ("RGBA", "CMYK", "RGB"):
        assert np.abs(np.asarray(image).astype(int) - RGB).max() <= 3


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.dstack([RGB, np.zeros((20, 30), np.uint8)])
    Image.fromarray(pixels, "RGBA").save(tmp_path / "clear.png")
    assert np.asarray(load_image(tmp_path / "clear.png")).min() == 255


def test_sixteen_bit_is_scaled_by_the_bits_in_use(tmp_path):
    gradient = np.linspace(0, 4095, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(gradient).save(tmp_path / "camera.png")
    values = np.asarray(load_image(tmp_path / "camera.png"))[..., 0]
    assert values.min() == 0 and values.max() == 255
    assert np.abs(values - gradient / 4095 * 255).max() <= 1


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "phone.jpg", exif=exif)
    assert load_image(tmp_path / "phone.jpg").size == (20, 30)


def test_a_whole_slide_is_reduced_on_opening(tmp_path):
    Image.new("L", (20000, 20000), 128).save(tmp_path / "slide.png")
    image = load_image(tmp_path / "slide.png", max_pixels=1_000_000)
    assert image.width == image.height
    assert 500 <= image.width <= 1000
    assert Image.MAX_IMAGE_PIXELS is not None


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    assert load_image(tmp_path / "one.png").size == (1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such image file"),
        (b"", "the file is empty"),
        (b"not an image at all", "not an image"),
        ("truncated", "truncated or damaged"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "Süd 07.png"
    if content == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=message) as error:
        load_image(path)
    assert "Süd 07.png" in str(error.value)


def test_what_is_no_image_is_refused():
    with pytest.raises(TypeError, match="got int"):
        load_image(3)
