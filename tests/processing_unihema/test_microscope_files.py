"""Files as microscopes write them look as their 8-bit images do, and what is guessed about them is said."""

import base64
import struct
import zlib

import numpy as np
import pytest
from microscope_files import field, write_png, write_tiff
from PIL import Image, features

from unihema.errors import InputError, UnreadableImageError
from unihema.files import open_image
from unihema.processing_unihema.image_io import ImageReadWarning, RefusedImageError, image_size, load_image, read_image
from unihema.processing_unihema.image_processing_unihema import UniHemaImageProcessor


def deep(pixels, bits):
    """8-bit pixels with more bits, in 16."""
    return (pixels.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)


def planes(pixels):
    return [np.ascontiguousarray(pixels[..., band]) for band in range(3)]


def difference(image, pixels):
    pixels = np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels
    assert image.mode == "RGB" and image.size == pixels.shape[1::-1]
    return np.abs(np.asarray(image).astype(int) - pixels).max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [9, 10, 11, 12, 14, 16])
def test_any_bits_of_sixteen_in_any_layout(tmp_path, bits, seed):
    pixels = field(seed=seed)
    colour, gray = deep(pixels, bits), deep(pixels[..., 1], bits)
    files = {
        pixels: truth
        for truth, written in (
            (
                "colour",
                [
                    write_png(tmp_path / "colour.png", colour),
                    write_tiff(tmp_path / "strips.tif", [colour]),
                    write_tiff(tmp_path / "packed.tif", [colour], packed=True),
                    write_tiff(tmp_path / "swapped.tif", [colour], order=">"),
                    write_tiff(tmp_path / "swapped_packed.tif", [colour], order=">", packed=True),
                    write_tiff(tmp_path / "tiles.tif", [colour], tile=16),
                    write_tiff(tmp_path / "tiles_packed.tif", [colour], tile=16, packed=True),
                    write_tiff(tmp_path / "planes.tif", [colour], planar=True),
                    write_tiff(tmp_path / "planes_swapped.tif", [colour], planar=True, order=">"),
                    write_tiff(tmp_path / "planes_in_tiles.tif", [colour], planar=True, tile=16),
                    write_tiff(tmp_path / "pages.tif", planes(colour), photometric=1),
                ],
            ),
            (
                "gray",
                [
                    write_png(tmp_path / "gray.png", gray),
                    write_tiff(tmp_path / "gray.tif", [gray], photometric=1),
                    write_tiff(tmp_path / "gray_swapped.tif", [gray], photometric=1, order=">"),
                    write_tiff(tmp_path / "gray_packed.tif", [gray], photometric=1, packed=True),
                    write_tiff(tmp_path / "signed.tif", [(gray // 2).astype(np.int16)], photometric=1),
                ],
            ),
        )
        for pixels in written
    }
    for path, truth in files.items():
        image, notes = read_image(path)
        assert difference(image, pixels if truth == "colour" else pixels[..., 1]) <= 1, path.name
        guessed = [note for note in notes if "bits are in use" in note]
        in_use = bits - 1 if path.name == "signed.tif" else bits
        assert bool(guessed) == (in_use < 16 and in_use > 8), path.name
        assert all(f"read as {in_use}" in note for note in guessed), path.name
        # The content, and the file as PIL opens it, are read as the file.
        for same in (path.read_bytes(), Image.open(path)):
            assert read_image(same)[0].tobytes() == image.tobytes() and read_image(same)[1] == notes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("what", ["hot pixel", "hot pixels", "scale bar", "scale bar and letters"])
def test_hot_pixels_and_a_scale_bar_do_not_set_the_range(tmp_path, what, seed):
    rng = np.random.default_rng(seed)
    pixels = field((320, 240), seed)
    colour = deep(pixels, 12)
    marked = np.zeros((240, 320), bool)
    if what == "hot pixel":
        marked[rng.integers(240), rng.integers(320)] = True
    elif what == "hot pixels":
        marked[rng.integers(240, size=60), rng.integers(320, size=60)] = True
    else:
        marked[220:228, 200:310] = True
    colour[marked] = rng.integers(9000, 65536, (marked.sum(), 3)) if "hot" in what else 65535
    if "letters" in what:
        colour[215, 240:260] = np.linspace(4095, 65000, 20)[:, None]
        marked[215, 240:260] = True
    for path in (write_tiff(tmp_path / "a.tif", [colour]), write_png(tmp_path / "a.png", colour)):
        image, _ = read_image(path)
        assert np.abs(np.asarray(image).astype(int) - pixels)[~marked].max() <= 1
    image, _ = read_image(write_tiff(tmp_path / "gray.tif", [colour[..., 1]], photometric=1))
    assert np.abs(np.asarray(image)[..., 1].astype(int) - pixels[..., 1])[~marked].max() <= 1


def test_the_depth_that_a_file_states_is_taken(tmp_path):
    """Of a dark image, whose pixels say nothing: they would be taken for 10 bits."""
    dark = field() // 5
    colour = deep(dark, 12)
    ome = (
        '<OME><Image><Pixels SizeC="3" SizeZ="1" SizeT="1" DimensionOrder="XYCZT" SignificantBits="12"/></Image></OME>'
    )
    for path in (
        write_png(tmp_path / "stated.png", colour, significant=12),
        write_tiff(tmp_path / "ome.tif", [colour], description=ome),
        write_tiff(tmp_path / "ome_pages.tif", planes(colour), photometric=1, description=ome),
        write_tiff(tmp_path / "largest.tif", [colour], tags={281: [4095] * 3}),
    ):
        image, notes = read_image(path)
        assert difference(image, dark) <= 1, path.name
        assert not [note for note in notes if "bits" in note]
    # Stated wrongly: pixels are brighter than that.
    image, _ = read_image(write_png(tmp_path / "wrong.png", deep(field(), 16), significant=12))
    assert difference(image, field()) <= 1


def test_gray_with_white_as_zero(tmp_path):
    gray = field()[..., 1]
    for name, values, packed in (
        ("8", 255 - gray, False),
        ("8_packed", 255 - gray, True),
        ("16", 65535 - deep(gray, 16), False),
        ("16_packed", 65535 - deep(gray, 16), True),
        ("float", 1 - (gray / 255).astype(np.float32), False),
    ):
        path = write_tiff(tmp_path / f"{name}.tif", [values], photometric=0, packed=packed)
        assert difference(load_image(path), gray) <= 1, name


def test_transparency_of_sixteen_bits_is_laid_over_white(tmp_path):
    pixels = field()
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    alpha[:20] = 0
    over = np.where(alpha[..., None] > 0, pixels, 255)
    for bits in (12, 16):
        colour, opaque = deep(pixels, bits), deep(alpha, 16)
        both = np.dstack([colour, opaque])
        assert difference(read_image(write_png(tmp_path / "a.png", both))[0], over) <= 1
        assert difference(read_image(write_tiff(tmp_path / "a.tif", [both], extra=2))[0], over) <= 1
        assert difference(read_image(write_tiff(tmp_path / "p.tif", [both], extra=2, packed=True))[0], over) <= 1
        assert difference(read_image(both)[0], over) <= 1
        gray = np.dstack([colour[..., 1], opaque])
        assert difference(read_image(write_png(tmp_path / "gray.png", gray))[0], over[..., 1]) <= 1
    premultiplied = np.where(alpha[..., None] > 0, deep(pixels, 16), 0)
    path = write_tiff(tmp_path / "m.tif", [np.dstack([premultiplied, deep(alpha, 16)])], extra=1)
    assert difference(read_image(path)[0], over) <= 1
    gray = np.dstack([np.where(alpha > 0, pixels[..., 1], 0).astype(np.uint8), alpha])
    path = write_tiff(tmp_path / "La.tif", [gray], photometric=1, extra=1)
    # Pillow reads these from 13 on.
    if features.version("pil") >= "13":
        assert difference(read_image(path)[0], over[..., 1]) <= 1


def test_a_transparent_colour_is_laid_over_white(tmp_path):
    pixels = field()
    pixels[:20] = (10, 20, 30)
    over = pixels.copy()
    over[:20] = 255
    colour = deep(pixels, 16)
    path = write_png(tmp_path / "colour.png", colour, transparent=tuple(map(int, colour[0, 0])))
    assert difference(load_image(path), over) <= 1
    path = write_png(tmp_path / "gray.png", colour[..., 1], transparent=(int(colour[0, 0, 1]),))
    assert difference(load_image(path), over[..., 1]) <= 1
    Image.fromarray(pixels).save(tmp_path / "8.png", transparency=(10, 20, 30))
    assert difference(load_image(tmp_path / "8.png"), over) == 0


OME = (
    '<OME><Image><Pixels DimensionOrder="{order}" SizeC="{c}" SizeZ="{z}" SizeT="{t}" SizeX="48" SizeY="40">{names}'
    "</Pixels></Image></OME>"
)


def ome(c=1, z=1, t=1, order="XYCZT", names=()):
    return OME.format(order=order, c=c, z=z, t=t, names="".join(f'<Channel ID="x" Name="{name}"/>' for name in names))


@pytest.mark.parametrize("dtype", ["8", "12", "float"])
def test_three_gray_pages_are_red_green_and_blue(tmp_path, dtype):
    pixels = field()
    values = {"8": pixels, "12": deep(pixels, 12), "float": (pixels / 255).astype(np.float32)}[dtype]
    for name, description, order in (
        ("bare", "", (0, 1, 2)),
        ("tifffile", '{"shape": [3, 40, 48]}', (0, 1, 2)),
        ("imagej", "ImageJ=1.54f\nimages=3\nchannels=3\nmode=composite\n", (0, 1, 2)),
        ("ome", ome(c=3), (0, 1, 2)),
        ("ome_names", ome(c=3, names=("Blue", "green", "R")), (2, 1, 0)),
    ):
        pages = [planes(values)[band] for band in order]
        for packed in (False, True):
            image, notes = read_image(
                write_tiff(tmp_path / f"{name}.tif", pages, 1, description=description, packed=packed)
            )
            assert difference(image, pixels) <= 1, name
            assert any("read as red, green and blue" in note for note in notes) == (name != "ome_names")
    assert image_size(tmp_path / "ome.tif") == (40, 48)


def test_of_a_stack_the_plane_in_focus_and_of_a_series_the_first_is_read(tmp_path):
    pixels = field()
    gray = pixels[..., 1]

    def blurred(values, count, right):
        """As a stack is, or a series that loses its focus; whatever the type of the values."""
        found = []
        for index in range(count):
            around = [
                np.roll(values.astype(np.float64), step, 0)
                for step in range(-abs(index - right), abs(index - right) + 1)
            ]
            found.append(np.mean(around, axis=0).round().astype(values.dtype))
        return found

    for description, count, right, said in (
        ("ImageJ=1.54f\nimages=7\nslices=7\n", 7, 5, "stack of 7 planes: only plane 6"),
        ("ImageJ=1.54f\nimages=3\nslices=3\n", 3, 0, "stack of 3 planes: only plane 1"),
        ("ImageJ=1.54f\nimages=5\nframes=5\n", 5, 0, "series of 5 times: only the first"),
        (ome(z=4), 4, 2, "stack of 4 planes: only plane 3"),
        (ome(z=2, t=3, order="XYTZC"), 6, 3, "stack of 2 planes: only plane 2"),
        ("", 4, 0, "has 4 pages, and nothing says what they are"),
        (ome(z=9), 4, 0, "has 4 pages, and nothing says what they are"),
        ("ImageJ=1.54f\nimages=9\nslices=9\n", 2, 0, "has 2 pages, and nothing says what they are"),
    ):
        for values, truth, photometric in ((gray, gray, 1), (pixels, pixels, 2), (deep(pixels, 16), pixels, 2)):
            path = write_tiff(tmp_path / "a.tif", blurred(values, count, right), photometric, description=description)
            image, notes = read_image(path)
            assert difference(image, truth) <= 1, description
            assert any(said in note for note in notes), (description, notes)
    channels_of_planes = [page for moved in blurred(pixels, 5, 2) for page in planes(moved)]
    for description in ("ImageJ=1.54f\nimages=15\nchannels=3\nslices=5\nhyperstack=true\n", ome(c=3, z=5)):
        image, notes = read_image(write_tiff(tmp_path / "b.tif", channels_of_planes, 1, description=description))
        assert difference(image, pixels) == 0 and len(notes) == 2


def test_previews_are_no_pages_of_a_stack(tmp_path):
    pixels = field()
    assert read_image(write_tiff(tmp_path / "a.tif", [pixels, pixels[::2, ::2], pixels[::4, ::4]]))[1] == []
    # Marked as reduced, though of one size.
    path = write_tiff(tmp_path / "b.tif", [pixels[..., 0]] * 3, 1, tags={254: [1]})
    assert difference(read_image(path)[0], pixels[..., 0]) == 0


def test_the_palettes_of_channels_are_not_taken_for_their_colours(tmp_path):
    """ImageJ writes each channel of a composite with the palette in which it shows it."""
    pixels = field()
    reds = np.zeros((3, 256), np.uint16)
    reds[0] = np.arange(256) * 257
    for count in (3, 4):
        pages = [planes(pixels)[index % 3] for index in range(count)]
        description = f"ImageJ=1.54f\nimages={count}\nchannels={count}\nmode=composite\n"
        path = write_tiff(tmp_path / "a.tif", pages, 3, description=description, tags={320: reds.ravel().tolist()})
        if count == 3:
            assert difference(read_image(path)[0], pixels) == 0
            assert read_image(path, 600)[0].size == (24, 20)
        else:
            with pytest.raises(RefusedImageError, match=r"a\.tif: it has 4 channels"):
                read_image(path)


def test_channels_of_which_pages_are_missing_are_refused(tmp_path):
    gray = field()[..., 0]
    for description in ("ImageJ=1.54f\nimages=4\nchannels=4\n", ome(c=4)):
        path = write_tiff(tmp_path / "a.tif", [gray, gray], 1, description=description)
        with pytest.raises(RefusedImageError, match=r"a\.tif: it says that it has 4 channels, and its pages \(2\)"):
            read_image(path)


def test_channels_that_are_no_colours_are_refused(tmp_path):
    pixels = field()
    for count, names in ((2, ()), (4, ()), (4, ("DAPI", "FITC", "Cy3", "Cy5"))):
        pages = [pixels[..., index % 3] for index in range(count)]
        path = write_tiff(tmp_path / "a.tif", pages, 1, description=ome(c=count, names=names))
        with pytest.raises(
            UnreadableImageError, match=rf"a\.tif: it has {count} channels.* Merge them to one RGB image"
        ):
            load_image(path)
    four = [*planes(pixels), pixels[..., 0]]
    path = write_tiff(tmp_path / "b.tif", four, 1, description=ome(c=4, names=("Red", "Green", "Blue", "IR")))
    assert difference(load_image(path), pixels) == 0


def test_the_first_picture_of_an_animation_is_read_and_that_is_said(tmp_path):
    pictures = [Image.fromarray(field(seed=seed)) for seed in range(2)]
    for name in ("a.gif", "a.png", "a.webp"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
        assert read_image(tmp_path / name)[1] == ["The file is an animation: only its first picture is read."]


@pytest.mark.parametrize("seed", range(4))
def test_floats_a_little_outside_their_range(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pixels = field((320, 240), seed)
    for top in (1.0, 255.0):
        floats = (pixels / 255 * top).astype(np.float32)
        outside = rng.random(pixels.shape) < 0.0003
        floats[outside] = top * rng.choice([1.02, 1.2, -0.0001, -0.05, 5.0], outside.sum())
        for dtype in (np.float32, np.float64, np.float16):
            assert (np.abs(np.asarray(read_image(floats.astype(dtype))[0]).astype(int) - pixels)[~outside] <= 1).all()
        image, _ = read_image(write_tiff(tmp_path / "a.tif", [floats[..., 1]], photometric=1))
        assert (np.abs(np.asarray(image)[..., 1].astype(int) - pixels[..., 1])[~outside[..., 1]] <= 1).all()
    # As a cubic filter leaves it: overshoot at many pixels.
    enlarged = np.dstack(
        [
            np.asarray(Image.fromarray((pixels[..., band] / 255).astype(np.float32)).resize((500, 400), 3))
            for band in range(3)
        ]
    )
    assert enlarged.max() > 1.01
    assert difference(read_image(enlarged)[0], (enlarged * 255).clip(0, 255).round()) <= 1


def test_floats_that_are_no_numbers_or_of_no_usual_range_are_told():
    floats = np.full((20, 20), 0.5)
    floats[0, :3] = (np.nan, np.inf, -np.inf)
    image, notes = read_image(floats)
    assert np.asarray(image)[0, :4, 0].tolist() == [0, 255, 0, 128] and "no numbers" in notes[0]
    assert "neither 0..1 nor bright in 0..255" in read_image(np.full((20, 20), 7.5))[1][0]
    assert "whole numbers of 12 bits" in read_image(np.full((20, 20), 4000.0))[1][0]
    with pytest.raises(InputError, match="Many pixels are negative"):
        read_image(np.linspace(-2, 2.5, 400).reshape(20, 20))
    with pytest.raises(InputError, match="Many pixels are negative"):
        read_image(np.full((20, 20), -5000, np.int32))
    assert "Negative pixels" in read_image(np.linspace(-0.1, 1, 400).reshape(20, 20))[1][0]


# 8 x 8 pixels of 16 bits; the second ones use twelve of them.
JPEG_2000 = {
    (
        60000,
        30000,
        10000,
    ): "/0//UQAvAAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEBAAQEAAH/XAAEQID/ZAAlAAFD"
    "cmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAB9AAH/k8A/MVARUFSjbR9IAAAAMJCXdesADCQl/3/P/DB8EVBUo2VdsAADCQl9fMwAAMJC"
    "X18zAAAwkI1QoYSEv8/8MLwUAFyvgj1IAAGEhGqFDCQkIDQDCQj3DBhISEBoBhIS8I3AAAwkJeALQAAYSEv/f//Z",
    (
        4000,
        2000,
        600,
    ): "/0//UQAvAAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEBAAQEAAH/XAAEQID/ZAAlAAFDcmVh"
    "dGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAB6AAH/k8/8MLwRUFSvgj1IAAGEhGqFDCQl+62wAAAYSEu9hgAGEhLwSbAADCQjVChhISEBoBhI"
    "R8D+RgARUFSifbaQAAMJCNUKGEhL91tgAAAwkJfA/kZAFABcr4YeFAAAABhIRZhAwkJCA0AwkJf/f//Z",
}


def test_of_a_deep_jpeg_2000_the_upper_bits_are_read_or_it_is_refused():
    bright, dim = (base64.b64decode(text) for text in JPEG_2000.values())
    assert difference(load_image(bright), np.full((8, 8, 3), (233, 117, 39))) <= 1
    with pytest.raises(UnreadableImageError, match="pixels use the lower of 16 bits"):
        load_image(dim)


def test_a_tiff_that_cannot_be_read_says_what_it_is(tmp_path):
    colour = (field() / 255).astype(np.float32)
    for path, kind in (
        (write_tiff(tmp_path / "float.tif", [colour]), r"3 x 32 bits float \(RGB, compression raw\)"),
        (write_tiff(tmp_path / "five.tif", [np.dstack([field(), field()])[..., :5]], 1), r"5 x 8 bits \(gray"),
        (write_tiff(tmp_path / "deep.tif", [field().astype(np.uint32)], order=">"), r"3 x 32 bits \(RGB"),
    ):
        with pytest.raises(UnreadableImageError, match=rf"{path.name}: a TIFF of {kind}.* Export it as RGB"):
            load_image(path)
    for path in (
        write_tiff(tmp_path / "cmyk.tif", [deep(np.dstack([field(), field()])[..., :4], 16)], 5, planar=True),
        write_tiff(tmp_path / "planes.tif", [deep(field(), 12)], planar=True, packed=True),
    ):
        with pytest.raises(UnreadableImageError, match=rf"{path.name}: .* Export it"):
            load_image(path)


def test_colours_in_lab(tmp_path):
    lab = np.zeros((8, 8, 3), np.uint8)
    lab[..., 0] = 255
    assert difference(load_image(write_tiff(tmp_path / "lab.tif", [lab], photometric=8)), np.full((8, 8, 3), 255)) <= 3


def test_a_large_deep_image_is_reduced(tmp_path):
    pixels = field((300, 200))
    for path in (write_png(tmp_path / "a.png", deep(pixels, 12)), write_tiff(tmp_path / "a.tif", [deep(pixels, 12)])):
        image, _ = read_image(path, max_pixels=10_000)
        assert difference(image, np.asarray(Image.fromarray(pixels).reduce(3))) <= 1


def test_a_header_that_promises_more_than_its_file_holds_is_refused_before_memory_is_taken(tmp_path):
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ):
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    tiff = write_tiff(tmp_path / "a.tif", [field()], tags={256: [60000], 257: [60000]}).read_bytes()
    for content in (png, tiff):
        with pytest.raises(UnreadableImageError, match="far too small for the .* pixels it names"):
            load_image(content)


def test_planes_of_sixteen_bits_take_as_much_memory_as_pixels_of_them(tmp_path):
    """Planes of 40 x 3 089 092 pixels need more on their way to RGB than the bytes of an RGB image."""
    path = write_tiff(tmp_path / "planar.tif", [np.zeros((32, 40, 3), dtype=np.uint16)], planar=True, order=">")
    content = path.read_bytes()
    entry = struct.pack(">HHII", 257, 4, 1, 32)
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack(">HHII", 257, 4, 1, 3_089_092)))
    with pytest.raises(UnreadableImageError, match="far too small for the 40 x 3089092 pixels"):
        load_image(path)


@pytest.mark.parametrize("seed", range(150))
def test_damaged_files_are_named_whatever_is_wrong(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pixels = field()
    whole = [
        write_tiff(tmp_path / "a.tif", [deep(pixels, 12)], planar=bool(seed % 2), description=ome(c=3)),
        write_tiff(tmp_path / "b.tif", planes(pixels), 1, packed=True, order=">"),
        write_png(tmp_path / "c.png", deep(pixels, 12), significant=12),
    ][seed % 3].read_bytes()
    content = bytearray(whole)
    for _ in range(rng.integers(1, 8)):
        # Headers and directories are where it hurts.
        place = rng.integers(64) if rng.random() < 0.3 else len(content) - 1 - rng.integers(min(400, len(content)))
        content[place] = rng.integers(256)
    if rng.random() < 0.3:
        del content[rng.integers(len(content)) :]
    try:
        assert read_image(bytes(content))[0].mode == "RGB"
    except UnreadableImageError as error:
        assert str(error).startswith("image: ")


def test_a_processor_sees_what_an_analysis_sees(tmp_path):
    path = write_tiff(tmp_path / "a.tif", planes(deep(field(), 12)), 1)
    processor = UniHemaImageProcessor()
    truth = processor(open_image(path).pixels)["pixel_values"]
    for image in (str(path), path, Image.open(path)):
        assert (processor(image)["pixel_values"] == truth).all()
    floats = (field() / 255).astype(np.float32)
    floats[20, 10] = 1.02
    assert (processor(floats)["pixel_values"] - processor(field())["pixel_values"]).abs().mean() < 0.01


def test_what_is_guessed_is_warned_of_once_and_stands_in_the_opened_image(tmp_path):
    path = write_tiff(tmp_path / "a.tif", planes(deep(field(), 12)), 1)
    with pytest.warns(ImageReadWarning) as warned:
        load_image(path)
    assert [str(warning.message) for warning in warned] == list(open_image(path).notes)
    assert len(open_image(path).notes) == 2 and open_image(path).name == str(path)
