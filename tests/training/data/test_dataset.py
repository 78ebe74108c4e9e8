"""Data sets: samples and batches as the model takes them, made by the real processor."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from unihema.errors import DatasetError
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.augmentation import AugmentationConfig
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.image_cache import ImageCache
from unihema.training.data.layouts.masks import read_mask
from unihema.training.data.mixing import MixedSmears, TaskMixer


CLASSES = ["RBC", "WBC", "Platelets"]
MORPHOLOGY = {"vacuoles": ["absent", "prominent"], "basophilia": ["slight", "moderate"]}


@pytest.fixture(scope="module")
def processor():
    size = {"longest_edge": 96}
    built = UniHemaProcessor.from_default(detection=size, segmentation=size, question_answering=size)
    built.default_prompts["detection"] = ", ".join(CLASSES)
    return built


def picture(index=0, size=(96, 72)):
    pixels = np.full((size[1], size[0], 3), 210, np.uint8)
    pixels[10:30, 20:50] = 60 + index
    return Image.fromarray(pixels)


def detection_row(index=0, annotated=None, morphology=({"vacuoles": "prominent"}, {}), **objects):
    cells = {"bbox": [[20, 10, 30, 20], [60, 40, 12, 16]], "category": ["WBC", "RBC"], "morphology": list(morphology)}
    return {
        "image": picture(index),
        "file_name": f"{index}.png",
        "dataset": "made",
        "task": "detection",
        "objects": cells | objects,
        "annotated_classes": annotated,
        "size": (96, 72),
    }


def question_rows(images=2, questions=3):
    return [
        {
            "image": picture,
            "file_name": f"{number}.png",
            "dataset": "made",
            "task": "question_answering",
            "question": f"Are there {question} cells?",
            "answer": f"{number} {question}",
        }
        for number, picture in enumerate(picture(i) for i in range(images))
        for question in range(questions)
    ]


def test_detection_batch(processor):
    rows = [detection_row(0), detection_row(1, annotated=["RBC", "WBC"])]
    names = {"class_names": CLASSES, "morphology": MORPHOLOGY}
    data = SmearDataset(rows, processor, "detection", **names, evaluation=True, name_classes=True)
    batch = data.collate([data[0], data[1]])
    assert batch["task"] == "detection"
    assert batch["pixel_values"].shape == (2, 3, 96, 96)
    first, second = batch["labels"]
    assert first["class_labels"].tolist() == [1, 0]
    torch.testing.assert_close(first["boxes"][0], torch.tensor([35 / 96, 20 / 72, 30 / 96, 20 / 72]))
    assert first["morphology"].tolist() == [[1, -100], [-100, -100]]
    assert "annotated_classes" not in first
    assert second["annotated_classes"].tolist() == [True, True, False]
    assert batch["target_sizes"].tolist() == [[72, 96], [72, 96]]
    assert batch["file_names"] == ["0.png", "1.png"]
    prompts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert "Platelets" in prompts[0] and "Platelets" not in prompts[1]


def test_evaluation_asks_what_a_user_asks_without_a_prompt(processor):
    rows = [detection_row(0), detection_row(1, annotated=["RBC", "WBC"])]
    data = SmearDataset(rows, processor, "detection", class_names=CLASSES, evaluation=True)
    batch = data.collate([data[0], data[1]])
    plain = processor(images=[rows[0]["image"]] * 2, task="detection")
    torch.testing.assert_close(batch["input_ids"], plain["input_ids"], rtol=0, atol=0)


def test_half_of_the_training_images_are_asked_for_what_a_user_asks_without_a_prompt(processor):
    data = SmearDataset([detection_row(annotated=["RBC", "WBC"])], processor, "detection", class_names=CLASSES, seed=2)
    asked, annotated = [], []
    for epoch in range(60):
        batch = data.collate([data[0, epoch]])
        # A batch with the processor's own prompt needs no text.
        asked.append(batch.get("input_ids") is None or "Platelets" in processor.tokenizer.decode(batch["input_ids"][0]))
        annotated.append(batch["labels"][0]["annotated_classes"].tolist())
    assert 15 < sum(asked) < 45
    # What is no target and no background stays so, whatever is asked.
    assert annotated == [[True, True, False]] * 60


def test_crowds_are_no_targets_in_training(processor):
    rows = [detection_row(iscrowd=[1, 0])]
    training = SmearDataset(rows, processor, "detection", class_names=CLASSES)
    evaluation = SmearDataset(rows, processor, "detection", class_names=CLASSES, evaluation=True)
    assert training.collate([training[0]])["labels"][0]["class_labels"].tolist() == [0]
    assert evaluation.collate([evaluation[0]])["labels"][0]["iscrowd"].tolist() == [1, 0]


def test_sides_are_padded_to_what_is_asked(processor):
    data = SmearDataset([detection_row()], processor, "detection", class_names=CLASSES, pad_multiple=128)
    batch, plain = data.collate([data[0]]), SmearDataset([detection_row()], processor, "detection", class_names=CLASSES)
    assert batch["pixel_values"].shape == (1, 3, 128, 128) and int(batch["pixel_mask"].sum()) == 96 * 72
    torch.testing.assert_close(batch["labels"], plain.collate([plain[0]])["labels"], rtol=0, atol=0)


def test_segmentation_batch(processor):
    mask = np.zeros((72, 96), np.uint8)
    mask[10:30, 20:50] = 2
    row = {"image": picture(), "file_name": "a", "dataset": "d", "task": "segmentation", "mask": mask, "prompt": None}
    data = SmearDataset([row], processor, "segmentation", augmentation=AugmentationConfig.none())
    batch = data.collate([data[0]])
    labels = batch["labels"][0]
    assert labels.shape == (96, 96)
    assert set(labels[:72].unique().tolist()) == {0, 1} and (labels[72:] == -100).all()
    assert int((labels == 1).sum()) == 20 * 30


def test_single_cell_batch(processor):
    row = {"image": picture(), "file_name": "a", "dataset": "d", "task": "single_cell", "label": "monocyte"}
    data = SmearDataset([row], processor, "single_cell", single_cell_labels=["basophil", "monocyte"])
    batch = data.collate([data[0]])
    assert batch["labels"].tolist() == [1] and batch["labels"].dtype == torch.int64
    assert "input_ids" not in batch


def test_questions_are_grouped_by_image(processor):
    data = SmearDataset(question_rows(2, 3), processor, "question_answering", questions_per_image=2)
    assert len(data) == 2
    sample = data[0]
    assert len(set(sample["texts"])) == 2 and all(answer.startswith("0 ") for answer in sample["answers"])
    batch = data.collate([data[0], data[1]])
    assert batch["pixel_values"].shape[0] == 2
    assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == 4
    assert (batch["labels"] == -100).any() or batch["labels"].shape[1] > 1
    seen = {text for epoch in range(12) for text in data[0, epoch]["texts"]}
    assert len(seen) == 3


def test_evaluation_asks_every_question_once(processor):
    data = SmearDataset(question_rows(2, 3), processor, "question_answering", questions_per_image=2, evaluation=True)
    assert len(data) == 4
    batch = data.collate([data[index] for index in range(4)])
    asked = [index for index in batch["row_indices"] if index >= 0]
    assert sorted(asked) == list(range(6))
    assert len(batch["row_indices"]) == len(batch["answers"]) == batch["input_ids"].shape[0] == 8
    for index, text, answer in zip(batch["row_indices"], batch["texts"], batch["answers"]):
        if index >= 0:
            assert data.rows[index]["question"] == text and data.rows[index]["answer"] == answer


def test_views_depend_on_epoch_and_index_not_on_order(processor):
    rows = [detection_row(index) for index in range(3)]
    data = SmearDataset(rows, processor, "detection", AugmentationConfig(), class_names=CLASSES, seed=5)
    forward = [data[index, 1]["image"] for index in (0, 1, 2)]
    backward = [data[index, 1]["image"] for index in (2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward))
    data.set_epoch(1)
    assert torch.equal(data[0]["image"], forward[0])
    other = data[0, 2]["image"]
    assert other.shape != forward[0].shape or not torch.equal(other, forward[0])


def test_a_data_set_has_views_of_its_own(processor):
    """Whose classes go with its colours, it keeps them; the others' change as ever."""
    rows = [detection_row(0), detection_row(0) | {"dataset": "stained"}]
    stay = AugmentationConfig.none()
    data = SmearDataset(
        rows, processor, "detection", AugmentationConfig(), class_names=CLASSES, augmentation_of={"stained": stay}
    )
    alone = SmearDataset(rows, processor, "detection", AugmentationConfig(), class_names=CLASSES)
    still = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1)
    for epoch in range(3):
        torch.testing.assert_close(data[0, epoch]["image"], alone[0, epoch]["image"])
        assert not torch.equal(alone[1, epoch]["image"], still) and torch.equal(data[1, epoch]["image"], still)


