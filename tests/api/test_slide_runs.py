"""Long runs over one image: progress, going on within it, and memory that is not enough."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run_command
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint
from tqdm.auto import tqdm

from unihema import Analyzer
from unihema.device_memory import OutOfMemoryWarning
from unihema.progress import Progress
from unihema.results.tiles import TILES_AT_ONCE
from unihema_cli.analyse import ImageBar


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")
TILE = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "unihema", num_queries=6)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "wide.png"
    noise = np.random.default_rng(0).integers(0, 255, (260, 330, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


class Stopped(BaseException):
    """As a machine that goes down."""


def looks(monkeypatch, fails_at: int | None = None) -> list[int]:
    """How many images each look at tiles has; at one of them the machine goes down."""
    seen, real = [], Analyzer.look

    def look(self, request, opened):
        if opened[0].name is None:
            seen.append(len(opened))
            if len(seen) == fails_at:
                raise Stopped
        return real(self, request, opened)

    monkeypatch.setattr(Analyzer, "look", look)
    return seen


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def analyse(analyzer, wide, folder, **options):
    return analyzer.analyze_files([wide], folder, tasks=["detection", "segmentation"], tiles=TILE, **options)


@pytest.fixture(scope="module")
def undisturbed(analyzer, wide, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "results"
    analyse(analyzer, wide, folder)
    return folder


def stopped(analyzer, wide, folder, fails_at: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        looks(patch, fails_at)
        analyse(analyzer, wide, folder)


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_is_stopped_goes_on_within_the_image(analyzer, wide, tmp_path, undisturbed, monkeypatch, torn):
    folder = tmp_path / "results"
    stopped(analyzer, wide, folder, 5)
    part = folder / "records" / "wide.tiles"
    if torn:
        content = part.read_bytes()
        part.write_bytes(content[:-40])
    seen = looks(monkeypatch)
    done = []
    analyse(analyzer, wide, folder, on_progress=done.append)
    tiles = json.loads((folder / "results.json").read_text())["images"][0]["tiling"]["tiles"]
    kept = (4 - torn) * TILES_AT_ONCE
    assert sum(seen) == tiles - kept > 20
    assert {said[:2] for said in done} == {(str(wide), "tile")}
    assert done[0][2:4] == (kept, tiles) and done[-1][2:4] == (tiles, tiles)
    assert [said.cells for said in done] == sorted(said.cells for said in done) and done[0].cells > 0
    assert files(folder) == files(undisturbed)
    assert not part.exists()


def test_other_settings_and_another_image_begin_anew(analyzer, wide, tmp_path, monkeypatch):
    image, folder = tmp_path / "images" / "wide.png", tmp_path / "results"
    image.parent.mkdir()
    shutil.copy(wide, image)
    stopped(analyzer, image, folder, 5)
    changed = np.asarray(Image.open(image)).copy()
    changed[0, 0] ^= 1
    Image.fromarray(changed).save(image)
    seen = looks(monkeypatch)
    analyse(analyzer, image, folder)
    tiles = json.loads((folder / "results.json").read_text())["images"][0]["tiling"]["tiles"]
    assert sum(seen) == tiles
    stopped(analyzer, wide, tmp_path / "others", 5)
    del seen[:]
    analyzer.analyze_files(
        [wide], tmp_path / "others", ["detection", "segmentation"], threshold=0.5, tiles=TILE, overwrite=True
    )
    assert sum(seen) == tiles


def test_what_is_left_of_an_image_that_is_done_is_removed(analyzer, wide, tmp_path):
    folder = tmp_path / "results"
    analyse(analyzer, wide, folder)
    (folder / "records" / "wide.tiles").write_text("left by a kill right after the record was written")
    analyse(analyzer, wide, folder)
    assert [path.name for path in (folder / "records").iterdir()] == ["wide.json"]


def test_the_command_shows_tiles_and_cells(checkpoint, wide, tmp_path):
    ended = run_command("predict", checkpoint, wide, "-o", tmp_path / "results", "--tiles", TILE, "--task", "detection")
    assert ended.returncode == 0
    assert "wide.png" in ended.stderr and "tile/s" in ended.stderr and " a second" in ended.stderr


def test_each_image_has_a_bar_of_its_own_also_where_the_one_before_ended_early(monkeypatch):
    made = []

    class Bar(tqdm):
        def __init__(self, **told):
            super().__init__(**told, file=io.StringIO())
            made.append(self)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    bar = ImageBar()
    for image, unit, most in (
        ("a.svs", "tile", 30),
        ("b.svs", "tile", 60),
        ("b.svs", "crop", 2000),
        ("c.png", "tile", 4),
    ):
        total = {"tile": 60, "crop": 2000}[unit] if image != "c.png" else 4
        for done in range(2, most + 1, 2):
            bar(Progress(image, unit, done, total, done))
    bar.close()
    assert [(one.desc, one.unit, one.n) for one in made] == [
        ("a.svs", "tile", 30),
        ("b.svs", "tile", 60),
        ("b.svs", "crop", 2000),
    ]


def test_a_batch_that_memory_is_not_enough_for_is_halved(analyzer, wide, monkeypatch):
    whole = analyzer(wide, "detection", tiles=TILE)
    seen, real = [], Analyzer.look

    def look(self, request, opened):
        seen.append(len(opened))
        if len(opened) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, request, opened)

    monkeypatch.setattr(Analyzer, "look", look)
    result = analyzer(wide, "detection", tiles=TILE)
    # Tried once with four, then with two; of an odd number one is left.
    assert seen[1] == TILES_AT_ONCE and set(seen[2:]) == {2, 1}
    assert result.counts == whole.counts and result.warnings == whole.warnings
    for ours, theirs in zip(result.cells, whole.cells, strict=True):
        assert ours.box == pytest.approx(theirs.box, abs=0.05)


def test_where_one_image_is_too_much_the_processor_goes_on(analyzer, wide, monkeypatch):
    whole = analyzer(wide, "detection", tiles=TILE)
    model, real = analyzer.model, Analyzer.look
    request = analyzer.request("detection", tiles=TILE)
    tried = []

    def look(self, request, opened):
        if self.model is model:
            tried.append(len(opened))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, request, opened)

    monkeypatch.setattr(Analyzer, "look", look)
    there = torch.device("meta")
    monkeypatch.setattr(type(model), "device", property(lambda self: there if self is model else torch.device("cpu")))
    with pytest.warns(OutOfMemoryWarning, match="the processor does the rest"):
        (result,) = analyzer.run(request, [wide])
    assert tried == [1, 4, 2, 1]
    assert [cell.box for cell in result.cells] == [cell.box for cell in whole.cells]
    assert [text for text in result.warnings if "not enough memory" in text] == [
        "The device has not enough memory for one image at this size, so the processor does the rest, more slowly."
    ]
    assert analyzer.model is model


def test_a_processor_without_memory_is_an_error(analyzer, wide, monkeypatch):
    def look(self, request, opened):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Analyzer, "look", look)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        analyzer(wide, "detection")
