"""The catalog against the official table, official names, and the licence of a mix."""

import csv
import re
from pathlib import Path

import pytest

from unihema.errors import DatasetError
from unihema.official.labels import OFFICIAL_CELLS, OFFICIAL_CLASSES
from unihema.training.data.class_tree import label_map, official_name
from unihema.training.data.curation.catalog import catalog, catalog_table, find_entries, find_entry
from unihema.training.data.curation.licences import known_licence, mix_licence
from unihema.training.data.readers import FOREIGN_LAYOUTS
from unihema.training.data.rows import TASKS


def test_entries_are_whole():
    entries = catalog()
    assert len({entry.key for entry in entries}) == len(entries) == 47
    for entry in entries:
        assert entry.task in TASKS and entry.key.startswith(f"{entry.task}/")
        # What is stated has a source.
        assert bool(entry.licence) == ("Licence: http" in entry.notes)
        assert all(layout in FOREIGN_LAYOUTS for layout in re.findall(r"Layout `(\w+)`", entry.notes))
        for part in filter(None, entry.licence.split(" AND ")):
            assert known_licence(part) == part


def test_the_catalog_has_the_official_table(official_dir):
    tasks = {"segmentation": "segmentation", "detection": "detection", "classification": "single_cell"}
    with (official_dir / "datasets.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [(tasks[row["task"]], row["dataset"], row["data_link"], row["paper_link"]) for row in rows]
    found = [(entry.task, entry.name, entry.data_link, entry.paper_link) for entry in catalog()]
    assert found[: len(expected)] == expected
    assert [name for _, name, _, _ in found[len(expected) :]] == ["WBCAtt-VQA", "LeukemiaAttri-MLM"]


def test_the_page_shows_the_catalog():
    page = Path(__file__).parents[3] / "docs" / "datasets.md"
    (shown,) = re.findall(r"^<!-- catalog -->\n(.*?)^<!-- end -->", page.read_text(encoding="utf-8"), re.M | re.S)
    assert shown == catalog_table()
    assert shown.count("\n| `") == 47 and "| [data](https://datasetninja.com/bccd#download) |" in shown


def test_looking_up():
    assert find_entry("detection/bccd").name == "BCCD"
    assert find_entry("BloodMNIST").key == "single_cell/bloodmnist"
    with pytest.raises(DatasetError, match="Several data sets are called 'bccd': detection/bccd, single_cell/bccd"):
        find_entry("bccd")
    with pytest.raises(DatasetError, match="No data set 'bloodminst'.*Did you mean single_cell/bloodmnist"):
        find_entry("bloodminst")
    assert {entry.task for entry in find_entries("detection", "malaria")} == {"detection"}
    assert all("malaria" in entry.disease for entry in find_entries(disease="Malaria"))
    with pytest.raises(DatasetError, match="Unknown task 'classification'; tasks are detection"):
        find_entries("classification")


@pytest.mark.parametrize(
    ("name", "task", "official"),
    [
        ("Platelets", "detection", "platelet"),
        ("red blood cells", "detection", "RBC"),
        ("WBC", "single_cell", "wbc"),
        ("smudge_cell", "single_cell", "smudge cell"),
        ("Band-Neutrophil", "single_cell", "band neutrophil"),
        ("Sickle cell", "detection", "Sickle Cells"),
        ("unused", "detection", None),
        ("ig", "single_cell", None),
        ("RBC", "segmentation", None),
    ],
)
def test_official_names(name, task, official):
    assert official_name(name, task) == official


def test_every_official_name_is_its_own():
    assert label_map(OFFICIAL_CELLS, "single_cell") == {name: name for name in OFFICIAL_CELLS}
    assert label_map(OFFICIAL_CLASSES[1:], "detection") == {name: name for name in OFFICIAL_CLASSES[1:]}
    assert label_map(["Smudge-Cells", "odd"], "single_cell") == {"Smudge-Cells": "smudge cell"}


def test_licences():
    assert known_licence("cc by 4.0") == "CC-BY-4.0" == known_licence("CC-BY-4.0 licence")
    assert known_licence("gpl-3.0-or-later") == "GPL-3.0" and known_licence("as you like") is None
    mix = mix_licence({"a": "MIT", "b": "cc-by-4.0", "c": "", "d": "as you like"})
    assert mix.strictest == "CC-BY-4.0" and mix.unknown == ["c", "d"] and mix.conflicts == []
    assert mix.terms == ["attribution", "state changes"]
    both = mix_licence({"txl": "MIT AND CC-BY-4.0"})
    assert both.strictest == "CC-BY-4.0" and both.unknown == []
    part = mix_licence({"txl": "MIT AND something"})
    assert part.strictest == "MIT" and part.unknown == ["txl"]
    clash = mix_licence({"masks": "GPL-3.0", "cells": "CC-BY-NC-4.0"})
    assert clash.strictest == "CC-BY-NC-4.0"
    assert clash.conflicts == [
        "masks (GPL-3.0) forbids further restrictions; cells has them (CC-BY-NC-4.0)."
    ]  # fmt: skip
    shared = mix_licence({"masks": "GPL-3.0", "cells": "CC-BY-SA-4.0"})
    assert "each ask for their own licence" in shared.conflicts[0]
    assert mix_licence({}).strictest == "" == mix_licence({"a": ""}).strictest
