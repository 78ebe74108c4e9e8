"""Time and memory of the finished models on one image each: alone, and all tasks one after another.

`python -m benchmarks.peers.speed FOLDER CHECKPOINT ITEM...` runs models once and says the memory that takes.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import interleaved, peak_memory, say_peak
from benchmarks.peers.comparison import UNIHEMA, load_example, unihema_item
from benchmarks.peers.peer import Peer
from benchmarks.peers.peers import ATTRIBUTES, PEERS, task_of
from unihema.inference.prepare import prepare_for_inference
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


def runners(folder: Path, items: Sequence[str], unihema: Any) -> dict[str, Callable[[dict], Any]]:
    """For each model a function that runs it on its example, on the CPU.

    It is given a dictionary, in which UniHema leaves the features of the image for its further tasks on the same one.

    Args:
        folder (`Path`): Of the comparison.
        items (`Sequence[str]`): Peers, and UniHema's tasks as [`unihema_item`] names them.
        unihema (`UniHemaForMultiTask`, *optional*): Needed for its tasks.
    """
    found = {}
    for item in items:
        if item in PEERS:
            compared, own = PEERS[item].compared, folder / item
            found[item] = _peer_runner(
                PEERS[item].build.from_pretrained(own), task_of(compared), _inputs(folder, own, compared)
            )
        else:
            compared = item.split("/")[1]
            inputs = _inputs(folder, folder / UNIHEMA, compared)
            found[item] = _unihema_runner(unihema, task_of(compared), inputs, _IMAGE_OF.get(compared, compared))
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


def _peer_runner(model: Peer, task: str, inputs: dict[str, torch.Tensor]) -> Callable[[dict], Any]:
    length = _answer_length(task, inputs)
    return lambda _: model.generate(**inputs, **length) if length else model(**inputs)


def _unihema_runner(model: Any, task: str, inputs: dict[str, torch.Tensor], image: str) -> Callable[[dict], Any]:
    length = _answer_length(task, inputs)
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "pixel_mask")}
    image = (image, tuple(pixels["pixel_values"].shape))

    def run(features: dict) -> Any:
        if image not in features:
            features[image] = model.get_image_features(**pixels, task=task)
        if length:
            return model.generate(**inputs, **length, image_features=features[image])
        return model(task=task, **inputs, image_features=features[image])

    return run


def _answer_length(task: str, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Settings of `generate` for as many tokens as the true answer has, so that no model is faster for saying less; none for
    tasks that answer no text."""
    if task not in LANGUAGE_TASKS:
        return {}
    tokens = int((inputs.pop("labels") >= 0).sum())
    return {"min_new_tokens": tokens, "max_new_tokens": tokens, "num_beams": 1, "do_sample": False}


def measure(
    folder: Path, peers: Sequence[str], best: Sequence[str], tasks: Sequence[str], checkpoint: str | Path, rounds: int
) -> dict[str, dict[str, float]]:
    """Times all models in turn, then each one's memory in a process of its own.

    UniHema is prepared for inference; where it does all tasks, those on the same image share its features.

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
    run = runners(folder, [*peers, *own], load_prepared(checkpoint))

    def one_after_another(items: Sequence[str]) -> None:
        features: dict = {}
        for item in items:
            run[item](features)

    groups = {item: [item] for item in run} | {ALL_PEERS: list(best), UNIHEMA: own}
    groups = {name: items for name, items in groups.items() if items}
    with torch.inference_mode():
        cases = {name: partial(one_after_another, items) for name, items in groups.items()}
        timings = interleaved(cases, rounds, "time of one image")
    return {
        name: {
            "wall ms": timing.wall * 1e3,
            "processor ms": timing.processor * 1e3,
            "spread": timing.spread,
            "peak MB": peak_memory("benchmarks.peers.speed", str(folder), str(checkpoint), *groups[name]),
        }
        for name, timing in timings.items()
    }


def load_prepared(checkpoint: str | Path) -> Any:
    """UniHema's checkpoint on the CPU, prepared for inference."""
    model, _ = load_model(checkpoint, "cpu")
    prepare_for_inference(model)
    return model


def conditions() -> dict[str, Any]:
    """What the times hang on."""
    return {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}


if __name__ == "__main__":
    folder, checkpoint, *items = sys.argv[1:]
    unihema = None if all(item in PEERS for item in items) else load_prepared(checkpoint)
    with torch.inference_mode():
        features: dict = {}
        for run in runners(Path(folder), items, unihema).values():
            run(features)
    say_peak()
