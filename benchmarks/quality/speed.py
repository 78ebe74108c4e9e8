"""Time and memory of the finished models on one image each: alone, and all tasks one after another."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import interleaved, peak_memory
from benchmarks.quality.compared import ATTRIBUTES, task_of
from benchmarks.quality.peers import PEERS
from benchmarks.quality.results import UNIHEMA, unihema_item
from benchmarks.quality.saved import load_example, load_peer
from unihema.loading import load_model
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS


ALL_PEERS = "all peers"
# One field and one cell are looked at for all that is asked of them, by every model; what it is the image of.
_IMAGE_OF = {
    "segmentation": "detection",
    ATTRIBUTES: "single_cell",
    "question_answering": "single_cell",
    "cloze": "single_cell",
}


def runners(folder: Path, items: Sequence[str], unihema: Any) -> dict[str, Callable[[], Any]]:
    """For each model a function that runs it on its example, on the CPU.

    Args:
        folder (`Path`): Of the comparison.
        items (`Sequence[str]`): Peers, and UniHema's tasks as [`unihema_item`] names them.
        unihema (`UniHemaForMultiTask`, *optional*): Needed for its tasks.
    """
    found = {}
    for item in items:
        if item in PEERS:
            model, compared, own = load_peer(folder / item), PEERS[item].compared, folder / item
        else:
            model, compared, own = unihema, item.split("/")[1], folder / UNIHEMA
        found[item] = _runner(model, task_of(compared), _inputs(folder, own, compared))
    return found


def _inputs(folder: Path, own: Path, compared: str) -> dict[str, torch.Tensor]:
    """The model's example, with the image that the other tasks of a field or a cell look at where it is as large."""
    inputs = load_example(own, compared)
    try:
        shared = load_example(folder / UNIHEMA, _IMAGE_OF.get(compared, compared))
    except FileNotFoundError:
        return inputs
    pixels = inputs.get("pixel_values")
    if pixels is not None and max(pixels.shape[-2:]) == max(shared["pixel_values"].shape[-2:]):
        inputs |= {name: shared[name] for name in ("pixel_values", "pixel_mask")}
    return inputs


def _runner(model, task: str, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    if task in LANGUAGE_TASKS:
        # As many tokens as the true answer has: no model is faster for saying less.
        tokens = int((inputs.pop("labels") >= 0).sum())
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        return lambda: model.generate(**inputs, **length, num_beams=1, do_sample=False)
    return lambda: model(task=task, **inputs)


def measure(
    folder: Path, peers: Sequence[str], best: Sequence[str], tasks: Sequence[str], checkpoint: str | Path, rounds: int
) -> dict[str, dict[str, float]]:
    """Times all models in turn, then each one's memory in a process of its own.

    UniHema forgets the image and its answers before it is asked anew; where it does all tasks, tasks on the same image share
    it.

    Args:
        folder (`Path`): Of the comparison.
        peers (`Sequence[str]`): All of them.
        best (`Sequence[str]`): One peer for each task: those that together do what UniHema does.
        tasks (`Sequence[str]`): UniHema's.
        checkpoint (`str` or `Path`): Its folder.
        rounds (`int`): Timed rounds.

    Returns:
        `dict[str, dict[str, float]]`: For each peer, each of UniHema's tasks, `ALL_PEERS` and `UNIHEMA`: `wall ms` and
        `processor ms` of one image (medians), `spread` and `peak MB`.
    """
    own = [unihema_item(task) for task in tasks]
    model = load_model(checkpoint, "cpu")[0].eval()
    run = runners(folder, [*peers, *own], model)

    def afresh(items: Sequence[str]) -> Callable[[], None]:
        def one_after_another() -> None:
            model.model.image_memory.forget()
            model.answer_memory.forget()
            for item in items:
                run[item]()

        return one_after_another

    groups = {item: [item] for item in run} | {ALL_PEERS: list(best), UNIHEMA: own}
    groups = {name: items for name, items in groups.items() if items}
    with torch.inference_mode():
        timings = interleaved({name: afresh(items) for name, items in groups.items()}, rounds, "time of one image")
    return {
        name: {
            "wall ms": timing.wall * 1e3,
            "processor ms": timing.processor * 1e3,
            "spread": timing.spread,
            "peak MB": peak_memory("benchmarks.quality.one_run", str(folder), str(checkpoint), *groups[name]),
        }
        for name, timing in timings.items()
    }


def conditions() -> dict[str, Any]:
    """What the times hang on."""
    return {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
