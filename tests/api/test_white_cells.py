"""White cells looked for at low power, and a differential of a slide that stops at so many of them."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unihema import Analyzer, RequestError, SmearResult
from unihema.files import open_image
from unihema.processing_unihema.class_names import is_white_cell
from unihema.results.nuclei import find_nuclei
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
