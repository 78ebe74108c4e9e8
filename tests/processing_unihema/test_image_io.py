"""Images of every kind are opened upright as 8-bit RGB, and broken files are named."""

import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from unihema.errors import InputTypeError, UnreadableImageError
from unihema.files import open_image
from unihema.processing_unihema.image_io import image_size, load_image, load_mask, read_image, stored_size


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


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB", "I;16", "I", "F"])
def test_large_images_of_every_mode_are_reduced(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "F", "I") else "image.png")
    gray = np.tile(np.linspace(0, 1, 300), (200, 1))
    if mode == "I;16":
        image = Image.fromarray((gray * 65535).astype(np.uint16))
    else:
        image = Image.fromarray((gray * 255).astype(np.uint8)).convert("RGB").convert(mode)
    image.save(path)
    reduced = load_image(path, max_pixels=10_000)
    assert reduced.mode == "RGB" and reduced.size == (100, 67)
    values = np.asarray(reduced).mean((0, 2))
    assert values[:10].mean() < 40 and values[-10:].mean() > 215


def test_a_reduced_photo_stays_upright_and_its_own_size_is_known(tmp_path):
    image = Image.new("RGB", (300, 200))
    exif = image.getexif()
    exif[0x0112] = 6
    for name in ("phone.jpg", "phone.png"):
        image.save(tmp_path / name, exif=exif)
        reduced = load_image(tmp_path / name, max_pixels=10_000)
        assert reduced.height > reduced.width
        assert image_size(tmp_path / name) == image_size(str(tmp_path / name)) == (300, 200)
    assert image_size(Image.new("RGB", (30, 20))) == (20, 30)


def test_the_content_of_a_file_is_opened_as_the_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (20, 30), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "camera.png")
    content = (tmp_path / "camera.png").read_bytes()
    assert load_image(content).tobytes() == load_image(tmp_path / "camera.png").tobytes()
    assert image_size(content) == (20, 30)
    with pytest.raises(UnreadableImageError, match="image: the image is truncated or damaged"):
        load_image(content[: len(content) // 2])
    with pytest.raises(UnreadableImageError, match="no such image file"):
        load_image("a" * 5000)


def test_opening_in_threads_leaves_the_limit_of_pixels_as_it_was(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "image.png")
    opening, before = Image.open, Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before)

    def open_slowly(*args, **kwargs):
        time.sleep(0.02)
        return opening(*args, **kwargs)

    # Slow enough that every thread would begin while another one is in the midst of it.
    monkeypatch.setattr(Image, "open", open_slowly)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: load_image(tmp_path / "image.png"), range(16)))
    assert before == Image.MAX_IMAGE_PIXELS


def test_numbers_that_are_no_bytes():
    fractions = np.array([[0.0, 0.5], [1.0, np.nan]])
    assert np.asarray(load_image(fractions))[..., 0].tolist() == [[0, 128], [255, 0]]
    assert np.asarray(load_image(np.array([[0, 1]], np.uint16))).max() == 1
    assert np.asarray(load_image(np.array([[False, True]])))[..., 0].tolist() == [[0, 255]]


@pytest.mark.parametrize("shape", [(4, 5, 2), (0, 5, 3), (2, 4, 5, 3), (5,)])
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[H, W\] or .* got shape"):
        load_image(np.zeros(shape, np.uint8))


def test_a_mask_keeps_its_values_and_a_broken_one_is_named(tmp_path):
    values = np.array([[0, 7], [255, 1]], np.uint8)
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").tolist() == values.tolist()
    (tmp_path / "broken.png").write_bytes(b"xx")
    with pytest.raises(UnreadableImageError, match=r"broken\.png: not an image"):
        load_mask(tmp_path / "broken.png")


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


def test_a_truncated_file_that_is_already_open_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / "field.png"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UnreadableImageError, match=r"field\.png: the image is truncated"):
        load_image(Image.open(path))


def test_what_is_no_image_is_refused():
    with pytest.raises(TypeError, match="got int"):
        load_image(3)
    for entries in (complex, str, object):
        with pytest.raises(InputTypeError, match="Pixels must be real numbers"):
            load_image(np.zeros((4, 4, 3), entries))


@pytest.mark.parametrize("place", ["before the pixels", "behind them", "as text", "nowhere"])
def test_the_size_of_a_png_is_known_without_decoding_it(tmp_path, place, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="6"/>')
    about = {"as text": {"pnginfo": text}, "nowhere": {}}.get(place, {"exif": exif})
    opened.save(tmp_path / "a.png", **about)
    content = (tmp_path / "a.png").read_bytes()
    if place == "behind them":
        start = content.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4])
        content = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    (tmp_path / "a.png").write_bytes(content)
    assert load_image(tmp_path / "a.png").size == ((30, 20) if place == "nowhere" else (20, 30))
    with Image.open(tmp_path / "a.png") as image:
        assert image_size(image) == load_image(content).size[::-1]
        # Reading the chunks leaves the file where it was.
        assert np.asarray(image).shape == (20, 30, 3)
    if place != "behind them":
        monkeypatch.setattr(PngImageFile, "load", lambda _: pytest.fail("decoded"))
    assert image_size(tmp_path / "a.png") == ((20, 30) if place == "nowhere" else (30, 20))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("JPEG", {}), ("PNG", {}), ("WEBP", {})],
    ids=["TIFF", "TIFF, LZW", "JPEG", "PNG", "WEBP"],
)
def test_the_size_is_that_of_the_upright_image_read_or_not(tmp_path, kind, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a", kind, exif=exif, **options)
    upright = (30, 20) if orientation > 4 else (20, 30)
    assert load_image(tmp_path / "a").size == upright[::-1]
    assert image_size(tmp_path / "a") == upright
    with Image.open(tmp_path / "a") as opened:
        assert image_size(opened) == upright
        opened.load()
        assert image_size(opened) == upright
    assert open_image(tmp_path / "a")[1:3] == upright[::-1]


def test_a_page_larger_than_the_first_is_said(tmp_path):
    pages = [Image.fromarray(np.zeros((height, 30, 3), np.uint8)) for height in (10, 40, 20)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    opened, notes = read_image(tmp_path / "a.tif")
    assert opened.size == (30, 10)
    assert notes == ["The file has a larger page (30 x 40 pixels): only the first (30 x 10) is read."]
    pages[1].save(tmp_path / "a.tif", save_all=True, append_images=pages[::2])
    assert read_image(tmp_path / "a.tif")[1] == []


def test_a_png_is_not_decoded_for_metadata_behind_more_pixels_than_it_can_hold(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 50_000, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"tEXt", b"a\0b") + chunk(b"IEND", b""))
    assert stored_size(path) == (60_000, 50_000)
    with pytest.raises(
        UnreadableImageError, match=r"bomb\.png: the file is far too small for the 60000 x 50000 pixels"
    ):
        image_size(path)
