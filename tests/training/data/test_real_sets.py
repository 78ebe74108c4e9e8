"""The real sets: what each annotates, so that nothing else is background in its images; skipped without the data."""

import pytest

from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.augmentation import AugmentationConfig
from unihema.training.data.class_tree import known_parents
from unihema.training.data.dataset import SmearDataset
from unihema.training.run.build import load_rows
from unihema.training.run.config import DataConfig


STAGES = ["ring", "trophozoite", "schizont", "gametocyte"]
TYPES = ["neutrophil", "eosinophil", "basophil", "lymphocyte", "monocyte"]
CLASSES = ["RBC", "WBC", "Platelets", *TYPES, "ig", *STAGES]


@pytest.fixture(scope="module")
def labels_of(data_dir):
    """Labels of one image of a set as in training, its classes by name where they are masks."""
    processor = UniHemaProcessor.from_default(detection={"longest_edge": 320})
    processor.default_prompts["detection"] = ", ".join(CLASSES)

    def labels(name, file_name=None, **settings):
        config = DataConfig(folders=[str(data_dir / name)], tasks=["detection"], **settings)
        # The smaller split; its files list the same classes.
        rows = load_rows(config, "val")["detection"]
        chosen = [row for row in rows if file_name in (None, row["file_name"])][:1]
        data = SmearDataset(
            chosen,
            processor,
            "detection",
            AugmentationConfig.none(),
            class_names=CLASSES,
            label_parents=known_parents(CLASSES),
            cell_masks=True,
        )
        (found,) = data.collate([data[0]])["labels"]
        for key in ("annotated_classes", "exact_classes"):
            if key in found:
                found[key] = {one for one, true in zip(CLASSES, found[key].tolist(), strict=True) if true}
        return rows, found

    return labels


def test_white_cells_and_platelets_are_no_background_of_malaria_fields(labels_of):
    rows, found = labels_of("iml_malaria", exact_classes={"iml_malaria": ["RBC"]})
    assert found["annotated_classes"] == {"RBC", *STAGES} and found["exact_classes"] == {"RBC"}
    crowded = next(row["file_name"] for row in rows if any(row["objects"]["iscrowd"]))
    _, found = labels_of("iml_malaria", crowded)
    # A difficult cell is ignored once for each of the five classes.
    assert len(found["ignored_boxes"]) % 5 == 0 and {*found["ignored_classes"].tolist()} == {
        CLASSES.index(name) for name in ("RBC", *STAGES)
    }
    assert not found["iscrowd"].any()


def test_types_alone_cover_white_cells_and_nothing_else(labels_of):
    assert labels_of("wbc5")[1]["annotated_classes"] == {"WBC", *TYPES}


def test_masks_of_red_cells_say_nothing_of_platelets(labels_of):
    _, found = labels_of("rbc_instances")
    assert found["annotated_classes"] == {"RBC", "WBC"}
    assert found["masks"].shape[0] == len(found["class_labels"]) > 50


def test_types_where_known(labels_of):
    _, found = labels_of("bionet")
    assert found["annotated_classes"] == {
        "RBC",
        "WBC",
        "Platelets",
        "neutrophil",
        "eosinophil",
        "lymphocyte",
        "monocyte",
    }
    _, found = labels_of("cbc", absent_classes={"cbc": STAGES})
    assert found["annotated_classes"] == {"RBC", "WBC", "Platelets", *STAGES}
