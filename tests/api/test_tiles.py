"""Tiles: each cell once, at the scale that the model knows. A detector of drawn discs tells the truth; the checkpoint that comes
with the package sees real fields."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from unihema import Analyzer
from unihema.errors import RequestError
from unihema.results.cell_size import KnownSize
from unihema.results.smear_result import CROWDED, Cell, SmearResult
from unihema.results.tile_layout import lay_tiles
from unihema.results.tiles import TileDetector, see_in_tiles
from unihema.shipped import copy_examples, lay_down_checkpoint
from unihema.training.data.rows import red_cell_diameter


EDGE, KNOWN = 320, KnownSize(47.0, 62.0, 77.0)
BACKGROUND = 240


def discs(
    width: int, height: int, diameter: float, share: float = 0.25, seed: int = 0
) -> tuple[Image.Image, np.ndarray]:
    """An image of discs that do not touch each other, and their centres."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    step = diameter * math.sqrt(math.pi / 4 / share)
    centres = []
    for y in np.arange(step / 2, height - diameter / 2, step):
        for x in np.arange(step / 2, width - diameter / 2, step):
            x_there, y_there = (float(np.round(v + rng.uniform(-1, 1) * (step - diameter) / 2.2)) for v in (x, y))
            centres.append((x_there, y_there))
            draw.ellipse(
                [x_there - diameter / 2, y_there - diameter / 2, x_there + diameter / 2, y_there + diameter / 2], 0
            )
    return image.convert("RGB"), np.array(centres)


class Detector:
    """Finds discs, but only of about the size that it knows in its input.

    Args:
        known ([`KnownSize`]): That size.
        cap (`int`): The most that it finds at once.
        deceived (`bool`): Of discs that are too small it finds every third, unsurely, and draws it as large as those it knows.
    """

    def __init__(self, known: KnownSize = KNOWN, cap: int = 200, deceived: bool = False):
        self.known, self.cap, self.deceived, self.looks = known, cap, deceived, 0

    def __call__(self, images: list[Image.Image]) -> list[SmearResult]:
        self.looks += len(images)
        return [self.look(image) for image in images]

    def look(self, image: Image.Image) -> SmearResult:
        result = SmearResult(*image.size, classes=["RBC"])
        labels, _ = ndimage.label(np.asarray(image.convert("L")) < BACKGROUND / 2)
        to_input = EDGE / max(image.size)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels)):
            box, score = (columns.start, rows.start, columns.stop, rows.stop), 0.9
            longer = max(box[2] - box[0], box[3] - box[1]) * to_input
            if self.deceived and longer < 0.75 * self.known.low and number % 3 == 0:
                more = (0.9 * self.known.low - longer) / 2 / to_input
                box, score = (box[0] - more, box[1] - more, box[2] + more, box[3] + more), 0.4
                longer = 0.9 * self.known.low
            if 0.75 * self.known.low <= longer <= 1.3 * self.known.high and len(result.cells) < self.cap:
                result.cells.append(Cell(len(result.cells) + 1, box, "RBC", score))
        result.mask = (labels > 0).astype(np.uint8)
        if len(result.cells) >= self.cap:
            result.warnings.append(f"{self.cap} of {self.cap} {CROWDED}")
        return result


def seen(image: Image.Image, detector: Detector | None = None, **options) -> tuple[SmearResult, Detector]:
    detector = detector or Detector()
    (result,) = detector([image])
    see_in_tiles(image, result, TileDetector(detector, EDGE, KNOWN), **options)
    return result, detector


def matched(result: SmearResult, centres: np.ndarray, within: float) -> int:
    """How many true centres have exactly one found cell near them."""
    found = np.array([cell.center for cell in result.cells]).reshape(-1, 2)
    near = np.hypot(*(found[None] - centres[:, None]).transpose(2, 0, 1)) < within
    return int((near.sum(1) == 1).sum())


@pytest.mark.parametrize("size", [(640, 480), (641, 480), (2000, 700), (100, 3000), (5000, 4999), (639, 100)])
@pytest.mark.parametrize("margin", [0, 60])
def test_cores_cover_the_image_once_and_tiles_reach_beyond_them(size, margin):
    width, height = size
    tiles = lay_tiles(width, height, 640, 480, margin)
    covered = np.zeros((height, width), dtype=np.uint8)
    for tile in tiles:
        left, top, right, bottom = tile.core
        covered[top:bottom, left:right] += 1
        assert (tile.box[2] - tile.box[0], tile.box[3] - tile.box[1]) == (640, 480)
        assert tile.box[0] <= left or left == 0
        for edge, core, limit in ((tile.box[0], left, 0), (tile.box[1], top, 0)):
            assert core == limit or core - edge >= margin
        for edge, core, limit in ((tile.box[2], right, width), (tile.box[3], bottom, height)):
            assert core == limit or edge - core >= margin
    assert (covered == 1).all()