def test_a_batch_is_seen_at_a_scale_of_its_own(processor):
    rows = [detection_row(index) for index in range(2)]
    plain = AugmentationConfig.none()
    scaled = dataclasses.replace(plain, scale=1.0)
    batches = {}
    for name, config in (("plain", plain), ("scaled", scaled)):
        data = SmearDataset(rows, processor, "detection", config, class_names=CLASSES, seed=5)
        batches[name] = [data.collate([data[0, epoch], data[1, epoch]]) for epoch in range(12)]
    widths = [int(batch["pixel_mask"][0, 0].sum()) for batch in batches["scaled"]]
    assert 48 <= min(widths) < 80 < 112 < max(widths) <= 192
    assert {int(batch["pixel_mask"][0, 0].sum()) for batch in batches["plain"]} == {96}
    for scaled, plain in zip(batches["scaled"], batches["plain"]):
        # All images of a batch alike; boxes are parts of the image.
        assert torch.equal(scaled["pixel_mask"][0], scaled["pixel_mask"][1])
        torch.testing.assert_close(scaled["labels"][1]["boxes"], plain["labels"][1]["boxes"], atol=0.02, rtol=0)


def test_cache_gives_the_same_and_stays_untouched(processor, tmp_path):
    path = tmp_path / "a.png"
    picture().save(path)
    rows = [detection_row() | {"image": str(path)}]
    plain = SmearDataset(rows, processor, "detection", AugmentationConfig(), class_names=CLASSES)
    names = {"class_names": CLASSES, "cache": ImageCache(tmp_path / "cache", 1e9)}
    cached = SmearDataset(rows, processor, "detection", AugmentationConfig(), **names)
    for epoch in range(4):
        cached.collate([cached[0, epoch]])
        assert torch.equal(plain[0, epoch]["image"], cached[0, epoch]["image"])


