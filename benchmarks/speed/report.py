"""The measurements as a page of tables and a plot of growth."""

from typing import Any

import pandas as pd

from unihema.training.studies.study import Plot, table


TITLES = {
    "attention": "Deformable attention alone",
    "detection": "One image through a detector",
    "tasks": "Each task beside everything",
    "throughput": "A folder of fields, tiny preset",
    "step": "A training step",
    "loss": "The detection loss alone",
    "data": "Training images made ready",
    "memory": "Largest resident memory",
}

NOTES = {
    "tasks": "Everything is every part once, the image looked at once. Answers have 32 tokens, each a pass of the text decoder. "
    "A second task or question is given the features of the image (`image_features=`). Models of ours are prepared with "
    "`prepare_for_inference`, but for the row that says otherwise.",
    "data": "Painted fields as JPEG, decoded, changed by the default views and collated at 640 pixels in batches of 16, by one "
    "thread. Kept images are those of `data.cache_images`.",
    "detection": "Models of ours are prepared with `prepare_for_inference`.",
}


def page(results: dict, exponents: dict[str, float]) -> str:
    """Markdown of all sections that were measured.

    Args:
        results (`dict`): Section -> rows, and `machine`.
        exponents (`dict[str, float]`): Exponent of time in pixels, by model.
    """
    machine = results["machine"]
    lines = [
        "# Speed and memory",
        "",
        f"Measured by `make bench` on {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"Transformers {machine['transformers']}: {machine['gflops']:.0f} GFLOP in a processor second of a float32 matrix "
        "product. Random weights, float32 unless said, batch 1; medians of processor seconds over interleaved rounds.",
        "",
    ]
    for section, title in TITLES.items():
        if results.get(section):
            frame = pd.DataFrame(results[section])
            frame = frame.map(lambda value: " x ".join(map(str, value)) if isinstance(value, list | tuple) else value)
            lines += [f"## {title}", ""]
            again = results.get("again", {}).get(section)
            if again:
                lines += [
                    f"Measured again by itself on {again['processor']}, threads: {again['threads']}, "
                    f"{again['gflops']:.0f} GFLOP in a processor second; the machine's load was {again['load']:.1f} "
                    "when it began.",
                    "",
                ]
            if section in NOTES:
                lines += [NOTES[section], ""]
            lines += [_markdown(frame), ""]
    lines += [
        "## Images of any size",
        "",
        "Memory and time of slides and wide fields: [predict](../predict.md#memory-and-time-of-slides).",
        "",
    ]
    lines += _on_a_gpu(results)
    if exponents:
        lines += ["## Growth", "", "![time by pixels](growth.png)", ""]
        lines += ["Exponent of time in pixels (1 is linear):", ""]
        lines += [f"- {name}: {value:.2f}" for name, value in exponents.items()] + [""]
        others = pd.DataFrame([row for row in results["growth"] if row["by"] != "pixels"])
        lines += [_markdown(others), ""]
    return "\n".join(lines)


def _on_a_gpu(results: dict) -> list[str]:
    lines = ["## On a GPU", ""]
    if not results.get("gpu"):
        return [
            *lines,
            "Not measured: no CUDA device was at hand. `python -m benchmarks.speed --section gpu` measures it.",
            "",
        ]
    machine = results["gpu machine"]
    lines += [
        f"Measured by `python -m benchmarks.speed --section gpu` on {machine['device']} with {machine['cores']} processor cores, "
        f"torch {machine['torch']}, Transformers {machine['transformers']}: the base preset at 800x1066, new images at each "
        "call, medians. The peer is DeformableDetr, two stages, box refinement, 900 queries, in the same run.",
        "",
    ]
    names = {"case": "case", "unit": "in", "ours": "measured", "peer": "peer", "asked": "asked"}
    frame = pd.DataFrame(results["gpu"])[list(names)].rename(columns=names)
    return [*lines, _markdown(frame.astype({"measured": float, "peer": float})), ""]


def _markdown(frame: pd.DataFrame) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    return "\n".join(table(list(frame.columns), [[cell(value) for value in row] for row in frame.values.tolist()]))


def growth_plot(rows: list[dict]) -> Plot:
    """Time by pixels, for each model.

    Args:
        rows (`list[dict]`): Of `detection.growth`.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name in dict.fromkeys(row["model"] for row in rows if row["by"] == "pixels"):
            points = [(row["value"], row["s"]) for row in rows if row["by"] == "pixels" and row["model"] == name]
            axes.loglog(*zip(*points), "o-", label=name)
        axes.set_xlabel("pixels")
        axes.set_ylabel("processor seconds")
        axes.legend(frameon=False)

    return Plot(5, 3.5, draw)
