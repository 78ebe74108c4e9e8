"""Eight real images are learned by heart, and what is answered about them hangs on the image (minutes; `slow`)."""

import json
import shutil

import pytest
import torch

from unihema.shipped import lay_down_checkpoint
from unihema.training.data.readers import load_folder
from unihema.training.evaluation import evaluate_model
from unihema.training.run.config import (
    AugmentationSettings,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimisationConfig,
    RunConfig,
)
from unihema.training.run.loop import train


pytestmark = pytest.mark.slow
IMAGES = 8


def by_heart(
    folder, output, task: str, steps: int, size: dict[str, int], model: ModelConfig | None = None, **data
) -> dict:
    """Trains on a folder whose train and val split are the same eight images; the report on them."""
    return train(
        RunConfig(
            output_dir=str(output),
            model=model or ModelConfig(),
            data=DataConfig(
                folders=[str(folder)],
                tasks=[task],
                image_sizes={task: size},
                batch_size={task: 4},
                workers=0,
                **data,
            ),
            optimisation=OptimisationConfig(
                max_steps=steps, epochs=10_000, learning_rate=4e-4, ema_decay=0.99, seed=0, warmup_steps=50
            ),
            augmentation=AugmentationSettings(enabled=False),
            logging=LoggingConfig(progress=False, checkpoint_minutes=None),
        )
    )


def first_images(source, folder):
    """A data folder of the first images of another, the same for training and validation."""
    truth = json.loads((source / "train.json").read_text())
    truth["images"] = truth["images"][:IMAGES]
    kept = {image["id"] for image in truth["images"]}
    truth["annotations"] = [cell for cell in truth["annotations"] if cell["image_id"] in kept]
    for image in truth["images"]:
        target = folder / "images" / image["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "images" / image["file_name"], target)
    for split in ("train", "val"):
        (folder / f"{split}.json").write_text(json.dumps(truth))
    return folder


def test_detection(data_dir, tmp_path):
    fields = first_images(data_dir / "cbc", tmp_path / "data")
    report = by_heart(fields, tmp_path / "run", "detection", 500, {"longest_edge": 320})
    assert report["detection"]["mAP50"] >= 0.95


def test_masks_of_cells(data_dir, tmp_path):
    """Every cell of eight crowded tiles has a mask of its own. The boxes are those of the shipped checkpoint to begin with."""
    tiles = first_images(data_dir / "rbc_instances", tmp_path / "data")
    initial = ModelConfig(initial_checkpoint=str(lay_down_checkpoint(tmp_path / "unihema")))
    report = by_heart(tiles, tmp_path / "run", "detection", 200, {"longest_edge": 448}, initial)
    assert report["detection"]["masks"]["cells"] > 600
    assert report["detection"]["masks"]["mAP50"] >= 0.95


def copy_metadata(source, target, count: int, keep=lambda record: True) -> list[dict]:
    """The first `count` records of an image folder, with their files, as both train and val."""
    lines = (source / "images" / "train" / "metadata.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if keep(record)][:count]
    for split in ("train", "val"):
        folder = target / "images" / split
        folder.mkdir(parents=True)
        for record in records:
            for name in (record["file_name"], record.get("mask_file_name")):
                if name:
                    (folder / name).parent.mkdir(exist_ok=True)
                    shutil.copy(source / "images" / "train" / name, folder / name)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_segmentation(data_dir, tmp_path):
    copy_metadata(data_dir / "bccd_wbc_seg", tmp_path / "data", IMAGES)
    report = by_heart(tmp_path / "data", tmp_path / "run", "segmentation", 300, {"longest_edge": 320})
    assert report["segmentation"]["dice"] >= 0.95


def test_answers_and_that_swapped_images_swap_them(data_dir, tmp_path):
    source, folder = data_dir / "pbc", tmp_path / "data"
    seen: set[str] = set()

    def varied(record: dict) -> bool:
        """Images that differ in class or texture, so that there is something to swap."""
        key = f"{record['label']} {record.get('nucleus_shape')}"
        new = record.get("nucleus_shape") is not None and key not in seen
        seen.add(key)
        return new

    names = [record["file_name"] for record in copy_metadata(source, folder, IMAGES, varied)]
    questions = [json.loads(line) for line in (source / "qa_train.jsonl").read_text().splitlines()]
    questions = [q for q in questions if q["image"].removeprefix("train/") in names]
    for split in ("train", "val"):
        lines = [json.dumps({**q, "image": q["image"].replace("train/", f"{split}/")}) + "\n" for q in questions]
        (folder / f"qa_{split}.jsonl").write_text("".join(lines))
    size = {"longest_edge": 128}
    report = by_heart(folder, tmp_path / "run", "question_answering", 500, size, questions_per_image=12)
    assert report["question_answering"]["exact_match"] == 1.0

    import unihema

    model = unihema.UniHemaForQA.from_pretrained(tmp_path / "run").eval()
    processor = unihema.UniHemaProcessor.from_pretrained(tmp_path / "run")
    rows = load_folder(folder, "train", tasks=["question_answering"])["question_answering"]
    asked = "What type of white blood cell is this?"
    answers = {row["image"]: row["answer"] for row in rows if row["question"] == asked}
    first = next(iter(answers))
    second = next(image for image, answer in answers.items() if answer != answers[first])

    def ask(images: list[str]) -> list[str]:
        with torch.inference_mode():
            return processor.decode_answers(model.generate(**processor(images=images, text=asked)))

    assert ask([first, second]) == [answers[first], answers[second]]
    assert ask([second, first]) == [answers[second], answers[first]]
    blind = evaluate_model(
        unihema.UniHemaForMultiTask.from_pretrained(tmp_path / "run"),
        processor,
        {"question_answering": rows},
        shuffle_images=True,
    )
    # Eight cells share many attribute values, so answers about another cell are often right too: 0.80 was measured.
    assert blind["question_answering"]["exact_match"] < 0.9