# Pixels of a disc, from fields that are far too wide for one look to those of another magnification.
@pytest.mark.parametrize(
    "size,diameter", [((2560, 1920), 110), ((1280, 480), 100), ((480, 1600), 90), ((3000, 3000), 60)]
)
def test_every_cell_of_a_wide_field_is_counted_once(size, diameter):
    image, centres = discs(*size, diameter)
    result, _ = seen(image)
    assert result.tiling["scale_source"] == "estimated from the red cells that are found"
    assert matched(result, centres, diameter / 4) == len(centres) == len(result.cells)
    assert [cell.id for cell in result.cells] == list(range(1, len(centres) + 1))
    assert (result.mask == (np.asarray(image.convert("L")) < BACKGROUND / 2)).all()
    assert any(f"Seen in {result.tiling['tiles']} tiles" in text for text in result.warnings)
    # Where the model's input has the disc at a size of its training.
    assert KNOWN.low <= diameter / result.tiling["scale"] <= KNOWN.high


@pytest.mark.parametrize("diameter", [110, 120, 150])
def test_a_usual_field_is_seen_once(diameter):
    image, centres = discs(640, 480, diameter, share=0.6)
    result, detector = seen(image)
    assert result.tiling is None and detector.looks == 1 and not result.warnings
    assert len(result.cells) == len(centres)


def test_small_cells_that_are_all_found_are_looked_at_more_closely_but_not_tiled():
    image, centres = discs(640, 480, 96, share=0.6)
    result, detector = seen(image)
    assert result.tiling is None and detector.looks == 4 and len(result.cells) == len(centres)


def test_small_cells_that_look_like_usual_ones_do_not_deceive():
    image, centres = discs(640, 480, 64, share=0.5)
    deceived = Detector(deceived=True)
    first = deceived.look(image)
    assert 5 < len(first.cells) < len(centres) / 2
    result, _ = seen(image, deceived)
    assert matched(result, centres, 16) == len(centres) == len(result.cells)
    assert KNOWN.low <= 64 / result.tiling["scale"] <= KNOWN.high


def test_large_cells_that_the_edge_cuts_tell_their_size_by_their_longer_side():
    image, centres = discs(640, 480, 210, share=0.7, seed=1)
    shifted = Image.new("RGB", image.size, (BACKGROUND,) * 3)
    shifted.paste(image, (-60, -40))
    centres = centres - (60, 40)
    result, _ = seen(shifted, Detector(known=KnownSize(47.0, 62.0, 90.0)))
    assert result.tiling["tiles"] == 1 and result.tiling["tile"][0] > 800
    inside = ((centres > 0) & (centres < image.size)).all(1)
    boxes = np.array([cell.box for cell in result.cells])
    assert len(boxes) >= inside.sum() and boxes.min() >= 0 and (boxes <= (640, 480, 640, 480)).all()


def test_cells_that_are_too_large_are_seen_from_further_away():
    image, centres = discs(640, 480, 178, share=0.66)
    result, _ = seen(image)
    assert result.tiling["tiles"] == 1 and result.tiling["tile"][0] > 640
    assert matched(result, centres, 40) == len(centres) == len(result.cells)


def test_given_micrometres_decide_without_a_search():
    image, centres = discs(1600, 1200, 72)
    # 7.2 micrometres a red cell.
    result, detector = seen(image, um_per_pixel=0.1)
    assert result.tiling["um_per_pixel"] == 0.1 and detector.looks == 1 + result.tiling["tiles"]
    assert result.tiling["scale"] == pytest.approx(72 / KNOWN.usual)
    assert matched(result, centres, 18) == len(centres) == len(result.cells)
    usual, detector = seen(discs(640, 480, 124)[0], um_per_pixel=7.2 / 124)
    assert usual.tiling is None and detector.looks == 1


