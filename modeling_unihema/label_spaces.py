"""What a cell's label says about every class: its own, the coarser ones it implies, the finer ones it leaves open."""

from typing import Any

import torch


def ancestors_of(config: Any) -> torch.Tensor | None:
    """Which classes are coarser than which, `config.ancestor_matrix` as a tensor.

    Args:
        config ([`UniHemaConfig`]): Of the model.

    Returns:
        `torch.Tensor` or `None`: bool `[C, C]`, `True` where the second class is coarser than the first.
    """
    return None if config.ancestor_matrix is None else torch.tensor(config.ancestor_matrix)


def is_target(image: dict[str, torch.Tensor], ancestors: torch.Tensor | None = None) -> torch.Tensor:
    """Which cells of an image are targets: those of a class that its data set annotates, or of a finer one.

    Args:
        image (`dict[str, torch.Tensor]`): Labels of one image.
        ancestors (`torch.Tensor`, *optional*): See `ancestors_of`.

    Returns:
        `torch.Tensor`: Boolean `[n]`.
    """
    classes = image["class_labels"]
    annotated = image.get("annotated_classes")
    if annotated is None:
        return torch.ones_like(classes, dtype=torch.bool)
    annotated = annotated.to(classes.device)
    found = annotated[classes]
    if ancestors is not None:
        found = found | (ancestors.to(classes.device)[classes] & annotated).any(-1)
    return found


def class_targets(image: dict[str, Any], num_labels: int, ancestors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the query that finds a cell should answer for every class.

    A neutrophil is a positive of `WBC` as well, even in an image whose data set does not annotate `WBC`, provided that
    another one does (`taught_classes`): a class that only ever saw positives would end up everywhere. For a cell labelled
    `WBC`, nobody knows whether it is a neutrophil.

    Args:
        image (`dict[str, torch.Tensor]`): Labels of one image: `class_labels` `[n]`, optionally `annotated_classes` and
            `taught_classes`, bool `[num_labels]`.
        num_labels (`int`): Classes of the model.
        ancestors (`torch.Tensor`): See `ancestors_of`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: bool `[n, num_labels]` each: the classes that the cell has, and those
        that cost anything in its query.
    """
    classes = image["class_labels"]
    device = classes.device
    annotated = image.get("annotated_classes")
    annotated = torch.ones(num_labels, dtype=torch.bool) if annotated is None else annotated
    annotated = annotated.to(device)
    own = torch.zeros(len(classes), num_labels, dtype=torch.bool, device=device)
    own[torch.arange(len(classes), device=device), classes] = True
    ancestors = ancestors.to(device)
    taught = image.get("taught_classes")
    coarser, finer = ancestors[classes], ancestors.T[classes]
    implied = coarser if taught is None else coarser & (annotated | taught.to(device))
    positive = (own & annotated) | implied
    return positive, positive | (annotated & ~finer)


__all__ = ["ancestors_of", "class_targets", "is_target"]