def test_mixed_loader(processor):
    rows = [detection_row(index) for index in range(3)]
    datasets = {
        "detection": SmearDataset(rows, processor, "detection", AugmentationConfig(), class_names=CLASSES),
        "question_answering": SmearDataset(question_rows(), processor, "question_answering"),
    }
    mixer = TaskMixer({task: len(data) for task, data in datasets.items()}, 2)
    mixed = MixedSmears(datasets)
    loader = torch.utils.data.DataLoader(mixed, batch_sampler=mixer, collate_fn=mixed.collate)
    assert [batch["task"] for batch in loader] == mixer.schedule(0)


def test_image_and_truth_of_different_shape(processor):
    row = detection_row() | {"size": (200, 200)}
    data = SmearDataset([row], processor, "detection", class_names=CLASSES)
    with pytest.raises(DatasetError, match=r"0\.png has 96x72 pixels, but its boxes are for 200x200"):
        data[0]
    mask = np.ones((50, 50), np.uint8)
    row = {"image": picture(), "file_name": "a.png", "dataset": "d", "task": "segmentation", "mask": mask}
    with pytest.raises(DatasetError, match=r"a\.png has 96x72 pixels, but its mask 50x50"):
        SmearDataset([row], processor, "segmentation")[0]


def test_image_reduced_on_opening_keeps_its_boxes(processor):
    row = detection_row(bbox=[[40, 20, 60, 40], [120, 80, 24, 32]]) | {"size": (192, 144)}
    data = SmearDataset([row], processor, "detection", class_names=CLASSES)
    assert data[0]["annotations"]["annotations"][0]["bbox"] == [20.0, 10.0, 30.0, 20.0]


def test_data_sets_that_cannot_be(processor):
    with pytest.raises(DatasetError, match="No rows for detection"):
        SmearDataset([], processor, "detection", class_names=CLASSES)
    with pytest.raises(DatasetError, match="Detection needs class_names"):
        SmearDataset([detection_row()], processor, "detection")
    with pytest.raises(DatasetError, match="Single cells need single_cell_labels"):
        row = {"image": picture(), "file_name": "a", "task": "single_cell", "label": "x"}
        SmearDataset([row], processor, "single_cell")
    with pytest.raises(DatasetError, match="one task a data set"):
        SmearDataset([detection_row()], processor, "cloze")
    with pytest.raises(DatasetError, match="unknown class 'WBC'"):
        SmearDataset([detection_row()], processor, "detection", class_names=["RBC"])
    with pytest.raises(ValueError, match="questions_per_image=0"):
        SmearDataset(question_rows(), processor, "question_answering", questions_per_image=0)


