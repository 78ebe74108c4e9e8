"""What a run records of its data: counts, licences of the folders, and images in both splits."""

import json
import shutil

import pytest

from unihema.errors import CardError
from unihema.hub_cards import DataRecord, check_card
from unihema.training.data.data_record import data_folder_card, data_record
from unihema.training.data.readers import load_folder
from unihema.training.data.synthetic.folder import write_synthetic


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "smears"
    return write_synthetic(folder, 3, 2, seed=0, crops_per_field=2, width=224, height=168, crop_size=96, progress=False)


@pytest.fixture
def folder(smears, tmp_path):
    return shutil.copytree(smears, tmp_path / "smears")


def record_of(folder) -> DataRecord:
    return data_record([str(folder)], {split: load_folder(folder, split) for split in ("train", "val")}, "val")


def test_images_are_counted_once_and_splits_compared(folder):
    record = record_of(folder)
    # Each field once, whatever is asked of it, and its crops.
    assert record.sources[0].images == {"train": 3 + 6, "val": 2 + 4}
    assert record.compared == {"train": 9, "val": 6} and record.shared == 0
    assert record.sources[0].name == "smears" and record.sources[0].licence is None
    source, target = (sorted((folder / split / "images").iterdir())[0] for split in ("train", "val"))
    shutil.copyfile(source, target)
    assert record_of(folder).shared == 1


def test_the_licence_is_that_of_the_folders_own_card(folder):
    text = data_folder_card(folder, licence="cc0-1.0", source="https://example.org", description="Painted smears.")
    card = check_card(text, "dataset")
    assert card.data.pretty_name == "smears" and "object-detection" in card.data.task_categories
    assert "| images | 9 | 6 |" in text and "Painted smears." in text and "- single_cell: " in text
    (folder / "README.md").write_text(text, encoding="utf-8")
    assert record_of(folder).sources[0].licence == "cc0-1.0"
    # The licence need not be told again.
    again = data_folder_card(folder, licence=None, source="https://example.org", description="Painted smears.")
    assert again == text
    (folder / "README.md").unlink()
    (folder / "dataset.json").write_text(json.dumps({"licence": "CC-BY-4.0", "data_link": "https://example.org/made"}))
    assert record_of(folder).sources[0].source == "https://example.org/made"
    declared = data_folder_card(folder, licence=None, source=None, description="Painted smears.")
    assert check_card(declared, "dataset").data.license == "cc-by-4.0" and "https://example.org/made" in declared
    (folder / "dataset.json").unlink()
    for broken in ("no metadata", "---\n[\n---\n", "---\n- a\n---\n"):
        (folder / "README.md").write_text(broken)
        assert record_of(folder).sources[0].licence is None
    with pytest.raises(CardError, match="licence of the data set 'smears' is not known"):
        data_folder_card(folder, licence=None, source="https://example.org", description="Painted smears.")


def test_the_code_in_a_dataset_card_runs(folder, monkeypatch, capsys):
    from card_code import code_of

    text = data_folder_card(folder, licence="cc0-1.0", source="https://example.org", description="Painted smears.")
    monkeypatch.chdir(folder)
    exec(compile(code_of(text), "card", "exec"), {})
    assert "detection 3" in capsys.readouterr().out


def test_the_record_comes_back_from_its_file(folder, tmp_path):
    from dataclasses import asdict

    record = record_of(folder)
    (tmp_path / "data.json").write_text(json.dumps(asdict(record)))
    assert DataRecord.of_checkpoint(tmp_path) == record
    assert DataRecord.of_checkpoint(folder) == DataRecord()
