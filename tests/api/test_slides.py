"""Images of any size, read in parts: files of every kind that a slide scanner or a microscope writes, made here."""

import math
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from scipy.spatial import cKDTree

from unihema import slides
from unihema.errors import InputError, UnreadableImageError
from unihema.processing_unihema.image_io import RefusedImageError, pixel_size
from unihema.results.cell_size import KnownSize
from unihema.results.smear_result import Cell, SmearResult
from unihema.results.tiles import TileDetector, see_in_tiles
from unihema.slides import OpenSlideRegions, TiffRegions, TooLargeError, UnreadableRegionError, open_regions


tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

EDGE, KNOWN = 320, KnownSize(47.0, 62.0, 77.0)
WIDTH, HEIGHT, DIAMETER = 1600, 1200, 72
GLASS = (238, 236, 240)
APERIO = "Aperio Image Library v10.0.51\r\n1600x1200 [0,0 1600x1200] (240x240) JPEG/RGB Q=90|AppMag = 40|MPP = 0.1001"


def smear(width: int = WIDTH, height: int = HEIGHT, diameter: int = DIAMETER) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of discs that do not touch, with empty glass in the right part, and their centres."""
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (width, height), GLASS)
    draw = ImageDraw.Draw(image)
    centres = []
    step = diameter * 1.35
    for y in np.arange(step / 2, height - diameter / 2, step):
        for x in np.arange(step / 2, 0.6 * width, step):
            x_there, y_there = (float(round(v + rng.uniform(-1, 1) * diameter / 8)) for v in (x, y))
            centres.append((x_there, y_there))
            r = diameter / 2
            draw.ellipse([x_there - r, y_there - r, x_there + r, y_there + r], (150, 70, 90))
    return np.asarray(image), np.array(centres)


PIXELS, CENTRES = smear()


def halved(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).reduce(2))


def ome(path: Path, **options) -> Path:
    """A pyramid as Bio-Formats writes it: the levels are sub-files of the first page."""
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False), ome=True) as file:
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.1, "PhysicalSizeXUnit": "µm"}
        metadata |= {"PhysicalSizeY": 0.1, "PhysicalSizeYUnit": "µm"}
        file.write(PIXELS, subifds=2, tile=(240, 240), photometric="rgb", metadata=metadata, **options)
        for level in (halved(PIXELS), halved(halved(PIXELS))):
            file.write(level, subfiletype=1, tile=(240, 240), photometric="rgb", **options)
    return path


def svs(path: Path) -> Path:
    """Pages one after another, with a label and a macro at the end."""
    options = {"photometric": "rgb", "metadata": None, "compression": "jpeg", "compressionargs": {"level": 95}}
    with tifffile.TiffWriter(path) as file:
        file.write(PIXELS, tile=(240, 240), description=APERIO, **options)
        file.write(halved(halved(PIXELS)), rowsperstrip=16, description=APERIO, **options)
        file.write(halved(PIXELS), tile=(240, 240), description=APERIO, **options)
        file.write(np.zeros((300, 300, 3), np.uint8), subfiletype=1, description="Aperio\r\nlabel", **options)
        file.write(np.zeros((200, 600, 3), np.uint8), subfiletype=9, description="Aperio\r\nmacro", **options)
    return path


def big(path: Path) -> Path:
    tifffile.imwrite(path, PIXELS, bigtiff=True, photometric="rgb", compression="lzw", rowsperstrip=64)
    return path


def plain_rows(path: Path) -> Path:
    tifffile.imwrite(path, PIXELS, photometric="rgb", rowsperstrip=HEIGHT)
    return path


def gray(path: Path) -> Path:
    tifffile.imwrite(path, 255 - PIXELS[..., 0], photometric="miniswhite", tile=(256, 256), compression="deflate")
    return path


def png(path: Path) -> Path:
    Image.fromarray(PIXELS).save(path)
    return path


def jpeg(path: Path) -> Path:
    Image.fromarray(PIXELS).save(path, quality=95, subsampling=0)
    return path


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(PIXELS)).save(path, quality=95, subsampling=0, exif=exif)
    return path


def transparent(path: Path) -> Path:
    alpha = np.where((PIXELS == GLASS).all(-1), 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([PIXELS, alpha])).save(path)
    return path


# Writer, name, and by how much its pixels may differ.
FILES = {
    "ome": (ome, "a.ome.tif", 0),
    "svs": (svs, "a.svs", 48),
    "big": (big, "a.btf.tif", 0),
    "rows": (plain_rows, "a.tif", 0),
    "gray": (gray, "a.tiff", None),
    "png": (png, "a.png", 0),
    "jpeg": (jpeg, "a.jpg", 24),
    "turned": (turned, "b.jpg", 24),
    "transparent": (transparent, "b.png", None),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")

    def write(kind: str) -> Path:
        writer, name, _ = FILES[kind]
        path = folder / name
        if not path.exists():
            if kind in ("png", "jpeg", "turned", "transparent"):
                pytest.importorskip("pyvips")
            writer(path)
        return path

    return write


class Detector:
    """Finds discs of about the size that it knows in its input."""

    def __init__(self, fails_at: int | None = None):
        self.looks, self.fails_at = 0, fails_at

    def __call__(self, images: list[Image.Image]) -> list[SmearResult]:
        results = []
        for image in images:
            self.looks += 1
            if self.looks == self.fails_at:
                raise KeyboardInterrupt
            result = SmearResult(*image.size, classes=["RBC"])
            labels, _ = ndimage.label(np.asarray(image.convert("L")) < 170)
            for rows, columns in ndimage.find_objects(labels):
                box = (columns.start, rows.start, columns.stop, rows.stop)
                longer = max(box[2] - box[0], box[3] - box[1]) * EDGE / max(image.size)
                if 0.75 * KNOWN.low <= longer <= 1.3 * KNOWN.high:
                    result.cells.append(Cell(len(result.cells) + 1, box, "RBC", 0.9))
            result.mask = (labels > 0).astype(np.uint8)
            results.append(result)
        return results


def seen(source: slides.RegionSource, detector: Detector | None = None, **options) -> SmearResult:
    detector = detector or Detector()
    result = SmearResult(source.width, source.height, classes=["RBC"], image=source.name, warnings=list(source.notes))
    result.cells = detector([source.pixels])[0].cells if max(source.size) == max(source.pixels.size) else []
    result.mask = np.zeros((1, 1), np.uint8)
    see_in_tiles(source, result, TileDetector(detector, EDGE, KNOWN), **options)
    return result


def matched(result: SmearResult, centres: np.ndarray = CENTRES) -> int:
    """How many true centres have exactly one found cell near them."""
    found = np.array([cell.center for cell in result.cells]).reshape(-1, 2)
    near = np.hypot(*(found[None] - centres[:, None]).transpose(2, 0, 1)) < DIAMETER / 6
    return int((near.sum(1) == 1).sum())


@pytest.mark.parametrize("kind", FILES)
def test_regions_are_those_of_the_image(written, kind):
    with open_regions(written(kind), max_pixels=1000) as source:
        assert source.streams and source.size == (WIDTH, HEIGHT)
        expected = PIXELS
        if kind == "gray":
            expected = np.repeat(PIXELS[..., :1], 3, -1)
        if kind == "transparent":
            expected = np.where((PIXELS == GLASS).all(-1, keepdims=True), 255, PIXELS)
        most = FILES[kind][2] or 0
        for box in [(0, 0, 300, 200), (231, 473, 610, 891), (1500, 1100, WIDTH, HEIGHT), (239, 239, 241, 241)]:
            part = np.asarray(source.read_region(box)).astype(int)
            assert part.shape == (box[3] - box[1], box[2] - box[0], 3)
            assert np.abs(part - expected[box[1] : box[3], box[0] : box[2]]).max() <= most
        whole = np.asarray(source.read_region((0, 0, WIDTH, HEIGHT), (400, 300))).astype(int)
        reduced = np.asarray(Image.fromarray(expected).resize((400, 300), Image.Resampling.BOX)).astype(int)
        assert np.abs(whole - reduced).mean() < 2
        for box in [(0, 0, WIDTH + 1, 10), (-1, 0, 10, 10), (10, 10, 10, 20)]:
            with pytest.raises(InputError, match="is no part of 1600 x 1200 pixels"):
                source.read_region(box)


def test_the_smallest_level_that_is_fine_enough_is_read(written, monkeypatch):
    with open_regions(written("ome"), max_pixels=1000) as source:
        assert source.levels == [(1600, 1200), (800, 600), (400, 300)]
        read = []
        real = source._read
        monkeypatch.setattr(source, "_read", lambda level, box, strict: read.append(level) or real(level, box, strict))
        for size in [(1600, 1200), (1599, 1199), (800, 600), (799, 599), (420, 315), (400, 300), (100, 75)]:
            source.read_region((0, 0, WIDTH, HEIGHT), size)
        assert read == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ["ome", "svs", "big", "png", "jpeg"])
def test_cells_of_a_slide_are_counted_once_where_they_are(written, kind, monkeypatch):
    monkeypatch.setattr(slides, "OVERVIEW_PIXELS", 200_000)
    with open_regions(written(kind), max_pixels=1000) as source:
        assert max(source.pixels.size) < WIDTH / 2
        result = seen(source)
    assert matched(result) == len(CENTRES) == len(result.cells)
    assert 0 < result.tiling["empty"] < result.tiling["tiles"] / 2
    assert f"{result.tiling['empty']} of {result.tiling['tiles']} tiles are empty glass." in result.warnings
    assert result.mask.shape == (HEIGHT, WIDTH)
    truth = np.asarray(Image.fromarray(PIXELS).convert("L")) < 170
    assert (result.mask.astype(bool) != truth).mean() < 0.002
    again = SmearResult.from_dict(result.to_dict())
    assert (again.um_per_pixel, again.um_source, again.tiling) == (
        result.um_per_pixel, result.um_source, result.tiling
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain.png", "plain.jpg"])
def test_cells_of_a_plain_file_of_400_million_pixels(tmp_path, name):
    pyvips = pytest.importorskip("pyvips")
    step = 2000
    block = np.full((step, step, 3), GLASS, np.uint8)
    block[:HEIGHT, :WIDTH] = PIXELS
    image = pyvips.Image.new_from_array(block).replicate(10, 10).cast("uchar").copy(interpretation="srgb")
    image.write_to_file(str(tmp_path / name), **({"Q": 95} if name.endswith("jpg") else {"compression": 1}))
    with open_regions(tmp_path / name) as source:
        assert source.streams and source.size == (20_000, 20_000)
        result = seen(source)
    offsets = np.array([(step * x, step * y) for y in range(10) for x in range(10)])
    centres = (CENTRES[None] + offsets[:, None]).reshape(-1, 2)
    found = np.array([cell.center for cell in result.cells])
    assert len(found) == len(centres)
    distances, nearest = cKDTree(found).query(centres)
    assert distances.max() < DIAMETER / 6 and len(set(nearest.tolist())) == len(centres)


def test_openslide_reads_what_it_knows(written):
    pytest.importorskip("openslide")
    with OpenSlideRegions(written("svs")) as source:
        assert source.levels[0] == (WIDTH, HEIGHT) and source.um_per_pixel == pytest.approx(0.1001)
        part = np.asarray(source.read_region((231, 473, 610, 891))).astype(int)
        assert np.abs(part - PIXELS[473:891, 231:610]).max() <= 48
        assert source.pixels.size == (WIDTH, HEIGHT)


# Where the size of a pixel stands


def resolution(path: Path, **options) -> Path:
    tifffile.imwrite(path, PIXELS[:60, :80], photometric="rgb", **options)
    return path


def imagej(path: Path, **options) -> Path:
    tifffile.imwrite(path, PIXELS[:60, :80], imagej=True, photometric="rgb", **options)
    return path


def named(path: Path, **sizes) -> Path:
    tifffile.imwrite(path, PIXELS[:60, :80], ome=True, photometric="rgb", metadata={"axes": "YXS", **sizes})
    return path


BY_TAGS = "the resolution of the TIFF"
SIZES = {
    "of an inch": (lambda path: resolution(path, resolution=(254000, 254000), resolutionunit=2), 0.1, BY_TAGS),
    "of a centimetre": (lambda path: resolution(path, resolution=(40000, 40000), resolutionunit=3), 0.25, BY_TAGS),
    "of a printer": (lambda path: resolution(path, resolution=(300, 300), resolutionunit=2), None, None),
    "of a screen": (lambda path: resolution(path, resolution=(72, 72), resolutionunit=2), None, None),
    "none": (lambda path: resolution(path), None, None),
    "not square": (lambda path: resolution(path, resolution=(100000, 50000), resolutionunit=3), None, None),
    "imagej": (lambda path: imagej(path, resolution=(10, 10), metadata={"unit": "um"}), 0.1, "ImageJ metadata"),
    "imagej micron": (lambda path: imagej(path, resolution=(4, 4), metadata={"unit": "micron"}), 0.25, "ImageJ metadata"),
    "imagej escaped": (lambda path: imagej(path, resolution=(4, 4), metadata={"unit": "\\u00B5m"}), 0.25, "ImageJ metadata"),
    "imagej pixels": (lambda path: imagej(path, resolution=(1, 1), metadata={"unit": "pixel"}), None, None),
    "ome": (lambda path: named(path, PhysicalSizeX=0.2, PhysicalSizeY=0.2), 0.2, "OME metadata"),
    "ome micro": (
        lambda path: named(path, PhysicalSizeX=0.2, PhysicalSizeXUnit="µm", PhysicalSizeY=0.2, PhysicalSizeYUnit="µm"),
        0.2, "OME metadata",
    ),
    "ome nano": (
        lambda path: named(path, PhysicalSizeX=65, PhysicalSizeXUnit="nm", PhysicalSizeY=65, PhysicalSizeYUnit="nm"),
        0.065, "OME metadata",
    ),
    "ome pixels": (
        lambda path: named(path, PhysicalSizeX=1, PhysicalSizeXUnit="pixel", PhysicalSizeY=1, PhysicalSizeYUnit="pixel"),
        None, None,
    ),
    "aperio": (lambda path: resolution(path, description=APERIO, metadata=None), 0.1001, "Aperio metadata"),
    "aperio nonsense": (
        lambda path: resolution(path, description="Aperio|MPP = 1e999", metadata=None), None, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES)
def test_the_size_of_a_pixel_stands_in_the_file(tmp_path, case):
    write, expected, source = SIZES[case]
    path = write(tmp_path / "a.tif")
    # By PIL, and by tifffile.
    with open_regions(path) as whole, TiffRegions(path) as parts:
        for found in (whole, parts):
            assert found.um_per_pixel == (None if expected is None else pytest.approx(expected, rel=1e-3))
            assert found.um_source == source


def test_the_resolution_of_a_png_counts_as_well(tmp_path):
    Image.fromarray(PIXELS[:60, :80]).save(tmp_path / "a.png", dpi=(254000, 254000))
    assert pixel_size(tmp_path / "a.png") == (pytest.approx(0.1, rel=1e-3), "the resolution of the PNG")
    Image.fromarray(PIXELS[:60, :80]).save(tmp_path / "b.png", dpi=(96, 96))
    assert pixel_size(tmp_path / "b.png") is None


def test_micrometres_of_the_file_set_the_scale(written):
    with open_regions(written("ome"), max_pixels=1000) as source:
        result = seen(source)
    assert (result.um_per_pixel, result.um_source) == (pytest.approx(0.1), "OME metadata")
    assert result.tiling["scale"] == pytest.approx(7.2 / KNOWN.usual / 0.1)
    assert result.tiling["scale_source"] == "that of the training at the micrometres of OME metadata"
    assert matched(result) == len(CENTRES) == len(result.cells)
    row = result.to_dataframe().iloc[0]
    assert row.width_um == pytest.approx(0.1 * row.width, abs=0.01)
    assert row.height_um == pytest.approx(0.1 * row.height, abs=0.01)


def test_micrometres_that_the_red_cells_contradict_are_said_and_not_believed(written):
    with open_regions(written("ome"), max_pixels=1000) as source:
        source.um_per_pixel = 0.25
        result = seen(source)
    assert result.um_source == "estimated from the red cells" and result.um_per_pixel == pytest.approx(0.1, rel=0.25)
    said = r"A pixel would be of 0\.25 micrometres by OME metadata, and of 0\.\d+ by its red cells, which decide"
    assert any(re.search(said, text) for text in result.warnings)
    assert matched(result) == len(CENTRES) == len(result.cells)


def test_given_micrometres_come_before_those_of_the_file(written):
    with open_regions(written("ome"), max_pixels=1000) as source:
        result = seen(source, um_per_pixel=0.11)
    assert (result.um_per_pixel, result.um_source) == (0.11, "given")
    assert result.tiling["scale"] == pytest.approx(7.2 / KNOWN.usual / 0.11)


def test_sizes_in_micrometres_are_empty_where_nothing_tells_them():
    result = SmearResult(100, 100, [Cell(1, (0, 0, 10, 10), "RBC", 0.9)], ["RBC"])
    assert math.isnan(result.to_dataframe().iloc[0].width_um or math.nan)


# Files that are not whole, and files that lie


def test_of_a_truncated_slide_the_tiles_that_are_there_are_seen(written, tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "OVERVIEW_PIXELS", 200_000)
    whole = written("svs").read_bytes()
    with tifffile.TiffFile(written("svs")) as file:
        offsets = file.pages[0].dataoffsets
        # Into the fourth of five rows of tiles; the pages that follow the first are lost.
        end = offsets[22] + 10
    path = tmp_path / "cut.svs"
    path.write_bytes(whole[:end])
    with open_regions(path, max_pixels=1000) as source:
        assert source.levels == [(WIDTH, HEIGHT)]
        with pytest.raises(UnreadableRegionError, match=re.escape(str(path))):
            source.read_region((0, 1000, 200, 1200))
        result = seen(source)
    there = CENTRES[CENTRES[:, 1] < 3 * 240 - 2 * DIAMETER]
    assert len(there) > 20 and matched(result, there) == len(there)
    lost = CENTRES[CENTRES[:, 1] > 4 * 240]
    assert matched(result, lost) == 0
    (said,) = (text for text in result.warnings if "cannot be read" in text)
    assert said.startswith(f"{result.tiling['unreadable']} of {result.tiling['tiles']} tiles cannot be read")
    assert re.search(r"nothing is counted at x \d+ to \d+, y \d+ to \d+", said)
    assert SmearResult.from_dict(result.to_dict()).tiling == result.tiling


def test_a_slide_of_which_nothing_can_be_read_is_named(written, tmp_path):
    whole = written("ome").read_bytes()
    with tifffile.TiffFile(written("ome")) as file:
        end = file.pages[0].dataoffsets[0]
    path = tmp_path / "cut.tif"
    path.write_bytes(whole[:end])
    with (
        open_regions(path, max_pixels=1000) as source,
        pytest.raises(UnreadableImageError, match="none of its .* tiles"),
    ):
        seen(source, um_per_pixel=0.1)


@pytest.mark.parametrize("end", [4, 8, 200])
def test_a_slide_without_its_header_is_named(written, tmp_path, end):
    path = tmp_path / "cut.svs"
    path.write_bytes(written("svs").read_bytes()[:end])
    with pytest.raises(UnreadableImageError, match=re.escape(str(path))):
        open_regions(path, max_pixels=1000)


def test_a_header_far_too_large_for_its_file_is_an_error(tmp_path):
    path = tmp_path / "liar.tif"
    tifffile.imwrite(path, PIXELS[:64, :64], photometric="rgb", tile=(64, 64), compression="deflate")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for code in (256, 257):
            tag = file.pages[0].tags[code]
            content[tag.valueoffset : tag.valueoffset + 2] = (60000).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=re.escape(str(path))):
        open_regions(path)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "pages.tif"])
def test_an_image_of_more_pixels_than_are_taken_is_refused_before_it_is_decoded(tmp_path, name, monkeypatch):
    path, small = tmp_path / name, PIXELS[:64, :64]
    if name == "pages.tif":
        # PIL looks at the first page, and the largest is read.
        with pytest.importorskip("tifffile").TiffWriter(path) as file:
            for page in (small[::2, ::2], small):
                file.write(page, photometric="rgb", tile=(64, 64), compression="deflate")
    else:
        Image.fromarray(small).save(path)
    with open_regions(path, max_pixels=1, most_pixels=64 * 64) as source:
        assert source.size == (64, 64)
    monkeypatch.setattr(slides, "open_image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(TooLargeError, match=rf"{name}: 64 x 64 pixels, and no more than 4095 are taken here"):
        open_regions(path, max_pixels=1, most_pixels=64 * 64 - 1)


def test_text_without_pixels_is_no_slide(tmp_path):
    for suffix in (".svs", ".ndpi", ".mrxs"):
        path = tmp_path / f"a{suffix}"
        path.write_text("not a slide")
        with pytest.raises(UnreadableImageError, match=re.escape(str(path))):
            open_regions(path)


def test_without_the_extra_a_large_image_is_reduced_and_that_is_said(written, monkeypatch):
    monkeypatch.setattr(slides, "find_spec", lambda name: None)
    monkeypatch.setattr("unihema.processing_unihema.image_io.read_image.__defaults__", (480_000,))
    with open_regions(written("ome"), max_pixels=480_000) as source:
        assert source.size == (WIDTH, HEIGHT) and source.pixels.size == (800, 600) and not source.streams
        (note,) = source.notes
        assert "reduced to 800 x 600" in note and "pip install 'unihema[slides]'" in note
        result = seen(source)
    assert matched(result) == len(CENTRES)


def test_a_slide_that_only_a_library_opens_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "find_spec", lambda name: None)
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"not empty")
    with pytest.raises(UnreadableImageError, match=r"pip install 'unihema\[slides\]'"):
        open_regions(path)


def test_an_image_of_more_than_8_bits_is_reduced_rather_than_guessed_at_part_by_part(tmp_path, monkeypatch):
    path = tmp_path / "deep.tif"
    tifffile.imwrite(path, PIXELS[:600, :800, 0].astype(np.uint16) << 8, photometric="minisblack")
    monkeypatch.setattr("unihema.processing_unihema.image_io.read_image.__defaults__", (120_000,))
    with open_regions(path, max_pixels=120_000) as source:
        assert not source.streams and any("pixels of 16 bits are not read in parts" in note for note in source.notes)


@pytest.mark.parametrize("sharp", [0, 1, 3])
def test_of_pages_of_one_size_the_one_in_focus_is_read_and_said(tmp_path, sharp):
    path = tmp_path / "stack.tif"
    picture = Image.fromarray(PIXELS[:480, :640])
    with tifffile.TiffWriter(path) as file:
        for plane in range(4):
            pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(2 * abs(plane - sharp))))
            file.write(pixels, photometric="rgb", tile=(240, 240), metadata=None)
    with open_regions(path, max_pixels=1000) as source:
        assert (np.asarray(source.read_region((0, 0, 640, 480))) == np.asarray(picture)).all()
        assert f"only page {sharp + 1}, the sharpest, is read" in source.notes[0]


def test_of_pages_alike_the_middle_is_read(tmp_path):
    path = tmp_path / "stack.tif"
    with tifffile.TiffWriter(path) as file:
        for level in (50, 100, 150):
            file.write(np.full((480, 640, 3), level, np.uint8), photometric="rgb", tile=(240, 240), metadata=None)
    with open_regions(path, max_pixels=1000) as source:
        assert (np.asarray(source.read_region((0, 0, 10, 10))) == 100).all()


# Files of several pages: channels, planes, times


def pages_of(kind: str, path: Path) -> Path:
    """A file whose pages its description tells apart, of 400 x 300 pixels of the smear."""
    pixels = PIXELS[:300, :400]
    gray = np.moveaxis(pixels, -1, 0)
    options: dict = {"photometric": "minisblack", "tile": (128, 128), "compression": "deflate"}
    if kind in ("in one piece", "four in one piece"):
        options = {"photometric": "minisblack", "rowsperstrip": 300, "compression": "deflate"}
    values, metadata = {
        "named": (gray[::-1], {"axes": "CYX", "Channel": {"Name": ["Blue", "Green", "Red"]}}),
        "imagej": (gray, {"axes": "CYX"}),
        "unnamed": (gray, None),
        "in one piece": (gray, {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}}),
        "four": (gray[[0, 1, 2, 0]], {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "Cy3", "Cy5"]}}),
        "four in one piece": (gray[[0, 1, 2, 0]], {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "Cy3", "Cy5"]}}),
        "two of imagej": (gray[:2], {"axes": "CYX"}),
        "times": (np.stack([np.full_like(gray[0], 128), gray[0], gray[0]]), {"axes": "TYX"}),
        "planes": (np.stack([np.full_like(gray[0], 128), gray[0], gray[0] // 2 + 60]), {"axes": "ZYX"}),
    }[kind]
    if "imagej" in kind:
        tifffile.imwrite(path, values, imagej=True, metadata=metadata, photometric="minisblack")
    else:
        tifffile.imwrite(path, values, ome=metadata is not None, metadata=metadata, **options)
    return path


def read_both_ways(path: Path, monkeypatch) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """What is read of a small file as a whole, and in parts as of a large one; and what is said of it."""
    with open_regions(path) as source:
        assert not source.streams
        whole, said = np.asarray(source.read_region((0, 0, *source.size))), source.notes
    # Packed strips of these files are too wide for reading them in parts.
    monkeypatch.setattr(slides, "KEPT_OF_STRIPS", 1000)
    with open_regions(path, max_pixels=1000) as source:
        assert source.streams
        return whole, np.asarray(source.read_region((0, 0, *source.size))), said, source.notes


@pytest.mark.parametrize("kind", ["named", "imagej", "unnamed", "in one piece"])
def test_three_gray_pages_are_one_picture_in_colour_however_it_is_read(tmp_path, kind, monkeypatch):
    if kind == "in one piece":
        pytest.importorskip("pyvips")
    whole, parts, said, said_of_parts = read_both_ways(pages_of(kind, tmp_path / "a.tif"), monkeypatch)
    assert (whole == PIXELS[:300, :400]).all() and (parts == whole).all()
    assert said_of_parts == said and len(said) == (kind in ("imagej", "unnamed"))


@pytest.mark.parametrize("kind", ["times", "planes"])
def test_the_same_page_of_a_series_or_stack_is_read_in_parts_as_in_one(tmp_path, kind, monkeypatch):
    whole, parts, said, said_of_parts = read_both_ways(pages_of(kind, tmp_path / "a.tif"), monkeypatch)
    right = np.full((300, 400), 128) if kind == "times" else PIXELS[:300, :400, 0]
    assert (whole[..., 0] == right).all() and (parts == whole).all()
    assert said_of_parts == said and len(said) == 1


@pytest.mark.parametrize("max_pixels", [1000, 1_000_000])
@pytest.mark.parametrize("kind", ["four", "four in one piece", "two of imagej"])
def test_channels_that_are_no_colours_are_refused_whatever_the_size(tmp_path, kind, max_pixels, monkeypatch):
    monkeypatch.setattr(slides, "KEPT_OF_STRIPS", 1000)
    path = pages_of(kind, tmp_path / "a.tif")
    with pytest.raises(RefusedImageError, match=r"a\.tif: it has (2|4) channels.*Merge them to one RGB image"):
        open_regions(path, max_pixels=max_pixels)


@pytest.mark.parametrize("max_pixels", [1000, 1_000_000])
@pytest.mark.parametrize("planes", ["separate", "contig"])
def test_four_gray_samples_of_a_pixel_are_refused(tmp_path, planes, max_pixels):
    path = tmp_path / "a.tif"
    four = np.dstack([PIXELS[:300, :400], PIXELS[:300, :400, :1]])
    values = np.moveaxis(four, -1, 0) if planes == "separate" else four
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig=planes, metadata=None, extrasamples=(0, 0, 0))
    with pytest.raises(RefusedImageError, match=r"a\.tif: it has 4 channels in each pixel.*Merge them"):
        open_regions(path, max_pixels=max_pixels)


@pytest.mark.parametrize("max_pixels", [1000, 1_000_000])
def test_channels_of_which_pages_are_missing_are_refused(tmp_path, max_pixels):
    path = tmp_path / "a.tif"
    description = "ImageJ=1.54f\nimages=4\nchannels=4\nmode=composite\n"
    tifffile.imwrite(path, PIXELS[:300, :400, 0], description=description, metadata=None, photometric="minisblack")
    with pytest.raises(RefusedImageError, match=r"a\.tif: it says that it has 4 channels, and its pages \(1\)"):
        open_regions(path, max_pixels=max_pixels)


@pytest.mark.parametrize("below", [True, False], ids=["sub-files", "pages"])
def test_levels_of_a_picture_whose_colours_are_pages(tmp_path, below):
    path = tmp_path / "a.ome.tif"
    options = {"tile": (128, 128), "photometric": "minisblack"}
    metadata = {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}}
    with tifffile.TiffWriter(path, ome=True) as file:
        gray, small = np.moveaxis(PIXELS, -1, 0), np.moveaxis(halved(PIXELS), -1, 0)
        file.write(gray, subifds=int(below), metadata=metadata, **options)
        if below:
            file.write(small, subfiletype=1, **options)
        else:
            file.write(small, metadata=metadata, **options)
    with open_regions(path, max_pixels=1000) as source:
        assert source.levels == [(WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2)]
        overview = source.read_region((0, 0, WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2))
        assert (np.asarray(overview) == halved(PIXELS)).all()
        assert (np.asarray(source.read_region((300, 200, 700, 500))) == PIXELS[200:500, 300:700]).all()


@pytest.mark.parametrize("name", ["a.bmp", "a.ppm", "a.jp2"])
def test_a_large_file_of_a_format_that_is_not_read_in_parts_is_not_called_damaged(tmp_path, name):
    pyvips = pytest.importorskip("pyvips")
    path = tmp_path / name
    Image.fromarray(PIXELS[:300, :400]).save(path)
    with open_regions(path, max_pixels=1000) as source:
        said = " ".join(source.notes)
    assert "damaged" not in said and "Copy it again" not in said
    # Builds of libvips differ in what they read.
    if pyvips.vips_lib.vips_foreign_find_load(bytes(path)) == pyvips.ffi.NULL:
        assert not source.streams
        assert "this format cannot be read in parts here. Convert the image to TIFF." in said


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_process_forked_after_libvips_was_used_does_not_wait_for_it(written):
    path = written("png")
    open_regions(path, max_pixels=1000).close()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        notes = pool.apply_async(_notes_of, (path,)).get(60)
    assert "libvips was in use before this process was forked" in notes[-1]


def _notes_of(path):
    with open_regions(path, max_pixels=1000) as source:
        assert source.size == (WIDTH, HEIGHT)
        return source.notes


def test_temporary_files_of_a_plain_file_are_gone_when_it_is_closed(written, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_regions(written("png"), max_pixels=1000) as source:
        assert list(tmp_path.rglob("pyramid.tif"))
        assert len(source.levels) > 1
    assert list(tmp_path.iterdir()) == []


# Where something lies on the glass


def test_the_scale_is_found_where_something_lies_on_the_glass(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "OVERVIEW_PIXELS", 200_000)
    pixels = np.full((3000, 4000, 3), GLASS, np.uint8)
    pixels[2000:, 100:800] = PIXELS[:1000, :700]
    path = tmp_path / "corner.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), compression="deflate")
    with open_regions(path, max_pixels=1000) as source:
        result = seen(source)
        assert source.um_per_pixel is None and all(x < 0.25 and y > 0.6 for x, y in source.places)
    there = CENTRES[(CENTRES < (700 - DIAMETER, 1000 - DIAMETER)).all(1)] + (100, 2000)
    assert len(there) > 20 and matched(result, there) == len(there)
    assert result.tiling["empty"] > 0.8 * result.tiling["tiles"]


def test_a_large_image_without_red_cells_says_that_it_was_seen_whole(tmp_path):
    path = tmp_path / "glass.tif"
    tifffile.imwrite(path, np.full((1500, 2000, 3), GLASS, np.uint8), photometric="rgb", tile=(256, 256))
    with open_regions(path, max_pixels=1000) as source:
        result = seen(source)
    assert result.tiling is None and "was seen whole, as no red cells" in result.warnings[-1]
