"""Nucleus and cytoplasm: what the levels of masks show, and what a checkpoint that learned it gives of each white cell."""

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import save_lively

from unihema import Analyzer, Cell, DatasetError, SmearResult
from unihema.modeling_unihema.configuration_unihema import TrainingResults
from unihema.results.shapes import NUCLEUS_COLUMNS, nucleus_of
from unihema.training.data.layouts.masks import read_mask, rows_of_levels
from unihema.training.run.build import build, load_rows
from unihema.training.run.config import DataConfig, ModelConfig, RunConfig


LEVELS = {"white blood cell": [1, 2], "nucleus": [2]}


def levels() -> np.ndarray:
    """A cell of 20 x 20 pixels with a nucleus of 8 x 10."""
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 15:35] = 1
    mask[12:20, 20:30] = 2
    return mask


@pytest.fixture
def folder(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "lab" / "train" / part).mkdir(parents=True)
    for name in "ab":
        Image.effect_noise((60, 40), 60).convert("RGB").save(tmp_path / "lab" / "train" / "images" / f"{name}.png")
        Image.fromarray(levels()).save(tmp_path / "lab" / "train" / "masks" / f"{name}.png")
    return tmp_path / "lab"


def test_each_image_is_asked_for_all_that_the_levels_show(folder):
    rows = load_rows(DataConfig([str(folder)], mask_levels={"lab": LEVELS}), "train")["segmentation"]
    shown = {(row["file_name"], row["prompt"]): read_mask(row["mask"], row["mask_levels"]).sum() for row in rows}
    assert sorted(shown.values()) == [80, 80, 400, 400] and len(shown) == 4
    assert {name: shown[key] for key in shown for name in key[1:]} == {"white blood cell": 400, "nucleus": 80}
    plain = load_rows(DataConfig([str(folder)]), "train")["segmentation"]
    assert len(plain) == 2 and "mask_levels" not in plain[0]


def test_a_checkpoint_says_what_its_masks_were_learned_of(folder):
    config = RunConfig("run", DataConfig([str(folder)], mask_levels={"lab": LEVELS}), ModelConfig())
    model, processor = build(config, load_rows(config.data, "train"))
    assert model.config.trained.mask_prompts == ["white blood cell", "nucleus"]
    assert processor.default_prompts["segmentation"] == model.config.trained.segmentation_label == "white blood cell"


def test_levels_that_are_not_there(tmp_path, folder):
    with pytest.raises(DatasetError, match=r"mask_levels.*: no data folder is called 'other'; there are lab"):
        load_rows(DataConfig([str(folder)], mask_levels={"other": LEVELS}), "train")
    with pytest.raises(DatasetError, match=r"data\.mask_levels: the data set has no masks"):
        rows_of_levels([], LEVELS)
    Image.fromarray(levels() * 100).save(tmp_path / "mask.jpg")
    with pytest.raises(DatasetError, match=r"mask\.jpg: a JPEG keeps no levels"):
        read_mask(tmp_path / "mask.jpg", [2])


def test_areas_of_a_cell():
    mask = levels()
    assert nucleus_of(mask > 0, mask == 2) == {"nucleus_area": 80.0, "cytoplasm_area": 320.0}
    assert nucleus_of(mask > 0, np.zeros_like(mask)) is None
    cell = Cell(1, (15, 10, 35, 30), "WBC", 0.9, nucleus=nucleus_of(mask > 0, mask == 2))
    assert cell.placed(5, 5, (2, 3)).nucleus == {"nucleus_area": 480.0, "cytoplasm_area": 1920.0}
    result = SmearResult(60, 40, [cell, Cell(2, (0, 0, 5, 5), "RBC", 0.5)], ["WBC", "RBC"])
    table = SmearResult.from_dict(result.to_dict()).to_dataframe()
    assert table[NUCLEUS_COLUMNS].iloc[0].tolist() == [80.0, 320.0, 0.25]
    assert table[NUCLEUS_COLUMNS].iloc[1].isna().all()
    measured = result.to_geojson()["features"][0]["properties"]["measurements"]
    assert measured["nuclear cytoplasmic ratio"] == 0.25
    whole = Cell(3, (0, 0, 5, 5), "WBC", 0.5, nucleus={"nucleus_area": 9.0, "cytoplasm_area": 0.0})
    assert SmearResult(60, 40, [whole], ["WBC"]).to_dataframe()["nuclear_cytoplasmic_ratio"].isna().all()


def test_white_cells_have_areas_where_the_checkpoint_tells_nuclei_apart(tmp_path):
    names = {"id2label": {0: "WBC", 1: "RBC"}, "label_parents": {}}
    told = save_lively(tmp_path / "told", 3, **names, trained=TrainingResults(mask_prompts=list(LEVELS)))
    untold = save_lively(tmp_path / "untold", 3, **names, trained=TrainingResults())
    image = Image.effect_noise((60, 40), 60).convert("RGB")
    found, plain = (Analyzer.from_pretrained(folder, device="cpu")(image) for folder in (told, untold))
    assert [cell.box for cell in found.cells] == [cell.box for cell in plain.cells]
    assert (found.mask == plain.mask).all() and not any(cell.nucleus for cell in plain.cells)
    white = [cell for cell in found.cells if cell.label == "WBC"]
    assert any(cell.nucleus for cell in white)
    assert not any(cell.nucleus for cell in found.cells if cell.label == "RBC")
    for cell in white:
        left, top, right, bottom = (int(np.floor(value)) for value in cell.box)
        inside = int((found.mask[top : bottom + 1, left : right + 1] > 0).sum())
        assert cell.nucleus is None or 0 < sum(cell.nucleus.values()) <= inside
    (tmp_path / "smears").mkdir()
    image.save(tmp_path / "smears" / "a.png")
    Analyzer.from_pretrained(told, device="cpu").analyze_files([tmp_path / "smears"], tmp_path / "results")
    assert NUCLEUS_COLUMNS[2] in (tmp_path / "results" / "cells.csv").read_text().splitlines()[0]
