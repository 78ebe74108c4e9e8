"""Shapes of cells against those of figures whose measures are known."""

import csv
import math

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import save_lively

from unihema import Analyzer, Cell, SmearResult, UniHemaConfig, UniHemaError
from unihema.modeling_unihema.configuration_unihema import TrainingResults
from unihema.results import shapes
from unihema.results.shapes import SHAPE_COLUMNS, cell_shape
from unihema.training.data.rows import cell_mask_sides


pytest.importorskip("skimage")


def ellipse(across: float, down: float) -> np.ndarray:
    y, x = np.indices((math.ceil(2 * down), math.ceil(2 * across))) + 0.5
    return ((x - across) / across) ** 2 + ((y - down) / down) ** 2 <= 1


@pytest.mark.parametrize("radius", [15, 30, 60])
def test_a_circle(radius):
    found = cell_shape(ellipse(radius, radius), 0.1)
    assert found["area"] == pytest.approx(math.pi * radius**2, rel=0.02)
    assert found["equivalent_diameter"] == pytest.approx(2 * radius, rel=0.01)
    assert found["perimeter"] == pytest.approx(2 * math.pi * radius, rel=0.03)
    assert found["circularity"] == pytest.approx(1, abs=0.06) and found["eccentricity"] < 0.05
    assert found["area_um2"] == pytest.approx(found["area"] / 100, abs=0.01)
    assert found["equivalent_diameter_um"] == pytest.approx(found["equivalent_diameter"] / 10, abs=0.01)
    assert found["perimeter_um"] == pytest.approx(found["perimeter"] / 10, abs=0.01)


def test_an_ellipse_and_what_is_no_circle():
    found = cell_shape(ellipse(50, 30))
    assert found["eccentricity"] == pytest.approx(math.sqrt(1 - (30 / 50) ** 2), abs=0.01)
    assert found["area_um2"] is None and 0.8 < found["circularity"] < 0.95
    assert cell_shape(np.ones((8, 80), bool))["circularity"] < 0.4
    assert cell_shape(None) == cell_shape(np.zeros((3, 4), bool)) == dict.fromkeys(SHAPE_COLUMNS)


def test_the_table_has_shapes_where_cells_have_masks(monkeypatch):
    cells = [Cell(1, (0, 0, 40, 40), "A", 0.9, {}, ellipse(20, 20)), Cell(2, (50, 50, 60, 60), "A", 0.8)]
    result = SmearResult(100, 80, cells, ["A"], um_per_pixel=0.2)
    table = result.to_dataframe()
    assert table["area_um2"][0] == pytest.approx(math.pi * 400 * 0.04, rel=0.02)
    assert table[SHAPE_COLUMNS].iloc[1].isna().all()
    assert "area" not in SmearResult(100, 80, cells[1:], ["A"]).to_dataframe()
    monkeypatch.setattr(shapes.importlib.util, "find_spec", lambda name: None)
    assert "area" not in result.to_dataframe()


def test_cells_csv_has_shapes(tmp_path):
    checkpoint = save_lively(tmp_path / "masks", 3, trained=TrainingResults(cell_masks=True))
    (tmp_path / "images").mkdir()
    Image.effect_noise((60, 40), 60).convert("RGB").save(tmp_path / "images" / "a.png")
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    report = analyzer.analyze_files([tmp_path / "images"], tmp_path / "out", threshold=0.0)
    assert not report.failed
    with open(tmp_path / "out" / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(set(SHAPE_COLUMNS) <= row.keys() for row in rows)
    assert any(float(row["area"] or 0) > 0 for row in rows)


def test_cells_unlike_those_whose_masks_were_learned_have_none(tmp_path):
    rows = [
        {"size": (100, 50), "objects": {"bbox": [[0, 0, 10, 5], [0, 0, 20, 40], [0, 0, 90, 9]], "segmentation": masks}}
        for masks in ([[[1.0]], [[1.0]], None], None)
    ]
    assert cell_mask_sides(rows) == pytest.approx([0.103, 0.397])
    assert cell_mask_sides(rows[1:]) is None
    folder = save_lively(tmp_path / "masks", 3, trained=TrainingResults(cell_masks=True))
    analyzer = Analyzer.from_pretrained(folder, device="cpu")
    image = Image.effect_noise((60, 40), 60).convert("RGB")

    def masked() -> dict[float, bool]:
        """Longer side of each cell -> whether it has a mask."""
        cells = analyzer(image, ["detection"], threshold=0.0, tiles="off").cells
        return {max(c.box[2] - c.box[0], c.box[3] - c.box[1]) / 60: c.mask is not None for c in cells}

    sides = sorted(masked())
    assert all(masked().values()) and len(sides) > 4
    known = [sides[1] * 1.1 + 1e-6, sides[-2] / 1.1 - 1e-6]
    analyzer.model.config.trained.cell_mask_sides = sorted(known)
    assert masked() == {side: sorted(known)[0] / 1.1 <= side <= sorted(known)[1] * 1.1 for side in sides}
    assert set(masked().values()) == {True, False}
    with pytest.raises(UniHemaError, match="trained.cell_mask_sides is .* must be two shares, ascending"):
        UniHemaConfig(trained={"cell_mask_sides": [0.5, 0.1]})
