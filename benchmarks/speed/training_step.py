"""A training step of detection, and its loss alone, beside DeformableDetr's."""

import torch

from benchmarks.measuring import interleaved
from benchmarks.speed import models


# Images and cells in each.
LOSS_CASES = ((2, 20), (2, 400), (8, 400))


def step(rounds: int, size: tuple[int, int] = (512, 512), images: int = 2) -> list[dict]:
    """Rows of the table: forward and backward with 60 cells an image for both, with 20 and 400 for ours."""
    torch.manual_seed(0)
    ours, theirs = models.unihema(denoising_queries=0).train(), models.deformable_detr().train()
    denoising = models.unihema().train()
    pixels = torch.randn(images, 3, *size)

    def run(model, number: int) -> None:
        model.zero_grad(set_to_none=True)
        model(pixels, labels=models.cells(number, images)).loss.backward()

    cases = {
        "DeformableDetr, 60 cells": lambda: run(theirs, 60),
        "UniHema, 60 cells": lambda: run(ours, 60),
        "UniHema with denoising, 20 cells": lambda: run(denoising, 20),
        "UniHema with denoising, 60 cells": lambda: run(denoising, 60),
        "UniHema with denoising, 400 cells": lambda: run(denoising, 400),
    }
    timings = interleaved(cases, rounds, f"training step, {images} x {size}")
    base = timings["DeformableDetr, 60 cells"].processor
    return [
        {"case": n, "processor s": t.processor, "to DeformableDetr": t.processor / base} for n, t in timings.items()
    ]


def loss(rounds: int) -> list[dict]:
    """Rows of the table: the loss of random predictions of six layers and 900 queries, forward and backward."""
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

    from unihema.modeling_unihema.losses import detection_loss

    config = models.unihema(preset="tiny", morphology={}).config
    config.auxiliary_loss = True
    peer = models.deformable_detr_config()
    peer.auxiliary_loss = True
    rows = []
    for images, number in LOSS_CASES:
        torch.manual_seed(0)
        labels = models.cells(number, images)
        logits = torch.randn(6, images, models.QUERIES, models.LABELS, requires_grad=True)
        boxes = (torch.rand(6, images, models.QUERIES, 4) * 0.8 + 0.1).requires_grad_()
        proposals = logits[0].detach().requires_grad_(), boxes[0].detach().requires_grad_()

        def ours(logits=logits, boxes=boxes, proposals=proposals, labels=labels):
            detection_loss(logits, boxes, None, *proposals, labels, config)[0].backward()

        def theirs(logits=logits, boxes=boxes, labels=labels):
            DeformableDetrForObjectDetectionLoss(
                logits[-1], labels, "cpu", boxes[-1], peer, outputs_class=logits, outputs_coord=boxes
            )[0].backward()

        timings = interleaved({"Transformers": theirs, "ours": ours}, rounds, f"loss, {images} images, {number} cells")
        base = timings["Transformers"].processor
        rows += [
            {
                "images": images,
                "cells": number,
                "loss": n,
                "ms": t.processor * 1e3,
                "to Transformers": t.processor / base,
            }
            for n, t in timings.items()
        ]
    return rows
