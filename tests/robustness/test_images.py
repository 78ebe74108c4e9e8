"""Damaged image files are read or refused; in a folder of several, what is wrong with some changes nothing for the others."""

import contextlib
import csv
import functools
import json
import os
import tempfile
import unicodedata
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from robustness.confined import attack, command, confined
from robustness.strategies import (
    Change,
    changed_folder,
    changed_image,
    file_names,
    image_files,
    lay_down,
)
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer
from unihema.processing_unihema.image_io import image_size, load_mask, read_image
from unihema.slides import UnreadableRegionError, open_regions


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")

KINDS = ("folder", "pipe", "broken link", "link to itself", "no permission", "gone", "large", "device")


@functools.cache
def images() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        return image_files(Path(place))


NAMES = sorted(images())


class Lab:
    """A checkpoint, its analyzer, and what is found in each good image by itself; Hypothesis shows its name alone."""

    def __init__(self, checkpoint: Path, analyzer: Analyzer, alone: dict[str, dict[str, Any]]):
        self.checkpoint, self.analyzer, self.alone = checkpoint, analyzer, alone


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    place = tmp_path_factory.mktemp("lab")
    checkpoint = save_tiny_checkpoint(place / "unihema")
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    lay_down(place / "images", images())
    analyzer.analyze_files([place / "images"], place / "out", formats=["geojson"])
    found = results(place / "out")["images"]
    return Lab(checkpoint, analyzer, {Path(entry["image"]).name: without_place(entry) for entry in found})


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def without_place(found: dict) -> dict:
    return {name: value for name, value in found.items() if name not in ("image", "provenance")}


def read(path: Path) -> tuple[int, int]:
    picture, notes = read_image(path)
    assert picture.mode == "RGB" and all(isinstance(note, str) for note in notes)
    height, width = image_size(path)
    assert (width, height) == picture.size or picture.width * picture.height < width * height
    load_mask(path)
    return picture.size


@st.composite
def damaged(draw: Callable) -> Change:
    """A good image with its file damaged."""
    name = draw(st.sampled_from(NAMES))
    return Change(name, *draw(changed_image(images()[name])))


@attack(inputs=80, share=0.24, each=8)
@given(st.lists(damaged(), min_size=8, max_size=8))
def test_damaged_images(changes):
    try_each("images", changes, read)


def try_each(attack_name: str, changes: list[Change], attempt: Callable[[Path], object]) -> None:
    """Tries each of some damaged files, in one child."""

    def lay_all_down(given):
        for number, change in enumerate(changes):
            (given / f"{number}{change.name}").write_bytes(change.content)

    names = [f"{number}{change.name}" for number, change in enumerate(changes)]
    attempts = [lambda given, out, name=name: attempt(given / name) for name in names]
    confined(attack_name, *attempts, lay_down=lay_all_down)


@functools.cache
def slides() -> dict[str, bytes]:
    """Small pyramids: of sub-files, and of pages with Aperio's description."""
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    from microscope_files import field

    pixels, files = field((80, 64)), {}
    for name, packed in (("ome.tif", "deflate"), ("jpeg.svs", "jpeg")):
        buffer = BytesIO()
        pyramid = name == "ome.tif"
        with tifffile.TiffWriter(buffer, ome=pyramid) as file:
            options = {"photometric": "rgb", "tile": (16, 16), "compression": packed}
            description = {} if pyramid else {"description": "Aperio|MPP = 0.25", "metadata": None}
            file.write(pixels, **options, **description, **({"subifds": 1} if pyramid else {}))
            file.write(pixels[::2, ::2], **options, **description, **({"subfiletype": 1} if pyramid else {}))
        files[name] = buffer.getvalue()
    return files | {name: images()[name] for name in ("rgb.png", "progressive.jpg")}


@st.composite
def damaged_slides(draw: Callable) -> Change:
    """A file that is read in parts, with its content damaged."""
    name = draw(st.sampled_from(sorted(slides())))
    return Change(name, *draw(changed_image(slides()[name])))


