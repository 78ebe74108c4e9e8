"""Cells and their attributes, measured in pixels of the original image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from unihema.modeling_unihema.configuration_unihema import DEFAULT_THRESHOLD
from unihema.modeling_unihema.labels import ancestors_of, boxes_known
from unihema.modeling_unihema.outputs import UniHemaDetectionOutput
from unihema.processing_unihema.masks import outline_mask, rle_in_image
from unihema.processing_unihema.post_processing import asked_classes, distinct_cells, post_process_cell_masks
from unihema.training.data.rows import Row
from unihema.training.evaluation.measured import FeatureListener, Measured, Resampler, class_names
from unihema.training.evaluation.second_look import SecondLook
from unihema.training.metrics.coarse_classes import with_coarser_names, with_coarser_truth
from unihema.training.metrics.counting import count_error
from unihema.training.metrics.detection import (
    MAX_DETECTIONS,
    best_threshold,
    mean_average_precision,
    operating_point,
    score_matches,
)
from unihema.training.metrics.morphology import MISSING, match_cells, morphology_scores
from unihema.training.metrics.resampled_precision import MatchedDetections
from unihema.training.metrics.single_cell import one_hot_counts, scores_of_counts


# Of thresholds fitted to the names that they give.
ROUNDS = 4


class _Field(NamedTuple):
    """One image: the queries ranked under every class, as mAP counts them; the logits of all queries, as they count and as they
    were before a second look, and their boxes, from which follows under which name each is shown; the true cells; the
    attributes that were read, and that are right, of the cells that have some; and, of images with masks of cells, those of the
    ranked queries."""

    ranked: dict[str, np.ndarray]
    logits: torch.Tensor
    first_logits: torch.Tensor
    boxes: torch.Tensor
    size: tuple[int, int]
    truth: dict[str, Any]
    read: np.ndarray
    attributes: np.ndarray
    described: int
    masks: list[dict[str, Any]] | None = None


class MeasuredDetections(Measured):
    """Cells of each image. A class that the image's data set does not annotate is not asked for: it takes no query from
    one that is. Where the checkpoint takes a second look, white cells have the types that it gives them. Where a data set
    annotates a class and a coarser one, a cell counts under both. A crop whose cell has no box (rows `from_attributes`)
    counts for the attributes alone: those of the best-scoring cell found in it.

    Args:
        model, processor, on_features: See [`Measured`].
        name_classes (`bool`): Classes are asked for by name, so that those are answered as well that the checkpoint is known not
            to find.
    """

    def __init__(
        self, model: Any, processor: Any, on_features: FeatureListener | None = None, name_classes: bool = False
    ):
        super().__init__(model, processor, on_features)
        self.name_classes = name_classes
        self.names = class_names(model)
        self.ancestors = ancestors_of(model.config)
        self.second_look = SecondLook.of(model, processor)

    def add(self, batch: dict[str, Any], rows: Sequence[Row]) -> None:
        output = self.model(task="detection", **self.inputs(batch))
        process, sizes = self.processor.image_processor.post_process_object_detection, batch["target_sizes"]
        first = output.logits = _asked_for(output.logits, batch["labels"])
        if self.second_look is not None:
            fields = zip(output.logits, output.pred_boxes, batch["row_indices"], strict=True)
            output.logits = torch.stack(
                [
                    logits
                    if rows[index].get("from_attributes")
                    else self.second_look.logits(logits, boxes, rows[index])
                    for logits, boxes, index in fields
                ]
            )
        # Of a crop the attributes are those of the cell that results show first.
        names = {"ancestors": self.ancestors, "finest": self.model.config.class_thresholds()}
        cells = process(output, threshold=0.0, target_sizes=sizes, **names)
        ranked = process(output, threshold=0.0, target_sizes=sizes, top_k=MAX_DETECTIONS, one_class_per_query=False)
        for image, index in enumerate(batch["row_indices"]):
            truth = _reference(rows[index], sizes[image].tolist(), self.names)
            attributes = self._attributes(output, image, _arrays(cells[image]), truth, batch["labels"][image])
            masks = None
            if "masks" in truth and self.model.config.trained.cell_masks and "cell_mask_queries" in output:
                sides = self.model.config.trained.cell_mask_sides
                masks = _codes(output, image, ranked[image], truth["size"], sides)
            logits, boxes = output.logits[image].float().cpu(), output.pred_boxes[image].float().cpu()
            before = logits if self.second_look is None else first[image].float().cpu()
            size = tuple(sizes[image].tolist())
            self.keep(
                rows[index], _Field(_arrays(ranked[image]), logits, before, boxes, size, truth, *attributes, masks)
            )

    def _named(
        self, thresholds: np.ndarray, answered: torch.Tensor | None, second_look: bool
    ) -> list[dict[str, np.ndarray]]:
        """All queries of each image, each under the one name that results show it with.

        Args:
            thresholds (`np.ndarray`): Above which a finer name is taken.
            answered (`torch.Tensor`, *optional*): Classes that are answered, see [`asked_classes`].
            second_look (`bool`): After it, where the checkpoint takes one.
        """
        process = self.processor.image_processor.post_process_object_detection
        options = {"ancestors": self.ancestors, "finest": thresholds.tolist(), "classes": answered}
        found = []
        for field in self.records:
            logits = field.logits if second_look else field.first_logits
            output = UniHemaDetectionOutput(logits=logits[None], pred_boxes=field.boxes[None])
            found += process(output, threshold=0.0, target_sizes=[field.size], **options)
        return [_arrays(cells) for cells in found]

    def _answered(self) -> torch.Tensor | None:
        return None if self.name_classes else asked_classes(self.model.config, None)

    def _attributes(self, output, image: int, found, truth, labels) -> tuple[np.ndarray, np.ndarray, int]:
        sizes = self.model.config.morphology_sizes
        if labels.get("morphology") is None:
            return np.zeros((0, len(sizes)), int), np.zeros((0, len(sizes)), int), 0
        values = labels["morphology"].numpy()
        described = (values != MISSING).any(-1)
        if boxes_known(labels).all():
            scores = output.logits[image].float().sigmoid().cpu().numpy()[found["queries"]][:, truth["labels"]]
            queries, matched = match_cells(found["boxes"], truth["boxes"], scores)
        else:
            # Of the one cell in a crop; `found` comes best first.
            queries = matched = np.zeros(min(len(found["queries"]), len(values)), int)
        queries, matched = queries[described[matched]], matched[described[matched]]
        parts = output.pred_morphology[image].split(sizes, dim=-1)
        read = torch.stack([part.argmax(-1) for part in parts], -1).cpu().numpy()
        return read[found["queries"][queries]], values[matched], int(described.sum())

    def best_thresholds(self) -> dict[str, float]:
        """The score of each class at which its F1 is best, see `best_threshold`; classes never found are left out. Results
        leave out cells before the second look.

        Under which of two names a cell is shown hangs on the thresholds that are looked for, and they on the names: they are
        fitted again to the names that they give, and those are taken with which the classes' mean F1 is best.
        """
        truth = self._truth()
        found: list[tuple[float, dict[str, float]]] = []
        finest = np.zeros(len(self.names))
        for _ in range(ROUNDS):
            fitted = self._fitted_thresholds(self._names_in_truth(self._named(finest, None, False), 0.0), truth)
            if fitted in [thresholds for _, thresholds in found]:
                break
            finest = np.array([fitted.get(name, DEFAULT_THRESHOLD) for name in self.names])
            shown = self._names_in_truth(self._named(finest, None, False), finest)
            matches = [score_matches(shown, truth, label, len(self.names)) for label in range(len(self.names))]
            scores = [operating_point(*each, 0.0)["f1"] for each in matches if each[2]]
            found.append((float(np.mean(scores)) if scores else 0.0, fitted))
            if self.ancestors is None:
                break
        return max(found, key=lambda each: each[0])[1]

    def _fitted_thresholds(
        self, predictions: list[dict[str, np.ndarray]], truth: list[dict[str, Any]]
    ) -> dict[str, float]:
        thresholds = {}
        for label, name in enumerate(self.names):
            best = best_threshold(*score_matches(predictions, truth, label, len(self.names)))
            if best is not None:
                thresholds[name] = round(min(max(best[0], 0.01), 0.99), 4)
        return thresholds

    def unfound_classes(self, thresholds: Mapping[str, float]) -> list[str]:
        """The classes that some image has, and for which [`best_thresholds`] has no threshold, as none of them was found."""
        shown = {int(label) for truth in self._truth() for label in truth["labels"]}
        return [name for label, name in enumerate(self.names) if label in shown and name not in thresholds]

    def answers(self) -> list[tuple[str, float, bool]]:
        thresholds = np.array(self.model.config.class_thresholds())
        # By the name that detection shows each cell with; a coarse one is right where the truth is a kind of it.
        shown = [
            _shown(cells, thresholds, self.ancestors) for cells in self._named(thresholds, self._answered(), False)
        ]
        found = []
        for label, name in enumerate(self.names):
            scores, right, _ = score_matches(shown, self._truth(), label, len(self.names))
            found += [(name, score, hit) for score, hit in zip(scores.tolist(), right.tolist(), strict=True)]
        return found

    def figures(self, part: bool = False) -> dict[str, Any]:
        figures = mean_average_precision([field.ranked for field in self.records], self._truth(), self.names)
        if part:
            annotated = self._annotated_names()
            figures["per_class"] = {name: figures["per_class"][name] for name in annotated}
        figures["at_threshold"] = self._at_threshold()
        masked = [field for field in self.records if field.masks is not None]
        if masked:
            found = [field.ranked | {"masks": field.masks} for field in masked]
            coarser = None if self.ancestors is None else self.ancestors.numpy()
            truth = [with_coarser_truth(field.truth, coarser) for field in masked]
            of_masks = mean_average_precision(found, truth, self.names, of_masks=True)
            figures["masks"] = {name: of_masks[name] for name in ("mAP", "mAP50", "mAP75")}
            figures["masks"]["cells"] = sum(of_class["cells"] for of_class in of_masks["per_class"].values())
        if self._described():
            figures["morphology"] = morphology_scores(
                *self._read_and_true(), self.model.config.morphology, cells=self._described()
            )
        return figures

    def _at_threshold(self) -> dict[str, dict[str, Any]]:
        thresholds = np.array(self.model.config.class_thresholds())
        shown = self._names_in_truth(self._named(thresholds, self._answered(), True), thresholds)
        truth, found = self._truth(), {}
        for label, name in enumerate(self.names):
            scores, right, count = score_matches(shown, truth, label, len(self.names))
            if count or len(scores):
                # All that is shown: a neutrophil above its own threshold is a white cell, too.
                point = operating_point(scores, right, count, 0.0) | {"threshold": float(thresholds[label])}
                found[name] = point | count_error(shown, truth, label, len(self.names))
        return found

    def resampler(self) -> Resampler:
        matched = MatchedDetections([field.ranked for field in self.records], self._truth(), len(self.names))
        attributes = self._attribute_counts() if self._described() else {}

        def figures(weights: np.ndarray) -> dict[str, float | None]:
            precision = matched.average_precision(weights)
            seen = ~np.isnan(precision[0])
            scores: dict[str, float | None] = {
                "mAP": float(precision[:, seen].mean()) if seen.any() else None,
                "mAP50": float(precision[0, seen].mean()) if seen.any() else None,
                "mAP75": float(precision[5, seen].mean()) if seen.any() else None,
            }
            for label in np.flatnonzero(seen):
                scores[f"per_class {self.names[label]} AP50"] = float(precision[0, label])
                scores[f"per_class {self.names[label]} AP"] = float(precision[:, label].mean())
            return scores | _attribute_scores(attributes, weights)

        return figures

    def _attribute_counts(self) -> dict[str, np.ndarray]:
        """For each attribute what each image adds to its counts, `[images, 3, values]`."""
        images = np.repeat(np.arange(len(self.records)), [len(field.read) for field in self.records])
        read, true = self._read_and_true()
        counts = {}
        for number, (name, values) in enumerate(self.model.config.morphology.items()):
            counts[name] = np.zeros((len(self.records), 3, len(values)))
            np.add.at(counts[name], images, one_hot_counts(read[:, number], true[:, number], len(values)))
        return counts

    def _truth(self) -> list[dict[str, Any]]:
        coarser = None if self.ancestors is None else self.ancestors.numpy()
        return [with_coarser_truth(field.truth, coarser) for field in self.records]

    def _names_in_truth(
        self, cells: Sequence[dict[str, np.ndarray]], thresholds: np.ndarray | float
    ) -> list[dict[str, np.ndarray]]:
        """The cells that are shown, also under the coarser names that their image's data set annotates."""
        coarser = None if self.ancestors is None else self.ancestors.numpy()
        return [
            with_coarser_names(_shown(found, thresholds, self.ancestors), field.truth, coarser)
            for field, found in zip(self.records, cells, strict=True)
        ]

    def _described(self) -> int:
        return sum(field.described for field in self.records)

    def _read_and_true(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(
            np.concatenate([getattr(field, name) for field in self.records]) for name in ("read", "attributes")
        )

    def _annotated_names(self) -> list[str]:
        declared = [field.truth.get("annotated_classes") for field in self.records]
        labels = {label for part in declared for label in (range(len(self.names)) if part is None else part)}
        return [self.names[label] for label in sorted(labels)]


def _asked_for(logits: torch.Tensor, labels: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Logits `[B, Q, classes]` without those of classes that an image's data set does not annotate."""
    annotated = [label.get("annotated_classes") for label in labels]
    if all(classes is None or classes.all() for classes in annotated):
        return logits
    everything = torch.ones(logits.shape[-1], dtype=torch.bool)
    asked = torch.stack([everything if classes is None else classes.cpu().bool() for classes in annotated])
    return logits.masked_fill(~asked[:, None].to(logits.device), float("-inf"))


def _attribute_scores(counts: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, float | None]:
    found = [scores_of_counts(*np.tensordot(weights, of_one, 1))[0] for of_one in counts.values()]
    labelled = [scores for scores in found if scores["accuracy"] is not None]
    return {
        f"morphology {name}": float(np.mean([scores[name] for scores in labelled]))
        for name in ("accuracy", "macro_f1")
        if labelled
    }


def _shown(
    cells: Mapping[str, np.ndarray], thresholds: np.ndarray | float, ancestors: torch.Tensor | None
) -> dict[str, np.ndarray]:
    """Cells above their class's threshold, each once."""
    limit = thresholds[cells["labels"]] if isinstance(thresholds, np.ndarray) else thresholds
    above = np.flatnonzero(cells["scores"] > limit)
    # `cells` come best first.
    boxes, labels, scores = (torch.from_numpy(cells[name][above]) for name in ("boxes", "labels", "scores"))
    kept = distinct_cells(boxes, labels, ancestors=ancestors, scores=scores).numpy()
    return {name: values[above[kept]] for name, values in cells.items()}


def _codes(
    output: Any,
    image: int,
    ranked: Mapping[str, torch.Tensor],
    size: tuple[int, int],
    sides: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """The mask of each ranked query as run lengths over the image; a query under several classes is looked at once."""
    queries, place = np.unique(ranked["queries"].cpu().numpy(), return_index=True)
    once = {name: values[torch.as_tensor(place, device=values.device)] for name, values in ranked.items()}
    sizes = [size] * (image + 1)
    everyone = [{name: values[:0] for name, values in once.items()}] * image + [once]
    masks = post_process_cell_masks(output, everyone, sizes, sides)[image]
    codes = {}
    for query, mask, box in zip(queries.tolist(), masks, once["boxes"].tolist(), strict=True):
        origin = (math.floor(box[0]), math.floor(box[1]))
        codes[query] = rle_in_image(np.zeros((0, 0)) if mask is None else mask, origin, size)
    return [codes[query] for query in ranked["queries"].tolist()]


def _arrays(detections: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: values.cpu().numpy() for name, values in detections.items()}


def _reference(row: Row, size: Sequence[int], names: list[str]) -> dict[str, Any]:
    height, width = size
    boxes = np.asarray(row["objects"]["bbox"], dtype=float).reshape(-1, 4)
    boxes = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
    if row.get("size"):
        boxes *= width / row["size"][0]
    reference = {
        "boxes": boxes.clip(0, [width, height, width, height]),
        "labels": [names.index(name) for name in row["objects"]["category"]],
    }
    if any(row["objects"].get("segmentation") or ()) and tuple(row.get("size") or (width, height)) == (width, height):
        reference["size"] = (int(height), int(width))
        reference["masks"] = [
            None if outline is None else rle_in_image(*outline_mask(outline, reference["size"]), reference["size"])
            for outline in row["objects"]["segmentation"]
        ]
    if "iscrowd" in row["objects"]:
        reference["iscrowd"] = row["objects"]["iscrowd"]
    if row.get("from_attributes"):
        reference["annotated_classes"] = []
    elif row.get("annotated_classes") is not None:
        # A class that the model does not have, and no box either, is none that it could be asked for.
        reference["annotated_classes"] = [names.index(name) for name in row["annotated_classes"] if name in names]
    if row.get("exact_classes"):
        reference["exact_classes"] = [names.index(name) for name in row["exact_classes"] if name in names]
    return reference
