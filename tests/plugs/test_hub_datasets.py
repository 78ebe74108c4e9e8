"""Cells as columns of `datasets`, and data sets of the Hub as data folders."""

import json
import pickle

import datasets
import pytest
from datasets.fingerprint import Hasher
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from unihema.errors import DatasetError, FileThereError
from unihema.plugs.hub_datasets import FindObjects, object_columns, object_features, write_image_folder
from unihema.training.data.readers import load_folder


@pytest.fixture(scope="module")
def find(demo):
    return FindObjects(demo / "unihema", device="cpu", tiles="off")


@pytest.fixture(scope="module")
def smears(demo):
    files = [str(demo / f"smears/field_{number}.jpg") for number in (1, 2)]
    return datasets.Dataset.from_dict({"image": files, "slide": ["a", "b"]}).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def found(find, smears):
    return smears.map(find, batched=True, batch_size=2, features=find.features(smears.features))


def test_the_columns_hold_what_the_analyzer_finds(found, find, smears, demo):
    assert found.column_names == ["image", "slide", "width", "height", "objects"]
    for number, row in enumerate(found, 1):
        result = find.analyzer(demo / f"smears/field_{number}.jpg", "detection", tiles="off")
        objects = row["objects"]
        names = found.features["objects"]["category"].feature.int2str(objects["category"])
        assert (row["width"], row["height"]) == (640, 480) == row["image"].size
        assert len(objects["bbox"]) > 20 and names == [cell.label for cell in result.cells]
        for box, area, cell in zip(objects["bbox"], objects["area"], result.cells, strict=True):
            left, top, right, bottom = cell.box
            assert box == pytest.approx([left, top, right - left, bottom - top], abs=1e-3)
            assert area == pytest.approx(box[2] * box[3])


def test_the_cache_knows_an_equal_checkpoint_again(find):
    copied = pickle.loads(pickle.dumps(find))
    assert Hasher.hash(copied) == Hasher.hash(find)
    copied.asked = {"tiles": "off", "threshold": 0.5}
    assert Hasher.hash(copied) != Hasher.hash(find)


def test_what_the_hub_stores_is_read_with_the_same_columns(found, tmp_path):
    """The two files that `push_to_hub` writes: Parquet, and a card that states the features."""
    (tmp_path / "data").mkdir()
    found.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    card = DatasetCardData()
    DatasetInfosDict({"default": datasets.DatasetInfo(features=found.features)}).to_dataset_card_data(card)
    DatasetCard(f"---\n{card}\n---\n").save(tmp_path / "README.md")
    again = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert again.features == found.features
    assert again[1]["objects"] == found[1]["objects"]


def test_a_data_set_becomes_a_data_folder(found, tmp_path, demo):
    folder = write_image_folder(found, tmp_path / "data", "val")
    (rows,) = load_folder(tmp_path / "data", "val").values()
    names = found.features["objects"]["category"].feature
    assert [row["objects"]["bbox"] for row in rows] == [row["objects"]["bbox"] for row in found]
    assert [row["objects"]["category"] for row in rows] == [names.int2str(row["objects"]["category"]) for row in found]
    # Not packed anew.
    assert (folder / "000000.jpeg").read_bytes() == (demo / "smears/field_1.jpg").read_bytes()
    with pytest.raises(FileThereError, match="val is there already"):
        write_image_folder(found, tmp_path / "data", "val")


HOSTILE = ["=cmd|' /C calc'!A1", "../../<b>", "\u202ecell"]


def hub_rows(category, kind="lists"):
    boxes = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    objects = {"bbox": boxes, "category": category}
    if kind == "structs":
        objects = [{"bbox": box, "category": name} for box, name in zip(boxes, category, strict=True)]
    return datasets.Dataset.from_dict({"image": [Image.new("RGB", (40, 30), "pink")], "objects": [objects]})