@pytest.mark.parametrize("um_per_pixel", [20, 0.001])
def test_a_size_of_a_pixel_at_which_no_cell_can_be_seen_is_refused_before_a_tile_is_made(um_per_pixel):
    detector = Detector()
    image = Image.new("RGB", (640, 480), "white")
    with pytest.raises(RequestError, match=r"a red cell would be [\d.e+]+ pixels wide, in an image of 640 x 480"):
        see_in_tiles(image, detector.look(image), TileDetector(detector, EDGE, KNOWN), um_per_pixel=um_per_pixel)
    assert detector.looks == 0


def test_given_tiles_are_taken_also_without_a_known_size():
    image, centres = discs(1600, 1200, 110)
    detector = Detector()
    (result,) = detector([image])
    see_in_tiles(image, result, TileDetector(detector, EDGE, None), tiles=640)
    assert result.tiling["tile"] == [640, 480] and "um_per_pixel" not in result.tiling
    assert matched(result, centres, 25) == len(centres) == len(result.cells)


def test_a_reduced_image_gives_pixels_of_its_file():
    image, centres = discs(1280, 960, 55)
    detector = Detector()
    (result,) = detector([image])
    result.width, result.height = 2560, 1920
    for cell in result.cells:
        cell.box = tuple(2 * value for value in cell.box)
    see_in_tiles(image, result, TileDetector(detector, EDGE, KNOWN))
    assert matched(result, 2 * centres, 25) == len(centres)


def test_tiles_with_more_cells_than_queries_are_said():
    image, _ = discs(1600, 1200, 110)
    detector = Detector(cap=3)
    (result,) = detector([image])
    see_in_tiles(image, result, TileDetector(detector, EDGE, KNOWN), tiles=640)
    assert any(CROWDED in text and "Give smaller tiles" in text for text in result.warnings)


def test_tiles_with_more_cells_than_queries_are_seen_in_smaller_ones():
    image, centres = discs(1600, 1200, 60)
    detector = Detector(cap=14)
    (result,) = detector([image])
    see_in_tiles(image, result, TileDetector(detector, EDGE, KNOWN), tiles=500)
    assert matched(result, centres, 15) == len(centres) == len(result.cells)
    assert any(
        "held more cells than the model has queries and were seen in smaller ones" in text for text in result.warnings
    )
    assert not any(CROWDED in text for text in result.warnings)


def test_at_other_thresholds_it_says_nothing_that_all_queries_found_a_cell():
    image, _ = discs(1600, 1200, 60)
    detector = Detector(cap=14)
    (result,) = detector([image])
    see_in_tiles(image, result, TileDetector(detector, EDGE, KNOWN, calibrated=False), tiles=500)
    assert detector.looks == 1 + result.tiling["tiles"] and any(CROWDED in text for text in result.warnings)


def test_a_field_with_more_cells_than_queries_is_seen_in_tiles_also_where_no_scale_is_found():
    image, centres = discs(1600, 1200, 190, share=0.6)
    (result,) = (detector := Detector(cap=20))([image])
    assert len(centres) > 20 == len(result.cells)
    see_in_tiles(image, result, TileDetector(detector, EDGE, KnownSize(30.0, 38.0, 47.0)))
    assert "halved, as there were more cells" in result.tiling["scale_source"]
    assert matched(result, centres, 40) == len(centres) == len(result.cells)
    assert not any(CROWDED in text for text in result.warnings)


def test_tiles_are_judged_for_the_monolayer():
    image, _ = discs(1600, 1200, 110, share=0.4)
    image.paste((BACKGROUND,) * 3, (0, 0, 800, 1200))
    result, _ = seen(image)
    wrong = {tuple(tile["outside"]) for tile in result.monolayer["tiles"] if tile["box"][2] <= 800}
    assert wrong <= {("too few red cells",), ("too few red cells", "too little focus")} and wrong
    assert all(not tile["outside"] for tile in result.monolayer["tiles"] if tile["box"][0] > 900)
    assert any("tiles lie outside the monolayer" in text for text in result.warnings)
    assert result.monolayer_counts["RBC"] <= result.counts["RBC"]


