"""One image through each detector; growth with pixels, queries and batch; peak memory."""

import math

import torch

from benchmarks.measuring import interleaved, peak_memory
from benchmarks.speed import models


# Multiplications and additions of the base preset, by image size.
GFLOP = {(512, 512): 155, (800, 1066): 462}


def measure(sizes: list[tuple[int, int]], rounds: int, compiled: bool, rate: float) -> list[dict]:
    """Rows of the table: each detector at each size, beside DeformableDetr and the machine's own rate."""
    rows = []
    for size in sizes:
        cases = {name: build(size) for name, build in models.detectors().items()}
        image = torch.randn(1, 3, *size)
        half = models.prepared_unihema().to(torch.bfloat16)
        cases["UniHema base, bf16"] = lambda half=half, image=image: half(image.to(torch.bfloat16))
        if compiled:
            torch.compiler.reset()
            fast = torch.compile(models.prepared_unihema(), dynamic=False)
            cases["UniHema base, compiled"] = lambda fast=fast, image=image: fast(image)
        with torch.no_grad():
            timings = interleaved(cases, rounds, f"detection {size}")
        base = timings["DeformableDetr two-stage R50"].processor
        floor = GFLOP[size] * 1e9 / rate if size in GFLOP else math.nan
        rows += [
            {
                "size": size,
                "model": name,
                "processor s": timing.processor,
                "wall s": timing.wall,
                "to DeformableDetr": timing.processor / base,
                "to GEMM floor": timing.processor / floor if name.startswith("UniHema base") else math.nan,
                "spread": timing.spread,
            }
            for name, timing in timings.items()
        ]
    return rows


def growth(rounds: int) -> list[dict]:
    """How time grows with pixels, queries and images, for the base preset and DeformableDetr."""
    rows = []
    peers = {"UniHema base": models.prepared_unihema(), "DeformableDetr": models.deformable_detr()}
    with torch.no_grad():
        for side in (320, 448, 640, 896):
            image = torch.randn(1, 3, side, side)
            timings = interleaved(
                {name: lambda m=m, i=image: m(i) for name, m in peers.items()}, rounds, f"{side} pixels a side"
            )
            rows += [{"by": "pixels", "value": side**2, "model": n, "s": t.processor} for n, t in timings.items()]
        for number in (300, 900, 1700):
            model, image = models.prepared_unihema(num_queries=number), torch.randn(1, 3, 512, 512)
            timing = interleaved({"it": lambda m=model, i=image: m(i)}, rounds, f"{number} queries")["it"]
            rows.append({"by": "queries", "value": number, "model": "UniHema base", "s": timing.processor})
        for number in (1, 2, 4):
            images = torch.randn(number, 3, 320, 320)
            timing = interleaved({"it": lambda i=images: peers["UniHema base"](i)}, rounds, f"{number} images")["it"]
            rows.append({"by": "images", "value": number, "model": "UniHema base", "s": timing.processor})
    return rows


def exponents(rows: list[dict]) -> dict[str, float]:
    """Slope of log time over log pixels for each model: 1 is linear."""
    found = {}
    for name in dict.fromkeys(row["model"] for row in rows if row["by"] == "pixels"):
        points = [(math.log(r["value"]), math.log(r["s"])) for r in rows if r["by"] == "pixels" and r["model"] == name]
        x, y = (sum(axis) / len(points) for axis in zip(*points))
        found[name] = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return found


def memory(size: tuple[int, int]) -> list[dict]:
    """Largest resident memory of a fresh process that loads a model and runs it on one image."""
    return [
        {"size": size, "model": name, "peak MB": peak_memory("benchmarks.speed.models", name, *map(str, size))}
        for name in ("UniHema base", "DeformableDetr two-stage R50")
    ]
