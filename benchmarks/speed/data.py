"""How many training images one processor core makes ready, and what a batch weighs on its way to the model."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.gpu import Scale, folder_of_painted_fields
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.augmentation import AugmentationConfig
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.image_cache import ImageCache
from unihema.training.data.readers import load_folder
from unihema.training.run.batches import RunBatches
from unihema.training.run.config import DataConfig


# Height and width of the fields, and how many of them there are.
FIELDS = (((480, 640), 48), ((960, 1280), 32), ((3000, 4000), 16))
EDGE, BATCH, NAME = 640, 16, "RBC"


def measure(rounds: int) -> list[dict[str, Any]]:
    """Rows of the table: batches of detection at 640 pixels with the default views, in one thread, without and with kept images.

    Args:
        rounds (`int`): Passes over the fields.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for size, number in FIELDS:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                painted = folder_of_painted_fields(folder / "fields", Scale(fields=number, field_size=size), [NAME])
                fields = load_folder(painted, "train")["detection"]
                for kept, cache in (("decoded each time", None), ("kept", ImageCache(folder / "cache", 4e9))):
                    rows.append({"field": size, "images": kept, **_pace(fields, cache, rounds)})
    finally:
        torch.set_num_threads(threads)
    return rows


def _pace(fields: list[dict], cache: ImageCache | None, rounds: int) -> dict[str, float]:
    processor = UniHemaProcessor.from_default(detection={"longest_edge": EDGE})
    views = AugmentationConfig.for_task("detection")
    data = SmearDataset(fields, processor, "detection", views, class_names=[NAME], cache=cache, pixels_as_bytes=True)
    batches = RunBatches({"detection": data}, DataConfig(batch_size={"detection": BATCH}, workers=0), seed=0)
    stream = batches.stream()
    # The first pass fills the cache.
    batch = [next(stream) for _ in range(batches.per_epoch)][0][1]
    begun = time.process_time()
    images = sum(len(next(stream)[1]["file_names"]) for _ in range(rounds * batches.per_epoch))
    seconds = time.process_time() - begun
    weight = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)) / len(batch["file_names"])
    return {"ms": 1e3 * seconds / images, "images a second and core": images / seconds, "MB an image": weight / 1e6}
