"""White cells looked for at low power, and a differential of a slide that stops at so many of them."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from unihema import Analyzer, RequestError, SmearResult
from unihema.files import open_image
from unihema.processing_unihema.class_names import is_white_cell
from unihema.results.cell_size import KnownSize
from unihema.results.nuclei import find_nuclei
from unihema.results.tiles import TileDetector, see_in_tiles
from unihema.shipped import copy_examples, lay_down_checkpoint
from unihema.slides import ImageRegions


def painted(width, height, white, red, um_per_pixel, seed=0):
    """A smear: red cells, and nuclei of 8 micrometres at (x, y) in micrometres."""
    random = np.random.default_rng(seed)
    noise = random.integers(225, 236, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    draw = ImageDraw.Draw(picture)
    for centres, size, colour in ((red, 7.2, (222, 170, 160)), (white, 8.0, (110, 70, 150))):
        for x, y in np.asarray(centres) / um_per_pixel:
            r = size / um_per_pixel / 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return picture


def regions(picture):
    return ImageRegions(open_image(picture))


@pytest.mark.parametrize("um_per_pixel", [0.25, 0.5, 1.6])
def test_nuclei_are_found_once_wherever_parts_of_the_image_meet(um_per_pixel, monkeypatch):
    monkeypatch.setattr("unihema.results.nuclei.BLOCK", 100)
    random = np.random.default_rng(1)
    places = [(x, y) for x in range(15, 400, 50) for y in range(15, 290, 50)]
    white = [(x + random.uniform(-4, 4), y + random.uniform(-4, 4)) for x, y in places]
    red = [(x, y) for x in range(8, 400, 12) for y in range(8, 290, 12)]
    red = [cell for cell in red if min(np.hypot(cell[0] - x, cell[1] - y) for x, y in white) > 9]
    picture = painted(round(400 / um_per_pixel), round(300 / um_per_pixel), white, red, um_per_pixel)
    found = find_nuclei(regions(picture), um_per_pixel) * um_per_pixel
    assert len(found) == len(white)
    distances = np.linalg.norm(found[:, None] - np.asarray(white)[None], axis=-1)
    assert distances.min(0).max() < max(1.0, um_per_pixel)


def test_without_nuclei_none_are_found():
    red = [(x, y) for x in range(30, 400, 12) for y in range(30, 290, 12)]
    assert find_nuclei(regions(painted(1600, 1200, [], red, 0.25)), 0.25).shape == (0, 2)
    assert find_nuclei(regions(Image.new("RGB", (500, 400), (230, 230, 230))), 0.25).shape == (0, 2)


def mixture(red_cells, white_cells, nucleus=(105, 60, 150), red_cell=(222, 165, 165), um_per_pixel=0.4, seed=1):
    """A grid of cells in an order of chance, so many red ones for so many white ones, and the centres of the nuclei."""
    random = np.random.default_rng(seed)
    places = random.permutation([(x, y) for x in range(14, 500, 13) for y in range(14, 390, 13)])
    is_white = np.arange(len(places)) % (red_cells + white_cells) < white_cells
    picture = Image.new("RGB", (round(510 / um_per_pixel), round(400 / um_per_pixel)), (235, 228, 230))
    draw = ImageDraw.Draw(picture)

    def disc(centre, size, colour):
        (x, y), r = centre / um_per_pixel, size / um_per_pixel / 2
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    for place, white in zip(places, is_white, strict=True):
        if white:
            disc(place, 11.5, (215, 205, 222))
            disc(place, 8.3, nucleus)
        else:
            disc(place, 7.2, tuple(int(level + random.normal(0, 3)) for level in red_cell))
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6))) + random.normal(0, 4, (*picture.size[::-1], 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)), places[is_white]


@pytest.mark.parametrize("nucleus", [(105, 60, 150), (160, 115, 185)], ids=["dark", "pale"])
@pytest.mark.parametrize("red_cells", [16, 8, 4, 3, 2, 1, 0])
def test_nuclei_are_found_however_few_red_cells_lie_beside_them(red_cells, nucleus):
    picture, white = mixture(red_cells, 1, nucleus)
    found = find_nuclei(regions(picture), 0.4) * 0.4
    assert len(found) == len(white)
    assert np.linalg.norm(found[:, None] - white[None], axis=-1).min(0).max() < 1


@pytest.mark.parametrize(
    "red_cell", [(222, 165, 165), (200, 150, 175), (190, 180, 200)], ids=["red", "violet", "bluish"]
)
def test_red_cells_alone_are_no_nuclei_whatever_their_tint(red_cell):
    picture, _ = mixture(1, 0, red_cell=red_cell)
    assert len(find_nuclei(regions(picture), 0.4)) == 0


# Nuclei in pixels of the photographs, and the size of their pixels in micrometres.
PHOTOGRAPHED = {
    "field_1.jpg": (0.1, [(231.9, 137.0)]),
    "field_2.jpg": (0.1, [(228.0, 212.2)]),
    "field_3.jpg": (0.1, [(585.5, 277.1)]),
    "red_cell_1.jpg": (0.1, []),
    "white_cell_1.jpg": (0.1, [(121.7, 115.4)]),
    "white_cell_2.jpg": (0.1, [(123.6, 120.3)]),
}


def test_nuclei_of_photographs_are_where_they_are(tmp_path):
    for path in copy_examples(tmp_path):
        um_per_pixel, there = PHOTOGRAPHED[path.name]
        found = find_nuclei(regions(Image.open(path).convert("RGB")), um_per_pixel)
        assert found == pytest.approx(np.reshape(there, (-1, 2)), abs=2), path.name


def test_where_no_nucleus_is_found_it_is_said_what_to_do():
    result = SmearResult(1600, 1200, [], ["RBC", "neutrophil"], {"neutrophil": "WBC"})
    red = [(x, y) for x in range(30, 400, 12) for y in range(30, 290, 12)]
    detector = TileDetector(lambda parts: pytest.fail("a tile was seen"), 320, KnownSize(21.0, 28.8, 73.0))
    see_in_tiles(painted(1600, 1200, [], red, 0.25), result, detector, "auto", 0.25, white_cells=100)
    assert result.cells == [] and result.tiling["with_nuclei"] == 0
    assert any(
        "No nucleus was found by its colour" in text and "without white_cells" in text for text in result.warnings
    )


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    return Analyzer.from_pretrained(
        lay_down_checkpoint(tmp_path_factory.mktemp("unihema") / "checkpoint", weights="open"), device="cpu"
    )


@pytest.fixture(scope="module")
def smear(tmp_path_factory):
    """Two photographs of one stain, each six times."""
    fields = [Image.open(path).convert("RGB") for path in copy_examples(tmp_path_factory.mktemp("examples"))[:2]]
    width, height = fields[0].size
    picture = Image.new("RGB", (4 * width, 3 * height))
    for number in range(12):
        picture.paste(fields[number % 2], (number % 4 * width, number // 4 * height))
    return picture


def test_a_differential_stops_at_so_many_white_cells(analyzer, smear, tmp_path):
    everything = analyzer(smear, "detection")
    few = analyzer(smear, "detection", white_cells=4)
    many = analyzer(smear, "detection", white_cells=1000)

    def white(result):
        return [cell for cell in result.cells if is_white_cell(cell.label, result.class_parents)]

    assert len(white(few)) >= 4 and few.tiling["seen"] < few.tiling["with_nuclei"] <= few.tiling["tiles"]
    # All there are, though red cells are left out.
    assert len(white(many)) >= 0.9 * len(white(everything)) > 8 and many.tiling["seen"] == many.tiling["with_nuclei"]
    assert not any("red" in label.lower() or label == "RBC" for label in many.counts)
    assert many.differential.keys() == everything.differential.keys()
    assert [cell.id for cell in few.cells] == list(range(1, len(few.cells) + 1))
    assert any("less than the 1000 that were asked for" in text for text in many.warnings)
    assert any("White cells alone: " in text for text in few.warnings)
    assert analyzer(smear, "detection", white_cells=4).cells == few.cells
    assert SmearResult.from_dict(few.to_dict()).to_dict() == few.to_dict()


def test_a_field_that_is_seen_whole_says_so(analyzer, tmp_path):
    (field, *_) = copy_examples(tmp_path)
    result = analyzer(field, "detection", white_cells=10)
    assert any("not white cells alone" in text for text in result.warnings)
    assert result.cells == analyzer(field, "detection").cells


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"white_cells": 0}, "a number of cells from 1, got 0"),
        ({"white_cells": 1.5}, "a number of cells from 1, got 1.5"),
        ({"white_cells": 5, "tiles": "off"}, "not with tiles=off"),
        ({"white_cells": 5, "tasks": ["segmentation"]}, "found by the task detection"),
    ],
)
def test_what_cannot_be_is_refused(analyzer, smear, asked, said):
    with pytest.raises(RequestError, match=said):
        analyzer(smear, **asked)
