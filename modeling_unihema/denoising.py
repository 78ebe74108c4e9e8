"""Contrastive denoising queries (DINO, arXiv 2203.03605, section 3.3)."""

from dataclasses import dataclass

import torch
from torch import nn
from torchvision.ops import box_convert

from .configuration_unihema import UniHemaConfig
from .labels import ancestors_of, boxes_known, check_detection_labels, is_target, on_host
from .layers import ClassEmbedding, inverse_sigmoid


@dataclass
class DenoisingQueries:
    """Noised copies of the true cells, placed before the matching queries.

    Each group of slots holds a slightly noised (positive) copy of every cell of the image, then a
    strongly noised (negative) one. Images with fewer cells leave slots empty.

    Attributes:
        content (`torch.Tensor`): Embedded (partly wrong) classes `[B, P, d]`.
        reference_logits (`torch.Tensor`): Noised boxes before the sigmoid `[B, P, 4]`.
        attention_mask (`torch.Tensor`): Boolean `[P + Q, P + Q]`, `True` where a query may not see another.
        target_indices (`torch.Tensor`): `[B, P]`: the cell a slot is a copy of, -1 on empty slots.
        positive (`torch.Tensor`): Boolean `[B, P]`: slots that must find their cell again.
        num_groups (`int`): Groups.
    """

    content: torch.Tensor
    reference_logits: torch.Tensor
    attention_mask: torch.Tensor
    target_indices: torch.Tensor
    positive: torch.Tensor
    num_groups: int


class ContrastiveDenoising(nn.Module):
    """Makes denoising queries from labels, in training only.

    Args:
        config ([`UniHemaConfig`]): As many groups as fit into `denoising_queries` positives; an image with more cells
            than that has a random choice of them denoised, so a batch never has more than `2 * denoising_queries`
            slots. `label_noise_ratio` and `box_noise_scale` set the noise.
    """

    def __init__(self, config: UniHemaConfig):
        super().__init__()
        self.num_attributes = len(config.morphology or {})
        self.denoising_queries = config.denoising_queries
        self.label_noise_ratio = config.label_noise_ratio
        self.box_noise_scale = config.box_noise_scale
        # The object itself, not a copy: training may change the hierarchy of a loaded model.
        self.config = config
        # The last row stands for "no cell" and fills empty slots.
        self.label_embedding = ClassEmbedding(config.num_labels + 1, config.d_model)

    @property
    def num_labels(self) -> int:
        """Classes, those of the adapter in use where it has its own."""
        return len(self.label_embedding.weight) - 1

    def forward(self, labels: list[dict[str, torch.Tensor]], num_queries: int) -> DenoisingQueries | None:
        """
        Args:
            labels (`list[dict[str, torch.Tensor]]`): `class_labels` `[n]` and `boxes` cxcywh `[n, 4]` of each image.
            num_queries (`int`): Matching queries that will follow.

        Returns:
            [`DenoisingQueries`] or `None` when denoising is off or the batch has no cell.

        Raises:
            TypeError: See `check_detection_labels`.
            ValueError: See `check_detection_labels`.
        """
        check_detection_labels(labels, None, self.num_labels, self.num_attributes)
        # On the host until all is made, so that nothing waits for the device.
        labels = on_host(labels)
        chosen = [self._choose(image) for image in labels]
        group_size = max((len(cells) for cells in chosen), default=0)
        if not group_size:
            return None
        groups = self.denoising_queries // group_size
        device = self.label_embedding.weight.device
        classes = torch.full((len(labels), group_size), self.num_labels)
        boxes = torch.full((len(labels), group_size, 4), 0.5)
        targets = torch.full((len(labels), group_size), -1)
        for image, (label, cells) in enumerate(zip(labels, chosen, strict=True)):
            classes[image, : len(cells)] = label["class_labels"][cells]
            boxes[image, : len(cells)] = label["boxes"][cells].to(boxes.dtype)
            targets[image, : len(cells)] = cells

        copies = 2 * groups
        classes, boxes, targets = (
            part.repeat(1, copies, *[1] * (part.dim() - 2)) for part in (classes, boxes, targets)
        )
        half = torch.arange(copies).repeat_interleave(group_size) % 2 == 0
        positive = half[None] & (targets >= 0)

        flipped = (torch.rand(classes.shape) < self.label_noise_ratio / 2) & (targets >= 0)
        classes = torch.where(flipped, torch.randint_like(classes, self.num_labels), classes)
        reference = inverse_sigmoid(self._noisy_boxes(boxes, half))
        classes, reference, targets, positive = (
            part.to(device, non_blocking=True) for part in (classes, reference, targets, positive)
        )
        return DenoisingQueries(
            content=self.label_embedding(classes),
            reference_logits=reference,
            attention_mask=self._attention_mask(groups, 2 * group_size, num_queries, device),
            target_indices=targets,
            positive=positive,
            num_groups=groups,
        )

    def _choose(self, image: dict[str, torch.Tensor]) -> torch.Tensor:
        """Indices of the cells to denoise, ascending: of annotated classes, with a box, at most `denoising_queries`."""
        ancestors = ancestors_of(self.config)
        cells = (is_target(image, ancestors) & boxes_known(image)).nonzero().flatten()
        if len(cells) <= self.denoising_queries:
            return cells
        return cells[torch.randperm(len(cells))[: self.denoising_queries]].sort().values

    def _noisy_boxes(self, boxes: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
        """Moves each corner by up to half a side (positives) or by half to a whole side (negatives), times the scale."""
        sign = torch.randint_like(boxes, 2) * 2 - 1
        size = torch.rand_like(boxes) + (~positive).to(boxes.dtype)[None, :, None]
        half_side = boxes[..., 2:].repeat(1, 1, 2) / 2
        corners = box_convert(boxes, "cxcywh", "xyxy") + sign * size * half_side * self.box_noise_scale
        return box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")

    @staticmethod
    def _attention_mask(groups: int, slots: int, num_queries: int, device: torch.device) -> torch.Tensor:
        """Blocks attention between groups, and from matching to denoising queries: both would leak the true cells."""
        noisy = groups * slots
        group = torch.arange(noisy + num_queries, device=device) // slots
        group[noisy:] = groups
        seen_group = group[None]
        return (seen_group < groups) & (group[:, None] != seen_group)
