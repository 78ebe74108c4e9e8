"""Small data folders that tests write."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter


def photograph(seed: int, size: tuple[int, int] = (96, 72)) -> np.ndarray:
    """Pixels that no other seed gives: smooth noise, uint8 `[H, W, 3]`."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(size[1], size[0], 3)), (2, 2, 0))
    return (128 + 60 * noise / noise.std()).clip(0, 255).astype(np.uint8)


def write_photograph(path: Path, seed: int = 0, size: tuple[int, int] = (96, 72)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(seed, size)).save(path)
    return path


def write_mask(path: Path, size: tuple[int, int] = (96, 72)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(path)
    return path


def write_lines(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_coco(path: Path, images: dict[str, list[list[float]]], size=(96, 72), **more: dict) -> Path:
    """A COCO file: file name -> boxes of red cells; `more` has further fields of an image by its stem."""
    entries, annotations = [], []
    for number, (name, boxes) in enumerate(images.items()):
        extra = more.get(Path(name).stem, {})
        entries.append({"id": number, "file_name": name, "width": size[0], "height": size[1], **extra})
        annotations += [{"image_id": number, "category_id": 0, "bbox": box} for box in boxes]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number
    content = {"images": entries, "annotations": annotations, "categories": [{"id": 0, "name": "RBC"}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_voc(path: Path, file_name: str | None, *objects: tuple[str, tuple[float, float, float, float]]) -> Path:
    """A VOC file: an object a line from line 3 on, (class, corners)."""
    lines = ["<annotation>", f"<filename>{file_name}</filename>" if file_name else "<filename/>"]
    for name, corners in objects:
        box = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners))
        lines.append(f"<object><name>{name}</name><bndbox>{box}</bndbox></object>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</annotation>"]), encoding="utf-8")
    return path
