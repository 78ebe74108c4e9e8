"""Classes added to a checkpoint: what it knows keeps its weights and numbers, what is new comes after it."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig, ancestors
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.processing_unihema.class_names import usual_name
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.class_tree import known_parents, single_cell_tree
from unihema.training.data.rows import Row, class_names, single_cell_names, witnesses


logger = logging.getLogger(__name__)

# How much less likely than its coarser class, in logits, a new class starts: a class that nobody has taught yet should
# answer for nobody.
HELD_BACK = 4.0


def grow(
    model: UniHemaForMultiTask,
    processor: UniHemaProcessor,
    rows: Mapping[str, Sequence[Row]],
    single_cell_parents: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Adds the classes that the data have and the model has not.

    A new class starts from its coarser class or, among single cells, from the mean of its group, made less likely by
    `HELD_BACK`. Weights of the other classes stay what they are.

    Args:
        model (`UniHemaForMultiTask`): Changed in place: its class heads, the embedding of denoising, its configuration.
        processor (`UniHemaProcessor`): Its default prompt of detection gets the new classes.
        rows (`Mapping[str, Sequence[Row]]`): Task -> training rows.
        single_cell_parents (`Mapping[str, str]`, *optional*): See `single_cell_tree`.

    Returns:
        `dict[str, list[str]]`: The new classes of `detection` and of `single_cell`.
    """
    config = model.config
    added = {"detection": _grow_detection(model, class_names(witnesses(rows.get("detection", ()))))}
    if added["detection"]:
        processor.default_prompts["detection"] = ", ".join(config.class_names)
        config.default_prompt_ids = processor.default_prompt_ids()
    added["single_cell"] = _grow_single_cell(
        model, single_cell_names(witnesses(rows.get("single_cell", ()))), single_cell_parents
    )
    config.validate()
    for task, names in added.items():
        logger.warning("New classes of %s: %s.", task, ", ".join(names) or "none")
    return added


def _new_names(names: Sequence[str], known: Sequence[str]) -> list[str]:
    there = {usual_name(name) for name in known}
    return [name for name in names if usual_name(name) not in there]


def _grow_detection(model: UniHemaForMultiTask, names: Sequence[str]) -> list[str]:
    config = model.config
    old = config.class_names
    new = _new_names(names, old)
    everything = [*old, *new]
    # What the checkpoint was taught comes first.
    config.label_parents = known_parents(everything) | dict(config.label_parents or {})
    if not new:
        return []
    parents = [next((name for name in ancestors(one, config.label_parents) if name in old), None) for one in new]
    groups = [[] if parent is None else [old.index(parent)] for parent in parents]
    for layer in (model.detection_head.class_head, model.model.query_selection.class_head):
        _add_outputs(layer, groups)
    embedding = model.denoising.label_embedding
    rows = [group[0] if group else None for group in groups]
    # Its last row stands for "no cell".
    embedding.set_rows([*range(len(old)), *rows, len(old)])
    config.id2label = dict(enumerate(everything))
    config.label2id = {name: index for index, name in config.id2label.items()}
    return new


def _grow_single_cell(model: UniHemaForMultiTask, names: Sequence[str], parents: Mapping[str, str] | None) -> list[str]:
    config = model.config
    old = list(config.single_cell_labels)
    everything, config.single_cell_parents = single_cell_tree([*old, *_new_names(names, old)], parents, keep=old)
    new = everything[len(old) :]
    config.single_cell_labels = everything
    if new:
        _add_outputs(model.single_cell_head.layers[-1], [_closest_group(name, old, config) for name in new])
    return new


def _closest_group(name: str, old: Sequence[str], config: UniHemaConfig) -> list[int]:
    """Numbers of the old classes of the finest group that a new class and some old one belong to."""
    parents = config.single_cell_parents or {}
    lines = [{other, *ancestors(other, parents)} for other in old]
    for group in ancestors(name, parents):
        found = [number for number, line in enumerate(lines) if group in line]
        if found:
            return found
    return []


@torch.no_grad()
def _add_outputs(layer: nn.Linear, groups: Sequence[Sequence[int]]) -> None:
    """Adds a row for each group of old rows: their mean. Without a group its weight is zero."""
    count = len(layer.weight)
    layer.set_rows([*range(count), *[0] * len(groups)])
    least = layer.bias[:count].min()
    for row, group in enumerate(groups, count):
        layer.weight[row] = layer.weight[list(group)].mean(0) if group else 0.0
        layer.bias[row] = (layer.bias[list(group)].mean() if group else least) - HELD_BACK


__all__ = ["grow"]
