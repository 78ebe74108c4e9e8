"""The monolayer: tiles judged by density, overlap and focus; red cells outside left out of figures, white cells never."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from unihema.errors import InputError
from unihema.results.monolayer import BANDS_FILE, focus_of, judged, outside_monolayer, read_bands, usual_bands
from unihema.results.smear_result import Cell, SmearResult
from unihema.training.data.synthetic.fields import SyntheticSmears


SIDE = 300
PARENTS = {"neutrophil": "WBC"}


def cells_of(places, size: float = 40.0, label: str = "RBC") -> list[Cell]:
    return [Cell(number, (x, y, x + size, y + size), label, 0.9) for number, (x, y) in enumerate(places, 1)]


def grid(left: int, step: int, size: float = 40.0) -> list[Cell]:
    """Red cells on a grid in the tile that begins at `left`."""
    return cells_of([(left + x, y) for x in range(5, SIDE - 45, step) for y in range(5, SIDE - 45, step)], size)


def smear() -> SmearResult:
    """A tile with cells side by side, one with cells in heaps, an empty one, and one out of focus."""
    cells = [*grid(0, 60), *grid(SIDE, 20), *grid(3 * SIDE, 60)]
    cells += cells_of([(SIDE + 100, 100), (2 * SIDE + 50, 50)], 80, "neutrophil")
    cells = [replace(cell, id=number) for number, cell in enumerate(cells, 1)]
    boxes = [(left, 0, left + SIDE, SIDE) for left in range(0, 4 * SIDE, SIDE)]
    result = SmearResult(4 * SIDE, SIDE, cells, classes=["RBC", "neutrophil"], class_parents=PARENTS)
    result.monolayer = judged(boxes, [0.02, 0.02, 0.02, 0.001], cells, PARENTS)
    return result


def test_each_tile_says_what_is_wrong_with_it():
    tiles = smear().monolayer["tiles"]
    assert tiles[0]["outside"] == [] and tiles[0]["overlap"] == 0 and 0.2 < tiles[0]["density"] < 0.4
    assert tiles[1]["outside"] == ["too many red cells", "too many cells that overlap"] and tiles[1]["overlap"] == 1
    assert tiles[2]["outside"] == ["too few red cells"] and tiles[2]["overlap"] is None
    assert tiles[3]["outside"] == ["too little focus"]


def test_red_cells_outside_are_left_out_of_their_figures_and_white_cells_are_not():
    result = smear()
    assert result.monolayer_counts == {"RBC": result.monolayer["tiles"][0]["red_cells"], "neutrophil": 2}
    assert result.counts["RBC"] == sum(tile["red_cells"] for tile in result.monolayer["tiles"])
    outside = outside_monolayer(result.monolayer, result.cells)
    assert [cell.box[0] >= SIDE for cell in result.cells] == outside


def test_a_single_tile_is_judged_but_its_cells_count():
    cells = grid(0, 20)
    result = SmearResult(SIDE, SIDE, cells, classes=["RBC"])
    result.monolayer = judged([(0, 0, SIDE, SIDE)], [0.02], cells, {})
    assert result.monolayer["tiles"][0]["outside"] and result.monolayer_counts == result.counts
    assert SmearResult(SIDE, SIDE, cells, classes=["RBC"]).monolayer_counts == result.counts


def test_focus_falls_with_blur_and_not_with_magnification():
    image = Image.fromarray(SyntheticSmears(seed=1)[0].image)
    sharp = focus_of(image, 50)
    assert focus_of(image.filter(ImageFilter.GaussianBlur(2)), 50) < 0.6 * sharp
    larger = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
    assert focus_of(larger, 100) == pytest.approx(sharp, rel=0.25)
    assert focus_of(Image.new("RGB", (40, 30), "white"), 50) == 0


def test_a_laboratory_has_bands_of_its_own(tmp_path):
    file = tmp_path / "ours.json"
    file.write_text(json.dumps(usual_bands() | {"name": "ours", "density": [0, None], "overlap": [None, None]}))
    result = smear()
    result.judge_monolayer(file)
    assert [bool(tile["outside"]) for tile in result.monolayer["tiles"]] == [False, False, False, True]
    assert any("1 of 4 tiles lie outside the monolayer by the bands of ours" in text for text in result.warnings)
    result.judge_monolayer()
    assert result.monolayer == smear().monolayer
    assert sum("outside the monolayer" in text for text in result.warnings) == 1


def test_a_stored_result_says_the_same():
    result = smear()
    again = SmearResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.monolayer == result.monolayer and again.monolayer_counts == result.monolayer_counts
    older = {name: value for name, value in result.to_dict().items() if name != "monolayer"}
    assert SmearResult.from_dict(older).monolayer is None
    with pytest.raises(InputError, match="never measured"):
        SmearResult.from_dict(older).judge_monolayer()


@pytest.mark.parametrize(
    "change",
    [{"tiles": 3}, {"tiles": [{}]}, {"bands": {}}, {"more": 1}, {"tiles": [{"box": [0, 0, 1], "outside": []}]}],
)
def test_a_stored_monolayer_that_cannot_be_is_refused(change):
    values = smear().to_dict()
    values["monolayer"] = values["monolayer"] | change
    with pytest.raises(InputError, match="monolayer"):
        SmearResult.from_dict(values)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 1}', "\x00"])
def test_a_file_that_is_none_of_bands_is_named(tmp_path, text):
    file = tmp_path / "bands.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"bands\.json: "):
        read_bands(file)
    usual = json.loads(BANDS_FILE.read_text())
    for wrong in ([1, 0], [None], ["a", 1], [float("nan"), 1]):
        file.write_text(json.dumps(usual | {"focus": wrong}))
        with pytest.raises(InputError, match="lowest and highest"):
            read_bands(file)


def test_many_tiles_and_cells_are_judged_quickly():
    rng = np.random.default_rng(0)
    cells = cells_of(rng.uniform(0, 20_000, (20_000, 2)), 80)
    boxes = [(x, y, x + 250, y + 250) for x in range(0, 20_000, 250) for y in range(0, 20_000, 250)]
    monolayer = judged(boxes, [0.02] * len(boxes), cells, {})
    assert sum(tile["red_cells"] for tile in monolayer["tiles"]) == sum(
        cell.center[0] < 20_000 and cell.center[1] < 20_000 for cell in cells
    )
