"""Deformable attention alone, beside Transformers' own form."""

import math
from functools import partial

import torch

from benchmarks.measuring import interleaved


HEADS, WIDTH, POINTS, STRIDES = 8, 32, 4, (8, 16, 32, 64)


def problem(size: tuple[int, int], queries: int | None) -> tuple:
    """Value, level shapes, points and weights at the size of the encoder (`queries` missing) or the decoder."""
    torch.manual_seed(0)
    shapes = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in STRIDES]
    tokens = sum(h * w for h, w in shapes)
    if queries is None:
        grids = [
            torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy") for h, w in shapes
        ]
        centre = torch.cat([torch.stack(grid, -1).flatten(0, 1) for grid in grids])
    else:
        centre = torch.rand(queries, 2)
    pixels = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float32)
    number = len(centre)
    points = centre[None, :, None, None, None] + 2 * torch.randn(1, number, HEADS, 4, POINTS, 2) / pixels[:, None]
    weights = torch.rand(1, number, HEADS, 4 * POINTS).softmax(-1).view(1, number, HEADS, 4, POINTS)
    return torch.randn(1, tokens, HEADS, WIDTH), shapes, points, weights


def measure(sizes: list[tuple[int, int]], rounds: int) -> list[dict]:
    """Rows of the table: forward, forward and backward; ratios to Transformers'."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    from unihema.modeling_unihema.deformable_attention import multi_scale_deformable_attention

    theirs = MultiScaleDeformableAttention()

    def transformers_form(value, shapes, points, weights):
        return theirs(value, torch.tensor(shapes), shapes, None, points, weights, 64)

    forms = {"Transformers": transformers_form, "ours": multi_scale_deformable_attention}
    rows = []
    for size in sizes:
        for place, queries in (("encoder", None), ("decoder", 900)):
            value, shapes, points, weights = problem(size, queries)
            with torch.no_grad():
                cases = {name: partial(form, value, shapes, points, weights) for name, form in forms.items()}
                results = {name: run() for name, run in cases.items()}
                forward = interleaved(cases, rounds, f"attention, {place} {size}")
            difference = max((r - results["Transformers"]).abs().max().item() for r in results.values())
            parts = [part.requires_grad_() for part in (value, points, weights)]
            direction = torch.randn_like(results["ours"])

            def step(form, parts=parts, shapes=shapes, direction=direction):
                output = form(parts[0], shapes, parts[1], parts[2])
                torch.autograd.grad(output, parts, direction)

            both = interleaved(
                {name: partial(step, form) for name, form in forms.items()}, rounds, f"with backward, {place}"
            )
            for kind, timings in (("forward", forward), ("forward + backward", both)):
                base = timings["Transformers"]
                rows += [
                    {
                        "size": size,
                        "place": place,
                        "kind": kind,
                        "form": name,
                        "ms": timing.processor * 1e3,
                        "times faster": base.processor / timing.processor,
                        "times faster by the clock": base.wall / timing.wall,
                        "largest difference": difference,
                    }
                    for name, timing in timings.items()
                ]
    return rows