def test_white_cells_of_the_whole_field_keep_their_type():
    image, _ = discs(2560, 1920, 110)
    detector = Detector()
    (result,) = detector([image])
    result.cells = [
        Cell(1, (1000, 800, 1220, 1020), "neutrophil", 0.3),
        # As large as no white cell is, and no white cell at all.
        Cell(2, (0, 0, 1200, 900), "lymphocyte", 0.9),
        Cell(3, (300, 300, 520, 520), "RBC", 0.9),
    ]
    see_in_tiles(image, result, TileDetector(detector, EDGE, KNOWN))
    assert [cell.label for cell in result.cells if cell.label != "RBC"] == ["neutrophil"]
    assert all(cell.box[2] - cell.box[0] < 150 for cell in result.cells if cell.label == "RBC")


def test_a_crop_of_a_cell_is_seen_once():
    image = Image.new("RGB", (360, 363), "white")
    ImageDraw.Draw(image).ellipse([100, 100, 260, 260], "purple")
    result, detector = seen(image)
    assert result.tiling is None and detector.looks == 1


def test_an_empty_field_stays_empty():
    result, _ = seen(Image.new("RGB", (2000, 1500), "white"))
    assert result.cells == [] and result.tiling is None


# The checkpoint that comes with the package


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    return Analyzer.from_pretrained(
        lay_down_checkpoint(tmp_path_factory.mktemp("shipped") / "unihema", weights="open"), device="cpu"
    )


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    copy_examples(tmp_path_factory.mktemp("examples"))
    return Image.open(tmp_path_factory.getbasetemp() / "examples0" / "field_1.jpg").convert("RGB")


def test_fields_side_by_side_have_the_cells_of_both(analyzer, field):
    alone = analyzer(field, ["detection"])
    assert alone.tiling is None and len(alone.monolayer["tiles"]) == 1
    assert analyzer(field, ["detection"], prompt="WBC").monolayer is None
    wide = Image.new("RGB", (2 * field.width, 2 * field.height))
    for x in range(2):
        for y in range(2):
            wide.paste(field, (x * field.width, y * field.height))
    whole = analyzer(wide, ["detection"], tiles="off")
    result = analyzer(wide, ["detection", "segmentation"])
    assert result.mask.shape == (wide.height, wide.width)
    assert abs(len(result.cells) - 4 * len(alone.cells)) <= 0.15 * 4 * len(alone.cells)
    assert abs(len(result.cells) - 4 * len(alone.cells)) < abs(len(whole.cells) - 4 * len(alone.cells))
    again = SmearResult.from_dict(result.to_dict())
    assert again.tiling == result.tiling and again.counts == result.counts


def test_the_scale_does_not_depend_on_what_is_asked_for(analyzer, field):
    small = Image.new("RGB", field.size, field.resize((1, 1)).getpixel((0, 0)))
    small.paste(field.resize((field.width // 2, field.height // 2)), (field.width // 4, field.height // 4))
    scales = [
        analyzer(small, ["detection"], **options).tiling["scale"]
        for options in ({}, {"prompt": "WBC"}, {"threshold": 0.9}, {"threshold": 0.02})
    ]
    assert len(set(scales)) == 1


@pytest.mark.parametrize(
    "options,words",
    [
        ({"tiles": 10}, "64 pixels or more, got 10"),
        ({"tiles": "small"}, "auto, off, or an edge"),
        ({"tiles": True}, "auto, off, or an edge"),
        ({"um_per_pixel": 0}, "0.001 to 100 micrometres"),
        ({"um_per_pixel": math.nan}, "0.001 to 100 micrometres"),
    ],
)
def test_tiles_that_cannot_be(analyzer, field, options, words):
    with pytest.raises(RequestError, match=words):
        analyzer(field, **options)


def test_micrometres_tell_nothing_to_a_checkpoint_without_a_size(analyzer, field, monkeypatch):
    monkeypatch.setattr(analyzer.model.config.trained, "red_cell_diameter", None)
    with pytest.raises(RequestError, match="does not say how large its cells are"):
        analyzer(field, um_per_pixel=0.1)
    assert analyzer(field).tiling is None


def test_a_training_run_writes_down_how_large_its_red_cells_are():
    def row(diameter, cells=6):
        boxes = [[0.0, 0.0, diameter, diameter]] * cells
        return {"objects": {"bbox": boxes, "category": ["RBC"] * cells}, "size": (640, 480)}

    rows = [row(100.0 + number) for number in range(11)]
    assert red_cell_diameter(rows, 320) == [50.25, 52.5, 54.75]
    assert red_cell_diameter([*rows, row(900, cells=4)], 320) == [50.25, 52.5, 54.75]
    assert red_cell_diameter(rows[:9], 320) is None and red_cell_diameter(rows, None) is None