@pytest.mark.parametrize("kind", ["lists", "structs"])
@pytest.mark.parametrize("streamed", [False, True])
def test_names_are_those_of_the_features_of_the_caller_or_of_the_rows(tmp_path, kind, streamed):
    by_caller, by_rows = hub_rows([2, 0], kind), hub_rows(HOSTILE[:2], kind)
    by_features = hub_rows([0, 1], kind)
    features = object_features(HOSTILE)["objects"]
    if kind == "lists":
        label = {"objects": {"bbox": features["bbox"], "category": features["category"]}}
        by_features = by_features.cast(datasets.Features({**by_features.features, **label}))
    else:
        label = datasets.List({name: features[name].feature for name in ("bbox", "category")})
        by_features = by_features.cast(datasets.Features({**by_features.features, "objects": label}))
    options = {"caller": HOSTILE, "rows": None, "features": None}
    for split, dataset in (("caller", by_caller), ("rows", by_rows), ("features", by_features)):
        write_image_folder(dataset.to_iterable_dataset() if streamed else dataset, tmp_path, split, options[split])
        line = json.loads((tmp_path / split / "metadata.jsonl").read_text(encoding="utf-8"))
        expected = [HOSTILE[2], HOSTILE[0]] if split == "caller" else HOSTILE[:2]
        assert line["objects"]["category_name"] == expected and line["file_name"] == "000000.png"


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (hub_rows([0, 1]), "category 0 has no name; give `classes`"),
        (hub_rows([0, 1]).remove_columns("objects"), "needs image and objects"),
    ],
)
def test_what_cannot_be_a_data_folder_is_told(tmp_path, dataset, said):
    with pytest.raises(DatasetError, match=said):
        write_image_folder(dataset, tmp_path, "train")
    assert not (tmp_path / "train" / "metadata.jsonl").exists()


def test_a_damaged_image_is_named(tmp_path):
    image = {"bytes": b"no image", "path": None}
    dataset = datasets.Dataset.from_dict({"image": [image], "objects": [{"bbox": [], "category": ["a"]}]})
    with pytest.raises(DatasetError, match="row 0 of the data set: its image cannot be read"):
        write_image_folder(dataset, tmp_path, "train")


@pytest.mark.parametrize(
    ("image", "objects", "said"),
    [
        (None, {"bbox": [], "category": []}, "it has no image"),
        ({"bytes": None, "path": "nowhere.png"}, {"bbox": [], "category": []}, "its image nowhere.png cannot be read"),
        ("white", None, "its objects have no list 'bbox'"),
        ("white", {"bbox": [[1.0, 1.0, 2.0, 2.0]], "category": None}, "its objects have no list 'category'"),
    ],
)
def test_a_row_with_gaps_is_named_and_nothing_is_left(tmp_path, image, objects, said):
    Image.new("RGB", (9, 9)).save(tmp_path / "white.png")
    whole = {"bytes": (tmp_path / "white.png").read_bytes(), "path": None}
    rows = [{"image": whole, "objects": {"bbox": [[1.0, 1.0, 2.0, 2.0]], "category": ["RBC"]}}]
    rows.append({"image": whole if image == "white" else image, "objects": objects})
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(DatasetError, match=f"row 1 of the data set: {said}"):
        write_image_folder(dataset, tmp_path / "data")
    assert not (tmp_path / "data" / "train").exists()


def test_crowds_stay_crowds(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "white.png")
    objects = {"bbox": [[1.0, 1.0, 2.0, 2.0], [4.0, 4.0, 3.0, 3.0]], "category": ["RBC", "RBC"], "iscrowd": [0, 1]}
    rows = {"image": [str(tmp_path / "white.png")], "objects": [objects]}
    write_image_folder(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()), tmp_path / "data")
    (row,) = load_folder(tmp_path / "data", "train")["detection"]
    assert row["objects"]["iscrowd"] == [0, 1]
    line = tmp_path / "data" / "train" / "metadata.jsonl"
    line.write_text(line.read_text().replace("[0, 1]", "[1]"))
    with pytest.raises(DatasetError, match="'iscrowd' must have a 0 or 1 for each of 2 boxes"):
        load_folder(tmp_path / "data", "train")


def test_an_image_without_cells_has_empty_lists(find):
    from unihema import SmearResult

    row = object_columns(SmearResult(5, 6, [], ["RBC"]))
    assert row["objects"] == {"id": [], "bbox": [], "area": [], "score": [], "category": []}
    stored = datasets.Dataset.from_list([row], features=object_features(["RBC"]))
    assert stored[0] == row


def test_the_code_of_the_page_runs(page):
    names = page("Data sets of the Hub")
    assert len(names["found"]) == 2
