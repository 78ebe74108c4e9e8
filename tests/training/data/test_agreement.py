"""Two annotations of the same photographs, planted with known differences."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from data_folders import photograph, write_coco, write_photograph
from PIL import Image

from unihema.errors import DatasetError
from unihema.training.data.curation.agreement import annotation_agreement
from unihema_cli.app import app


SIZE = (192, 144)
CELLS = [[10, 10, 40, 40], [80, 20, 40, 40], [20, 90, 40, 40], [120, 90, 40, 40]]


def write_side(folder: Path, images: dict[str, tuple[Image.Image, list]], size=SIZE) -> Path:
    for name, (image, _) in images.items():
        path = folder / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    write_coco(folder / "train.json", {f"train/{name}": boxes for name, (_, boxes) in images.items()}, size=size)
    return folder


@pytest.fixture
def sides(tmp_path) -> tuple[Path, Path]:
    """Two photographs of `first` are in `second`, at half the size and under other names; a third is mirrored there."""
    pictures = [Image.fromarray(photograph(seed, SIZE)) for seed in range(4)]
    first = {f"{n}.png": (picture, CELLS) for n, picture in enumerate(pictures[:3])}
    half = [[value / 2 for value in box] for box in CELLS]
    small = [picture.resize((96, 72)) for picture in pictures]
    second = {
        # A cell is missing; another is moved by a tenth of its width, a third by most of it.
        "a.png": (small[0], [half[0], [42, 10, 20, 20], [26, 45, 20, 20]]),
        "b.png": (small[1], half),
        "c.png": (small[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT), half),
        "d.png": (small[3], half),
    }
    return write_side(tmp_path / "one", first), write_side(tmp_path / "two", second, (96, 72))


def test_what_both_boxed(sides):
    found = annotation_agreement(*sides)
    assert found.photographs == 2 and list(found.classes) == ["RBC"]
    red = found.classes["RBC"]
    assert (red.first, red.second, red.both, red.photographs) == (8, 7, 6, 2)
    assert red.f1 == pytest.approx(12 / 15) and red.count_difference == pytest.approx(0.125)
    back = annotation_agreement(*sides[::-1]).classes["RBC"]
    assert (back.first, back.second, back.both) == (7, 8, 6) and back.f1 == red.f1


def test_the_command(sides, tmp_path):
    result = CliRunner().invoke(app, ["data", "compare", *map(str, sides), "-o", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "2 photographs in both." in result.output
    assert "RBC: 8 and 7 boxes, 6 in both (F1 0.800), counts differ by 12 % (median of 2 photographs)" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["classes"]["RBC"]["both"] == 6


def test_names_in_two_spellings_and_renamed(sides):
    path = sides[1] / "train.json"
    original = path.read_text()
    path.write_text(original.replace('"RBC"', '"erythrocyte"'))
    assert annotation_agreement(*sides).classes["RBC"].both == 6
    path.write_text(original.replace('"RBC"', '"disc"'))
    with pytest.raises(DatasetError, match=r"have no class in common \(RBC and disc\)"):
        annotation_agreement(*sides)
    assert annotation_agreement(*sides, rename={"disc": "RBC"}).classes["RBC"].both == 6


def test_nothing_to_compare(sides, tmp_path):
    other = tmp_path / "other"
    write_photograph(other / "images" / "train" / "x.png", 77)
    write_coco(other / "train.json", {"train/x.png": [[4, 5, 10, 8]]})
    with pytest.raises(DatasetError, match="No photograph of .*one is in .*other"):
        annotation_agreement(sides[0], other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no data folder with boxes"):
        annotation_agreement(tmp_path / "empty", sides[0])