def read_in_parts(path: Path) -> None:
    with open_regions(path, max_pixels=100) as source:
        assert source.pixels.mode == "RGB" and (source.um_per_pixel is None or 0.02 <= source.um_per_pixel <= 2)
        width, height = source.size
        for box in ((0, 0, min(width, 50), min(height, 50)), (width // 2, height // 2, width, height)):
            with contextlib.suppress(UnreadableRegionError):
                source.read_region(box, (30, 20))


@attack(inputs=40, share=0.1, each=8)
@given(st.lists(damaged_slides(), min_size=8, max_size=8))
def test_damaged_slides(changes):
    try_each("slides", changes, read_in_parts)


def test_undamaged_images_are_read(lab, tmp_path):
    lay_down(tmp_path, images())
    assert {read(tmp_path / name) for name in NAMES} == {(40, 32), (32, 40)}
    assert sorted(lab.alone) == NAMES


def check_folder(out: Path, listed: list[Path], alone: dict[str, dict], damaged: set[str], exactly: bool) -> None:
    """Each file is in the results or among what failed, once; and the good ones have what they have alone."""
    whole = results(out)
    if not listed:
        # A folder without any is named itself.
        assert not whole["images"] and len(whole["failed"]) == 1
        return
    found = {entry["image"]: entry for entry in whole["images"]}
    assert len(found) == len(whole["images"]) and not found.keys() & whole["failed"].keys()
    # Two names of one file are analysed once.
    assert {os.path.realpath(name) for name in (*found, *whole["failed"])} == set(map(os.path.realpath, listed))
    for name, entry in found.items():
        if Path(name).name in damaged:
            continue
        same = alone[Path(name).name]
        if exactly:
            assert without_place(entry) == same, name
        else:
            # Batches are the same up to rounding.
            scores = [[cell["score"] for cell in each["cells"]] for each in (entry, same)]
            assert entry["counts"] == same["counts"] and scores[0] == pytest.approx(scores[1], abs=1e-4), name
    rows = list(csv.DictReader((out / "counts.csv").read_text(encoding="utf-8").splitlines()))
    assert len({row["image"] for row in rows}) == len(found)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "records").glob("*.json")]
    assert len(records) == len(found) and all((out / file).is_file() for record in records for file in record["files"])


@attack(inputs=15, share=0.05)
@given(st.data(), st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique=True), st.sampled_from([1, 3]))
def test_folders_of_damaged_images(lab, data, names, batch):
    files = {name: images()[name] for name in names}
    changes = data.draw(changed_folder(files, kinds=KINDS))

    def attempt(folder, out):
        report = lab.analyzer.analyze_files([folder], out / "results", formats=["geojson"], batch_size=batch)
        listed = [path for path in folder.iterdir() if not path.is_dir()]
        check_folder(out / "results", listed, lab.alone, {change.name for change in changes}, batch == 1)
        assert report.images == len(results(out / "results")["images"])

    confined("folders of images", attempt, lay_down=lambda folder: lay_down(folder, files, changes))


@attack(inputs=8, share=0.02)
@given(
    st.lists(st.tuples(file_names(), st.sampled_from(["rgb.png", "deep.tif", "rgb.jpg", None])), min_size=1, max_size=4)
)
def test_files_of_any_name(lab, named):
    files = {name: b"no image" if of is None else images()[of] for name, of in named}

    def attempt(folder, out):
        said = command(
            "predict", lab.checkpoint, "-o", out / "results", "--format", "geojson", "--device", "cpu", "--", folder
        )
        kept = set(said) - set("\n\r\t")
        assert not any(unicodedata.category(each) in ("Cc", "Cs") or each == "\u202e" for each in kept), said
        # Hidden ones are not listed; a folder without others is named itself.
        listed = [path for path in folder.iterdir() if not path.name.startswith(".")] or [folder]
        whole = results(out / "results")
        assert {entry["image"] for entry in whole["images"]} | whole["failed"].keys() == set(map(str, listed))
        assert len(whole["failed"]) == sum(files.get(path.name, b"no image") == b"no image" for path in listed)
        for table in ("cells.csv", "counts.csv"):
            text = (out / "results" / table).read_bytes().decode()
            assert len(list(csv.reader(text.splitlines()))) == len(text.splitlines()) == text.count("\n")
        for path in (out / "results").rglob("*"):
            assert path.name.isprintable() and len(os.fsencode(path.name)) <= 255

    confined("file names", attempt, lay_down=lambda folder: lay_down(folder, files))