def test_masks_of_every_kind(tmp_path):
    grey = np.array([[0, 1], [255, 0]], np.uint8)
    assert read_mask(grey).tolist() == [[0, 1], [1, 0]]
    rgba = np.dstack([grey, grey * 0, grey * 0, np.full_like(grey, 255)])
    assert read_mask(Image.fromarray(rgba)).tolist() == [[0, 1], [1, 0]]
    Image.fromarray(grey > 0).save(tmp_path / "bits.png")
    assert read_mask(str(tmp_path / "bits.png")).tolist() == [[0, 1], [1, 0]]
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png: not a readable mask"):
        read_mask(str(tmp_path / "broken.png"))


def discs(size=(96, 72)):
    """Two discs as compressed runs and as a polygon, and what the model is to learn of them: the discs."""
    from faster_coco_eval.core import mask as coco_mask

    y, x = np.ogrid[: size[1], : size[0]]
    round_one = (x - 34.5) ** 2 + (y - 19.5) ** 2 < 9.5**2
    packed = coco_mask.encode(np.asfortranarray(round_one.astype(np.uint8)))
    compressed = {"size": [size[1], size[0]], "counts": packed["counts"].decode()}
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    polygon = np.stack((66 + 6 * np.cos(angles), 48 + 8 * np.sin(angles)), 1).flatten().tolist()
    return [compressed, [polygon]], [[25, 10, 20, 20], [60, 40, 12, 16]]


@pytest.mark.parametrize("seed", range(4))
def test_masks_of_cells_follow_every_view(processor, seed):
    outlines, boxes = discs()
    row = detection_row(segmentation=outlines)
    row["objects"]["bbox"] = boxes
    views = dataclasses.replace(AugmentationConfig.for_task("detection"), zoom=1.0, flip=0.5, transpose=0.5)
    data = SmearDataset([row], processor, "detection", views, class_names=CLASSES, seed=seed, cell_masks=True)
    (labels,) = data.collate([data[0]])["labels"]
    assert labels["masks"].dtype == torch.uint8 and labels["masks"].shape == (len(labels["boxes"]), 32, 32)
    plain = SmearDataset([row], processor, "detection", class_names=CLASSES, cell_masks=True)
    (still,) = plain.collate([plain[0]])["labels"]
    # Shares of their boxes, and the box 1/1.25^2 of what is sampled.
    shares = [np.pi * 9.5**2 / 20**2 / 1.25**2, np.pi / 4 / 1.25**2]
    assert (still["masks"] == 1).float().mean((1, 2)).tolist() == pytest.approx(shares, abs=0.02)
    for box, samples in zip(labels["boxes"], labels["masks"], strict=True):
        # Symmetric where the whole cell is seen.
        if box.tolist()[0] > 0.2 and 0.2 < box.tolist()[1] < 0.8 and abs(box[2] * 4 / (box[3] * 3) - 1) < 0.1:
            assert ((samples == 1) == (samples == 1).flip(1)).float().mean() > 0.85


def test_cells_without_a_mask_are_not_known_and_rows_without_masks_say_nothing(processor):
    (compressed, _), boxes = discs()
    rows = [detection_row(segmentation=[compressed, None]), detection_row(1)]
    rows[0]["objects"]["bbox"] = boxes
    data = SmearDataset(rows, processor, "detection", class_names=CLASSES, cell_masks=True)
    first, second = data.collate([data[0], data[1]])["labels"]
    assert (first["masks"][1] == 255).all() and (first["masks"][0] == 1).any()
    assert "masks" not in second
    without = SmearDataset(rows, processor, "detection", class_names=CLASSES)
    assert "masks" not in without.collate([without[0]])["labels"][0]
    wrong = detection_row(segmentation=[{"size": [5, 5], "counts": "0"}, None])
    with pytest.raises(DatasetError, match="0.png: mask 0: A mask of"):
        SmearDataset([wrong], processor, "detection", class_names=CLASSES, cell_masks=True)[0]


def test_what_a_window_leaves_of_a_cell_or_a_crowd_is_no_background(processor):
    config = AugmentationConfig.none()
    config.zoom, config.zoom_min, config.min_visible = 1.0, 0.5, 0.5
    row = detection_row(bbox=[[0, 0, 90, 70], [60, 40, 12, 16]], iscrowd=[1, 0])
    data = SmearDataset([row], processor, "detection", class_names=CLASSES, augmentation=config)
    seen = [data[0, view] for view in range(40)]
    # The crowd is in every window, and never lost; the cell is a target, cut off, or not there.
    assert all(any(CLASSES[name] == "WBC" for _, name in view["ignored"]) for view in seen)
    cut = [view for view in seen if any(CLASSES[name] == "RBC" for _, name in view["ignored"])]
    assert cut and all(not view["annotations"]["annotations"] for view in cut)
    assert any(view["annotations"]["annotations"] for view in seen)
