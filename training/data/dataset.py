"""Schema rows of one task as a PyTorch data set, and their collation into batches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F

from unihema.errors import DatasetError, InputError
from unihema.modeling_unihema.cell_masks import MASKS, sampled_masks
from unihema.modeling_unihema.labels import IGNORED_BOXES, IGNORED_CLASSES
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS
from unihema.processing_unihema.image_io import MAX_PIXELS, image_size, load_image
from unihema.processing_unihema.masks import outline_mask
from unihema.training.data.augmentation import AugmentationConfig, augment, augmentation_rng, drawn_scale
from unihema.training.data.class_tree import as_known, with_covered_parents
from unihema.training.data.framing import framed
from unihema.training.data.image_cache import ImageCache
from unihema.training.data.layouts.masks import read_mask
from unihema.training.data.mosaic import GRIDS, Field, mosaic_of, share_seen
from unihema.training.data.rows import Row, check_rows, same_shape, witnesses
from unihema.training.data.shards import LazyRows, StoredFile, largest_group, one_cell_samples, readable, rows_by_sample


# An image of which no view needs more than this share of its sides is reduced once, before its views: large photographs take
# most of their time otherwise.
REDUCED_BELOW = 0.7
# Share of training images that are asked for all classes, although their data set annotates only some. `unihema predict`
# does so without a prompt, which would otherwise be new to a model of several data sets.
DEFAULT_PROMPT_SHARE = 0.5
# Least side of the window of a crop with attributes, as part of the crop's.
CLOSEST_CROP = 0.8
_TEXT_KEYS = {"question_answering": ("question", "answer"), "cloze": ("masked", "completed")}


class SmearDataset(Dataset):
    """Rows of one task.

    A sample of a language task is an image with `questions_per_image` of its questions, so that the image is encoded
    once for all of them. In training they are drawn anew for each view; in evaluation every question is asked once, and
    an image with fewer questions than others of its batch repeats its first under row index -1.

    Args:
        rows (`Sequence[Row]`): Rows of `task` (see rows.py). Another spelling of a listed class or label is taken for it.
            Rows that are not in memory (`LazyRows`) are read when a sample is asked for.
        processor (`UniHemaProcessor`): Makes model inputs; its `default_prompts` tell which prompts need no text.
        task (`str`): One of the five tasks.
        augmentation (`AugmentationConfig`, *optional*): Random views; images stay as they are when not given.
        augmentation_of (`Mapping[str, AugmentationConfig]`, *optional*): Data set -> the views of its images, where these
            differ. Mosaics and the scale of a batch are those of `augmentation`.
        class_names (`Sequence[str]`, *optional*): Detection classes in the order of the model's ids; needed for
            detection.
        single_cell_labels (`Sequence[str]`, *optional*): Single-cell classes in the model's order; needed for
            single_cell.
        morphology (`Mapping[str, Sequence[str]]`, *optional*): Attribute -> values, in the model's order.
        seed (`int`): Of views and drawn questions.
        questions_per_image (`int`): Questions of a language sample.
        evaluation (`bool`): No random views; batches have `target_sizes`, `file_names`, `row_indices` and raw texts.
        cache ([`ImageCache`], *optional*): Keeps decoded images that come from files of their own.
        text_only (`bool`): A language task without its images; they are not read.
        label_parents (`Mapping[str, str]`, *optional*): Class -> coarser class; in training, a set that annotates the kinds of
            a coarser class has annotated that class too, see `with_covered_parents`.
        name_classes (`bool`): In evaluation, ask detection for the classes that the row's data set annotates, instead of the
            processor's default prompt.
        pixels_as_bytes (`bool`): Batches have `pixel_values` in uint8, which [`UniHemaImageProcessor.normalise`] makes on the
            device what the model sees: a quarter of the memory on the way there.
        pad_multiple (`int`, *optional*): Padded sides are multiples of this, instead of the processor's own.
        cell_masks (`bool`): Detection labels have the masks of cells that rows state.

    Raises:
        DatasetError: No rows, rows of another task, or names that are not listed.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: Any,
        task: str,
        augmentation: AugmentationConfig | None = None,
        class_names: Sequence[str] | None = None,
        single_cell_labels: Sequence[str] | None = None,
        morphology: Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
        questions_per_image: int = 1,
        evaluation: bool = False,
        cache: ImageCache | None = None,
        text_only: bool = False,
        label_parents: Mapping[str, str] | None = None,
        name_classes: bool = False,
        pixels_as_bytes: bool = False,
        pad_multiple: int | None = None,
        cell_masks: bool = False,
        augmentation_of: Mapping[str, AugmentationConfig | None] | None = None,
    ):
        if not len(rows):
            raise DatasetError(f"No rows for {task}: check the folder and the split.")
        others = {row.get("task") for row in witnesses(rows)} - {task}
        if others:
            raise DatasetError(f"Rows of {', '.join(map(str, others))} in a data set for {task}: one task a data set.")
        if task == "detection" and not class_names:
            raise DatasetError("Detection needs class_names, in the order of the model's ids.")
        if task == "single_cell" and not single_cell_labels:
            raise DatasetError("Single cells need single_cell_labels, in the model's order.")
        if task in ("detection", "single_cell"):
            rows = as_known(rows, (class_names if task == "detection" else single_cell_labels) or ())
        check_rows(witnesses(rows), class_names, single_cell_labels, morphology)
        self.rows = rows if isinstance(rows, LazyRows) and not evaluation else list(rows)
        self.processor = processor
        self.task = task
        self.augmentation = None if evaluation else augmentation
        self.augmentation_of = dict(augmentation_of or {})
        self.class_names = list(class_names or ())
        self.single_cell_labels = list(single_cell_labels or ())
        self.morphology = {name: list(values) for name, values in (morphology or {}).items()}
        self.seed = seed
        self.evaluation = evaluation
        self.default_prompt_share = DEFAULT_PROMPT_SHARE if not evaluation else 0.0 if name_classes else 1.0
        self.epoch = 0
        self.cache = cache
        self.pixels_as_bytes = pixels_as_bytes
        self.pad_multiple = pad_multiple
        self.cell_masks = cell_masks
        self.text_only = text_only and task in LANGUAGE_TASKS
        self._groups = self._group_rows(questions_per_image)
        self.label_parents = dict(label_parents or {})
        self._taught = self._taught_classes()

    def _group_rows(self, questions_per_image: int) -> Sequence[Sequence[int]]:
        """Row indices of each sample: one, but for language tasks all of an image (in evaluation, a few at a time)."""
        groups = self.rows.groups if isinstance(self.rows, LazyRows) else rows_by_sample(self.rows)
        if self.task not in LANGUAGE_TASKS:
            self.questions_per_image = 1
            return groups
        if questions_per_image < 1:
            raise InputError(f"questions_per_image={questions_per_image} must be at least 1.")
        self.questions_per_image = count = min(questions_per_image, largest_group(groups))
        if not self.evaluation:
            return groups
        return [group[start : start + count] for group in groups for start in range(0, len(group), count)]

    @property
    def sources(self) -> list[tuple[str, list[Sequence[int]]]]:
        """For each data set its name and its blocks: numbers of samples that are read together (all, if in memory)."""
        if isinstance(self.rows, LazyRows):
            return self.rows.sources
        samples: dict[str, list[int]] = {}
        for number, group in enumerate(self._groups):
            samples.setdefault(self.rows[group[0]]["dataset"], []).append(number)
        return [(name, [numbers]) for name, numbers in samples.items()]

    @property
    def classes(self) -> np.ndarray | None:
        """The class of each sample, int64 `[samples]`; `None` where it has many, or rows are not in memory."""
        if self.task != "single_cell" or isinstance(self.rows, LazyRows):
            return None
        numbers = {name: number for number, name in enumerate(self.single_cell_labels)}
        return np.array([numbers[self.rows[group[0]]["label"]] for group in self._groups])

    @property
    def one_cell(self) -> np.ndarray:
        """Which samples are crops of one cell in detection, bool `[samples]`.

        They have the size of single cells, at which a cell is about as large as in a field at the size of detection. So
        they and fields do not share a batch.
        """
        return one_cell_samples(self.rows) if self.task == "detection" else np.zeros(len(self), dtype=bool)

    def _taught_classes(self) -> torch.Tensor | None:
        """Which classes some row annotates, bool `[classes]`; None for all."""
        if self.task != "detection" or any(row.get("annotated_classes") is None for row in witnesses(self.rows)):
            return None
        taught = {name for row in witnesses(self.rows) for name in row["annotated_classes"]}
        return torch.tensor([name in taught for name in self.class_names])

    def __len__(self) -> int:
        return len(self._groups)

    def set_epoch(self, epoch: int) -> None:
        """Draws other views and questions. Loaders with persistent workers pass the view in the index instead."""
        self.epoch = epoch

    def __getitem__(self, index: "int | tuple[int, int]") -> dict[str, Any]:
        """One sample.

        Args:
            index (`int` or `tuple[int, int]`): The sample, or the sample and which view of it, by default the epoch's.

        Raises:
            DatasetError: The image and its boxes or mask do not belong together.
            UnreadableImageError: The image cannot be read.
        """
        index, number = index if isinstance(index, tuple) else (index, self.epoch)
        rng = augmentation_rng(self.seed, number, index)
        indices = list(self._groups[index])
        if self.task in LANGUAGE_TASKS and not self.evaluation:
            # Every question once before any a second time.
            rounds = -(-self.questions_per_image // len(indices))
            drawn = np.concatenate([rng.permutation(indices) for _ in range(rounds)])
            indices = [int(drawn_index) for drawn_index in drawn[: self.questions_per_image]]
        row = self.rows[indices[0]]
        if self.text_only:
            return {
                "index": index,
                "row_indices": indices,
                "file_name": row["file_name"],
                **self._question_texts(indices),
            }
        image, (height, width) = self._image(row)
        sample: dict[str, Any] = {
            "index": index,
            "row_indices": indices,
            "file_name": row["file_name"],
            "original_size": (height, width),
        }
        boxes = mask = seams = None
        kept: Sequence[int] = ()
        cut: Sequence[int] = ()
        cut_boxes = None
        if self.task == "segmentation":
            mask = self._mask(row, width, height, tuple(image.shape[-2:]))
        elif self.task == "detection":
            field = self._field(row, image, (height, width))
            kept = range(len(field.boxes))
            if (grid := self._grid(row, rng)) is not None:
                field, seams = self._mosaic(field, grid, rng)
            row, image, boxes, mask = field.row, field.image, field.boxes, field.instances
        cell, edge = self._cell(row, width, height), None
        if cell is not None and self.augmentation is None:
            image = framed(image, None, cell=cell)
            sample["original_size"] = tuple(image.shape[-2:])
        if self.augmentation is not None:
            task, views = self._seen_as(row)
            if seams is not None:
                # Its windows were chosen already.
                views = replace(views, zoom=0)
            # Where the batch is to have a scale of its own, its size is not known here.
            reduce = partial(self.processor.image_processor.reduced, task=task) if not views.scale else None
            if self.task == "single_cell" and not views.scale:
                edge = self.processor.image_processor.task_sizes[task].get("longest_edge")
            view = augment(image, views, rng, boxes, mask, reduce, cell, edge)
            image, boxes, mask = view.image, view.boxes, view.mask
            kept, cut = (
                part.tolist() if seams is None else [seams[n] for n in part.tolist()] for part in (view.kept, view.cut)
            )
            cut_boxes = view.cut_boxes
            sample["scale"] = drawn_scale(self.augmentation, rng)
        sample["image"] = image
        if self.task == "detection":
            sample["annotations"], numbers, sample["ignored"] = self._annotations(row, boxes, kept, index)
            if cut_boxes is not None:
                names = [row["objects"]["category"][original] for original in cut]
                sample["ignored"] += [
                    (box, self.class_names.index(name)) for box, name in zip(cut_boxes.tolist(), names, strict=True)
                ]
            if mask is not None:
                sample["masks"] = self._cell_masks(row, mask, sample["annotations"]["annotations"], numbers)
            sample["annotated_classes"] = row.get("annotated_classes")
            sample["exact_classes"] = row.get("exact_classes")
            default = rng.random() < self.default_prompt_share
            sample["asked"] = None if default else sample["annotated_classes"] or self.class_names
            sample["one_cell"] = bool(row.get("from_attributes"))
        elif self.task == "segmentation":
            sample["mask"] = mask
            sample["prompt"] = row.get("prompt")
        elif self.task == "single_cell":
            sample["label"] = self.single_cell_labels.index(row["label"])
        else:
            sample |= self._question_texts(indices)
        return sample

    def _views_of(self, row: Row) -> AugmentationConfig:
        """The augmentation of a row. Crops with attributes are cut no closer than `CLOSEST_CROP`, or their cell could be lost,
        and keep their colours, which attributes are about."""
        views = self.augmentation_of.get(row["dataset"]) or self.augmentation
        if not row.get("from_attributes"):
            return views
        return replace(views, zoom_min=max(views.zoom_min, CLOSEST_CROP), colour=0, optics=0)

    def _grid(self, row: Row, rng: np.random.Generator) -> tuple[int, int] | None:
        """Rows and columns of the mosaic that a field becomes a part of; `None` where it stands alone."""
        if self.augmentation is None or row.get("from_attributes") or isinstance(self.rows, LazyRows):
            return None
        draws = rng.spawn(1)[0].random(2)
        return GRIDS[int(draws[1] * len(GRIDS))] if draws[0] < self.augmentation.mosaic else None

    def _mosaic(self, first: Field, grid: tuple[int, int], rng: np.random.Generator) -> tuple[Field, list[int]]:
        """A mosaic of a field and others that were annotated in the same way, and which cell each box is of."""
        rng = rng.spawn(1)[0]
        others = self._alike[_annotation_of(first.row)]
        chosen = [self.rows[int(number)] for number in rng.choice(others, grid[0] * grid[1] - 1)]
        fields = [first, *(self._field(row, *self._image(row)) for row in chosen)]
        rng.shuffle(fields)
        share = share_seen([len(field.boxes) for field in fields], grid, rng.random())
        whole = first.image.shape[-2:]
        scale = min(1.0, (1 + self.augmentation.scale) * self.processor.image_processor.scale(whole, self.task))
        size = max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale))
        return mosaic_of(fields, grid, share, size, rng, self.augmentation.min_visible)

    def _field(self, row: Row, image: torch.Tensor, opened: tuple[int, int]) -> Field:
        """A field in pixels of its image, which was opened with this height and width."""
        height, width = opened
        boxes = self._boxes(row, width, height)
        boxes *= torch.tensor([image.shape[-1] / width, image.shape[-2] / height]).repeat(2)
        has_masks = self.cell_masks and any(row["objects"].get("segmentation") or ())
        instances = self._instances(row, tuple(image.shape[-2:])) if has_masks else None
        return Field(row, image, boxes, instances)

    @cached_property
    def _alike(self) -> dict[Any, list[int]]:
        """Numbers of the fields that were annotated in the same way."""
        found: dict[Any, list[int]] = {}
        for number, row in enumerate(self.rows):
            if not row.get("from_attributes"):
                found.setdefault(_annotation_of(row), []).append(number)
        return found

    def _question_texts(self, indices: Sequence[int]) -> dict[str, list[str]]:
        asked, answered = _TEXT_KEYS[self.task]
        return {
            "texts": [self.rows[index][asked] for index in indices],
            "answers": [self.rows[index][answered] for index in indices],
        }

    def _image(self, row: Row) -> tuple[torch.Tensor, tuple[int, int]]:
        """The image uint8 `[3, h, w]`, reduced where no view needs all of it, and the height and width it was opened with."""
        source = row["image"]
        if self.cache is None or not isinstance(source, str) or isinstance(source, StoredFile):
            pixels, size = self._decoded(row)
        else:
            # All that the reduction hangs on.
            task, views = self._seen_as(row)
            sizes = self.processor.image_processor.task_sizes[task]
            rule = repr((sorted(sizes.items()), _closest(views), "box" in row))
            pixels, size = self.cache.load(source, rule, lambda: self._decoded(row))
        return torch.from_numpy(pixels), size

    def _decoded(self, row: Row) -> tuple[np.ndarray, tuple[int, int]]:
        source = row["image"]
        most, size = MAX_PIXELS, None
        recorded = row.get("size")
        small = recorded is not None and self._needed_share(row, recorded[::-1]) == 1
        if not small and not isinstance(source, StoredFile) and str(source).lower().endswith((".jpg", ".jpeg")):
            # JPEG decodes straight to a smaller size. What is averaged before the bits in use are known would look otherwise.
            size = image_size(source)
            share = self._needed_share(row, size)
            if share < 1:
                most = min(most, max(1, int(4 * share**2 * size[0] * size[1])))
        opened = load_image(readable(source), max_pixels=most)
        pixels = np.ascontiguousarray(np.asarray(opened).transpose(2, 0, 1))
        size = pixels.shape[-2:] if size is None or most == MAX_PIXELS else size
        share = self._needed_share(row, size)
        if share < 1:
            target = [max(1, round(side * share)) for side in size]
            pixels = F.resize(torch.from_numpy(pixels), target, antialias=True).contiguous().numpy()
        return pixels, (int(size[0]), int(size[1]))

    def _seen_as(self, row: Row) -> tuple[str, AugmentationConfig | None]:
        """The task by whose size the model sees an image, and its views."""
        task = "single_cell" if row.get("from_attributes") else self.task
        return task, None if self.augmentation is None else self._views_of(row)

    def _needed_share(self, row: Row, size: tuple[int, int]) -> float:
        """Share of an image's sides that its closest view needs; 1 where that is most of them, and without views."""
        task, views = self._seen_as(row)
        if views is None or "box" in row:
            return 1.0
        share = self.processor.image_processor.scale(size, task) * _closest(views)
        return share if share < REDUCED_BELOW else 1.0

    def _cell(self, row: Row, width: int, height: int) -> list[float] | None:
        """The box of the cell of a field that a row of single cells is of."""
        if "box" not in row:
            return None
        return self._scaled(row, torch.tensor([row["box"]], dtype=torch.float32), width, height)[0].tolist()

    def _boxes(self, row: Row, width: int, height: int) -> torch.Tensor:
        boxes = torch.tensor(row["objects"]["bbox"], dtype=torch.float32).reshape(-1, 4)
        return self._scaled(row, boxes, width, height)

    def _scaled(self, row: Row, boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
        recorded = row.get("size") or (width, height)
        if tuple(recorded) != (width, height):
            # Very large images are reduced on opening. Any other difference means that the boxes belong to another image.
            if not same_shape(recorded, (width, height)):
                raise DatasetError(
                    f"{row['dataset']}: {row['file_name']} has {width}x{height} pixels, but its boxes are for "
                    f"{recorded[0]}x{recorded[1]}. Export image and boxes together."
                )
            boxes = boxes * (width / recorded[0])
        return boxes

    def _mask(self, row: Row, width: int, height: int, kept: tuple[int, int]) -> torch.Tensor:
        mask = read_mask(row["mask"], row.get("mask_levels"))
        if mask.shape != kept:
            if not same_shape(mask.shape[::-1], (width, height)):
                raise DatasetError(
                    f"{row['dataset']}: {row['file_name']} has {width}x{height} pixels, but its mask "
                    f"{mask.shape[1]}x{mask.shape[0]}. They must show the same field."
                )
            mask = np.asarray(Image.fromarray(mask).resize(kept[::-1], Image.Resampling.NEAREST))
        return torch.from_numpy(np.array(mask))

    def _instances(self, row: Row, kept: tuple[int, int]) -> torch.Tensor:
        """An image of instances: the number of each cell, from 1, on the pixels of its mask. Of cells that overlap the smaller
        has the pixel."""
        width, height = row["size"]
        masks = []
        for number, outline in enumerate(row["objects"]["segmentation"]):
            if outline:
                try:
                    masks.append((number, *outline_mask(outline, (height, width))))
                except InputError as error:
                    raise DatasetError(f"{row['dataset']}: {row['file_name']}: mask {number}: {error}") from error
        instances = np.zeros((height, width), dtype=np.int32)
        for number, inside, (x, y) in sorted(masks, key=lambda mask: -int(mask[1].sum())):
            instances[y : y + inside.shape[0], x : x + inside.shape[1]][inside] = number + 1
        if instances.shape != kept:
            instances = np.asarray(Image.fromarray(instances).resize(kept[::-1], Image.Resampling.NEAREST))
        return torch.from_numpy(np.array(instances))

    def _cell_masks(
        self, row: Row, instances: torch.Tensor, annotations: Sequence[Mapping[str, Any]], numbers: Sequence[int]
    ) -> torch.Tensor:
        outlines = row["objects"]["segmentation"]
        boxes = torch.tensor([cell["bbox"] for cell in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, :2] += boxes[:, 2:] / 2
        known = [number + 1 if outlines[number] else None for number in numbers]
        return sampled_masks(instances, known, boxes)

    def _annotations(
        self, row: Row, boxes: torch.Tensor, kept: Sequence[int], index: int
    ) -> tuple[dict[str, Any], list[int], list[tuple[list[float], int]]]:
        """The annotations, the number of the cell in its row of each, and in training the boxes to ignore and their classes."""
        objects = row["objects"]
        annotations, numbers, ignored = [], [], []
        for box, original in zip(boxes.tolist(), kept, strict=True):
            crowd = objects["iscrowd"][original] if "iscrowd" in objects else 0
            if crowd and not self.evaluation:
                # One box over a clump of cells is no cell to learn from, and no background; the metric ignores it, too.
                ignored.append((box, self.class_names.index(objects["category"][original])))
                continue
            annotation = {
                "bbox": box,
                "category_id": self.class_names.index(objects["category"][original]),
                "area": box[2] * box[3],
                "iscrowd": crowd,
            }
            if self.morphology:
                attributes = objects["morphology"][original] if "morphology" in objects else {}
                annotation["morphology"] = [
                    values.index(attributes[name]) if name in attributes else -100
                    for name, values in self.morphology.items()
                ]
            annotations.append(annotation)
            numbers.append(original)
        return {"image_id": index, "annotations": annotations}, numbers, ignored

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch: the processor's tensors, `labels` and `task`; in evaluation the raw truth as well."""
        inputs: dict[str, Any] = {"task": self.task, "return_tensors": "pt"}
        if self.pixels_as_bytes and not self.text_only:
            inputs |= {"do_rescale": False, "do_normalize": False}
        if self.pad_multiple is not None and not self.text_only:
            inputs["pad_multiple"] = self.pad_multiple
        if not self.text_only:
            inputs["images"] = [sample["image"] for sample in samples]
        if self.task == "detection":
            inputs["annotations"] = [sample["annotations"] for sample in samples]
            inputs["text"] = self._texts([sample["asked"] for sample in samples])
            crops = {sample["one_cell"] for sample in samples}
            if len(crops) > 1:
                raise InputError(
                    "A batch holds fields or crops of one cell (SmearDataset.one_cell): their sizes differ."
                )
            if crops == {True}:
                inputs["size"] = self.processor.image_processor.task_sizes["single_cell"]
        elif self.task == "segmentation":
            inputs["masks"] = [sample["mask"].numpy() for sample in samples]
            inputs["text"] = self._texts([sample["prompt"] for sample in samples])
        elif self.task in LANGUAGE_TASKS:
            most = max(len(sample["texts"]) for sample in samples)
            inputs["text"] = _filled(samples, "texts", most)
            inputs["answers"] = _filled(samples, "answers", most)
        # One scale for all, or most of the batch would be padding.
        if samples[0].get("scale", 1.0) != 1.0:
            size = inputs.get("size") or self.processor.image_processor.task_sizes[self.task]
            inputs["size"] = {edge: max(32, round(pixels * samples[0]["scale"])) for edge, pixels in size.items()}
        batch = dict(self.processor(**inputs))
        if self.task == "single_cell":
            batch["labels"] = torch.tensor([sample["label"] for sample in samples])
            if self.evaluation:
                # Crops are framed before they are made smaller.
                batch["crops"] = [sample["image"] for sample in samples]
        if self.task == "detection":
            for labels, sample in zip(batch["labels"], samples, strict=True):
                self._add_what_is_known(labels, sample)
        batch["task"] = self.task
        if self.text_only:
            batch["text_only"] = True
        if self.evaluation:
            if not self.text_only:
                batch["target_sizes"] = torch.tensor([sample["original_size"] for sample in samples])
            batch["file_names"] = [sample["file_name"] for sample in samples]
            most = max(len(sample["row_indices"]) for sample in samples)
            batch["row_indices"] = _filled(samples, "row_indices", most, filler=-1)
            if self.task in LANGUAGE_TASKS:
                batch["texts"], batch["answers"] = inputs["text"], inputs["answers"]
        return batch

    def _add_what_is_known(self, labels: dict[str, torch.Tensor], sample: Mapping[str, Any]) -> None:
        """Adds to the labels of a field what its data set says, and does not say, of its cells."""
        if sample["one_cell"]:
            labels["boxes_known"] = torch.zeros_like(labels["class_labels"], dtype=torch.bool)
        if "masks" in sample:
            labels[MASKS] = sample["masks"]
        if sample["ignored"]:
            height, width = sample["image"].shape[-2:]
            regions = torch.tensor([box for box, _ in sample["ignored"]]) / torch.tensor([width, height] * 2)
            labels[IGNORED_BOXES] = box_convert(regions, "xywh", "cxcywh")
            labels[IGNORED_CLASSES] = torch.tensor([name for _, name in sample["ignored"]])
        if sample["annotated_classes"] is not None:
            annotated = set(with_covered_parents(sample["annotated_classes"], self.label_parents))
            labels["annotated_classes"] = torch.tensor([name in annotated for name in self.class_names])
            if self._taught is not None:
                labels["taught_classes"] = self._taught
        if sample["exact_classes"]:
            exact = sample["exact_classes"]
            labels["exact_classes"] = torch.tensor([name in exact for name in self.class_names])

    def _texts(self, asked: list[Any]) -> list[str] | None:
        """What each image of the batch is asked for; None if it is the processor's default for every one."""
        default = self.processor.default_prompts[self.task]
        texts = [default if names is None else names if isinstance(names, str) else ", ".join(names) for names in asked]
        return None if all(text == default for text in texts) else texts


def _annotation_of(row: Row) -> Any:
    return row["dataset"], *(tuple(row.get(key) or ()) for key in ("annotated_classes", "exact_classes"))


def _closest(views: AugmentationConfig | None) -> float:
    """How much more of an image's pixels its closest view needs than all of it."""
    if views is None:
        return 1.0
    least = views.zoom_min if views.zoom else 1.0
    return (1 + views.scale) / (min(least, views.seen_min) if views.framing else least)


def _filled(samples: Sequence[dict[str, Any]], key: str, count: int, filler: Any = None) -> list[Any]:
    """The lists of all samples in one, each brought to `count` entries by its first or by `filler`."""
    lists = [sample[key] for sample in samples]
    return [entry for one in lists for entry in one + [one[0] if filler is None else filler] * (count - len(one))]
