"""Damaged data folders of every layout end in rows or in a `DatasetError`, in bounded time and memory."""

import contextlib
import functools
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from robustness.confined import attack, confined
from robustness.good_folders import good_folders
from robustness.strategies import Change, changed_folder, lay_down

from unihema.errors import DatasetError
from unihema.training.data.curation.check import check_data
from unihema.training.data.readers import load_folder
from unihema.training.data.rows import BadRows
from unihema.training.data.verify import verify_rows


LAYOUTS = ["by_split", "class_folders", "coco", "image_folder", "mask_pairs", "own", "shards", "table", "voc", "yolo"]
WITHOUT_SPLITS = ("mask_pairs", "table")


@pytest.fixture(autouse=True)
def warnings_afterwards():
    """Tests that come later in this process look at what is logged."""
    yield
    logging.disable(logging.NOTSET)


@functools.cache
def folders() -> dict[str, dict[str, bytes]]:
    with tempfile.TemporaryDirectory() as place:
        return good_folders(Path(place))


def read(folder: Path, layout: str, on_invalid: str = "error", attributes: bool = False) -> int:
    """Reads a folder as training and `unihema data check` do; rows that it has."""
    # A warning for each bad row is not what is tested here.
    logging.disable(logging.WARNING)
    count, problem = 0, None
    for split in ("train",) if layout in WITHOUT_SPLITS else ("train", "val"):
        try:
            rows = load_folder(folder, split, on_invalid=on_invalid, attributes_as_detection=attributes)
        except DatasetError as error:
            problem = error
            continue
        for found in rows.values():
            for row in found:
                for key in ("image", "mask"):
                    if hasattr(row.get(key), "check"):
                        with contextlib.suppress(DatasetError):
                            row[key].check()
        bad = BadRows()
        count += sum(map(len, verify_rows(rows, bad, workers=2, progress=False).values()))
        try:
            bad.settle("error")
        except DatasetError as error:
            problem = error
    report = check_data([folder], near=False)
    # What is found can be written.
    json.dumps(report.to_dict(), ensure_ascii=False).encode()
    if problem is not None:
        raise problem
    return count


@st.composite
def damaged(draw: Callable) -> tuple[str, tuple[Change, ...]]:
    """A layout, and what was changed in its folder."""
    layout = draw(st.sampled_from(LAYOUTS))
    files = folders()[layout]
    # Most reading is of the few files that are no images.
    weights = {name: 1 if name.endswith((".png", ".jpg", ".bmp")) else 4 for name in files}
    return layout, draw(changed_folder(files, weights))


@attack(inputs=60, share=0.26, each=4)
@given(st.lists(damaged(), min_size=4, max_size=4), st.sampled_from(["error", "skip"]), st.booleans())
def test_damaged_folders(folders_of, on_invalid, attributes):
    def lay_all_down(given):
        for number, (layout, changes) in enumerate(folders_of):
            lay_down(given / str(number), folders()[layout], changes)

    attempts = [
        lambda given, out, number=number, layout=layout: read(given / str(number), layout, on_invalid, attributes)
        for number, (layout, _) in enumerate(folders_of)
    ]
    confined("data folders", *attempts, lay_down=lay_all_down)


def test_undamaged_folders_are_read(tmp_path):
    for layout in LAYOUTS:
        lay_down(tmp_path / layout, folders()[layout])
        assert read(tmp_path / layout, layout) > 0
    assert sorted(folders()) == LAYOUTS
