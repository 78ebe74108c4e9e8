"""Data sets of Hugging Face `datasets`: cells as the column `objects` of the Hub's object-detection data sets, and such data
sets as data folders to train on."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from unihema.analyzer import Analyzer
from unihema.errors import DatasetError, FileThereError, UnreadableImageError
from unihema.files import shortened, whole_folder, write_text
from unihema.processing_unihema.image_io import image_size
from unihema.results.smear_result import SmearResult


def object_features(classes: Sequence[str]) -> datasets.Features:
    """The columns that [`FindObjects`] adds: `width`, `height`, and `objects` with the lists `id`, `bbox` (x, y, width, height in
    pixels), `category`, `area` (of the mask where there is one) and `score`.

    Args:
        classes (`Sequence[str]`): Names of the categories.
    """
    number, whole = datasets.Value("float64"), datasets.Value("int64")
    objects = {
        "id": whole,
        "bbox": datasets.List(number, length=4),
        "category": datasets.ClassLabel(names=list(classes)),
    }
    objects |= {"area": number, "score": number}
    return datasets.Features(
        {"width": whole, "height": whole, "objects": {name: datasets.List(kind) for name, kind in objects.items()}}
    )


def object_columns(result: SmearResult) -> dict[str, Any]:
    """A result as a row of `object_features(result.classes)`."""
    coco = result.to_coco()
    names = {category["id"]: category["name"] for category in coco["categories"]}
    objects = {
        name: [annotation[key] for annotation in coco["annotations"]]
        for name, key in {"id": "cell_id", "bbox": "bbox", "area": "area", "score": "score"}.items()
    }
    objects["category"] = [names[annotation["category_id"]] for annotation in coco["annotations"]]
    return {"width": result.width, "height": result.height, "objects": objects}


class FindObjects:
    """Finds the cells of a data set's images, for its `map` with `batched=True`.

    `datasets` knows it again by checkpoint, weights and options: what was found before is taken from its cache, and its
    processes (`num_proc`) load the checkpoint themselves.

    Args:
        checkpoint (`str` or `Path`): As of [`Analyzer.from_pretrained`].
        device (`str`): As there.
        image (`str`): Column of the images.
        **asked: `prompt`, `threshold`, `tiles` and others of [`Analyzer.analyze_images`].

    Example:

    ```python
    >>> import datasets
    >>> from unihema.plugs.hub_datasets import FindObjects

    >>> smears = datasets.load_dataset("imagefolder", data_dir="smears", split="train")
    >>> find = FindObjects("unihema")
    >>> found = smears.map(find, batched=True, batch_size=8, features=find.features(smears.features))
    >>> found.push_to_hub("lab/smears-with-cells")
    ```
    """

    def __init__(self, checkpoint: str | Path, device: str = "auto", image: str = "image", **asked: Any):
        self.checkpoint, self.device, self.image, self.asked = str(checkpoint), device, image, asked
        self.analyzer = Analyzer.from_pretrained(checkpoint, device=device)

    @property
    def classes(self) -> list[str]:
        """Names of the categories."""
        return list(self.analyzer.model.config.class_names)

    def features(self, features: datasets.Features) -> datasets.Features:
        """The features of the data set that `map` gives.

        Args:
            features (`datasets.Features`): Those of the data set that it takes.
        """
        return datasets.Features({**features, **object_features(self.classes)})

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """The new columns of a batch."""
        results = self.analyzer.analyze_images(batch[self.image], "detection", **self.asked)
        rows = [object_columns(result) for result in results]
        return {name: [row[name] for row in rows] for name in ("width", "height", "objects")}

    def __getstate__(self) -> dict[str, Any]:
        state = {name: vars(self)[name] for name in ("checkpoint", "device", "image", "asked")}
        return state | {"weights": self.analyzer.weights_sha256()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["checkpoint"], state["device"], state["image"], **state["asked"])  # type: ignore[misc]


def write_image_folder(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    folder: str | Path,
    split: str = "train",
    classes: Sequence[str] | None = None,
) -> Path:
    """Writes an object-detection data set of the Hub as a data folder that `unihema train` and `unihema data` read.

    Args:
        dataset (`Dataset` or `IterableDataset`): With `image`, and `objects` with `bbox` (x, y, width, height in pixels) and
            `category`.
        folder (`str` or `Path`): The data folder; made when missing, for several splits.
        split (`str`): Name of the split there.
        classes (`Sequence[str]`, *optional*): Names of the categories, where they are numbers without names.

    Returns:
        `Path`: The folder of the split.

    Raises:
        FileThereError: The split is there already.
        DatasetError: The data set has no such columns, or a row cannot be used.
    """
    target = Path(folder) / split
    if target.exists():
        raise FileThereError(f"{target} is there already. Delete it, or name another split.")
    if not {"image", "objects"} <= set(dataset.column_names or ()):
        raise DatasetError(f"The data set has the columns {dataset.column_names}, and needs image and objects.")
    classes = classes or (_names_of(dataset.features) if dataset.features else None)
    # As the files are: decoded and written again, a JPEG would be another image.
    stored = dataset.select_columns(["image", "objects"]).cast_column("image", datasets.Image(decode=False))
    with whole_folder(target) as whole:
        write_text(whole / "metadata.jsonl", _lines(stored, whole, classes))
    return target


def _names_of(features: datasets.Features) -> Sequence[str] | None:
    # Lists in a dictionary, or a list of dictionaries.
    objects = features["objects"]
    objects = getattr(objects, "feature", objects)
    category = objects.get("category") if isinstance(objects, dict) else None
    return getattr(getattr(category, "feature", category), "names", None)


def _lines(rows: Any, target: Path, classes: Sequence[str] | None) -> Iterator[str]:
    for number, row in zip(count(), rows):
        where = f"row {number} of the data set"
        content = _content(row["image"], where)
        try:
            image_size(content)
            kind = Image.open(io.BytesIO(content)).format
        except UnreadableImageError as error:
            raise DatasetError(f"{where}: its image cannot be read ({shortened(error)}).") from error
        file = target / f"{number:06d}.{str(kind).lower()}"
        file.write_bytes(content)
        objects = _objects(row["objects"], where)
        described = {
            "bbox": [list(box) if isinstance(box, Sequence) else box for box in objects["bbox"]],
            "category_name": [_name(category, classes, where) for category in objects["category"]],
        }
        if objects.get("iscrowd"):
            described["iscrowd"] = list(objects["iscrowd"])
        yield json.dumps({"file_name": file.name, "objects": described}, ensure_ascii=False) + "\n"


def _content(image: Any, where: str) -> bytes:
    """The file of an image."""
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image["bytes"]
    path = image.get("path") if isinstance(image, dict) else None
    if path is None:
        raise DatasetError(f"{where}: it has no image. Leave such rows out: `dataset.filter(...)`.")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DatasetError(
            f"{where}: its image {shortened(path)} cannot be read ({shortened(error.strerror)})."
        ) from error


def _objects(objects: Any, where: str) -> Mapping[str, Sequence[Any]]:
    """The cells of an image, as lists."""
    if isinstance(objects, list) and all(isinstance(each, dict) for each in objects):
        names = {name for each in objects for name in each} if objects else {"bbox", "category"}
        objects = {name: [each.get(name) for each in objects] for name in names}
    for name in ("bbox", "category"):
        if not isinstance(objects, dict) or not isinstance(objects.get(name), list):
            # Nothing is not the same as no cells.
            raise DatasetError(f"{where}: its objects have no list {name!r}; an image without cells has empty ones.")
    return objects


def _name(category: Any, classes: Sequence[str] | None, where: str) -> str:
    if isinstance(category, str):
        return category
    if not isinstance(category, int) or not 0 <= category < len(classes or ()):
        raise DatasetError(f"{where}: category {shortened(repr(category), 60)} has no name; give `classes`.")
    return (classes or ())[category]


__all__ = ["FindObjects", "object_columns", "object_features", "write_image_folder"]
