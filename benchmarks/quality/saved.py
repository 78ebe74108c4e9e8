"""A trained peer on disk, and one example for each model to be timed with."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save, save_model

from benchmarks.quality.compared import task_of
from benchmarks.quality.peer import Peer, model_inputs
from benchmarks.quality.peers import PEERS
from unihema.files import write_atomically
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS
from unihema.training.data.class_tree import as_known
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.rows import Row


WEIGHTS = "model.safetensors"


def save_peer(peer: Peer, folder: Path) -> None:
    """Saves weights and configuration, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    peer.config.save_pretrained(folder)
    partial = folder / f".{WEIGHTS}.partial"
    save_model(peer.cpu(), str(partial))
    os.replace(partial, folder / WEIGHTS)


def load_peer(folder: Path) -> Peer:
    """A peer that [`save_peer`] saved into a folder of the peer's name, in eval mode on the CPU."""
    peer = PEERS[folder.name].build(UniHemaConfig.from_pretrained(folder))
    load_model(peer, str(folder / WEIGHTS))
    return peer.eval()


def save_example(folder: Path, compared: str, model, processor, rows: list[Row]) -> None:
    """Saves the inputs of the first validation image; where the task has questions one of them, and its true answer's tokens.

    Args:
        folder (`Path`): Of the model.
        compared (`str`): What the model does, of `COMPARED`.
        model ([`Peer`] or `UniHemaForMultiTask`): With the classes that the rows have.
        processor (`UniHemaProcessor`): Makes the inputs.
        rows (`list[Row]`): Validation rows.
    """
    task = task_of(compared)
    config, names = model.config, list(model.config.id2label.values())
    known = {"detection": names, "single_cell": config.single_cell_labels}
    first = as_known(rows[:1], known[task]) if task in known else rows[:1]
    dataset = SmearDataset(
        first,
        processor,
        task,
        class_names=names,
        single_cell_labels=config.single_cell_labels,
        morphology=config.morphology,
        evaluation=True,
        text_only=getattr(model, "text_only", False),
    )
    batch = dataset.collate([dataset[0]])
    inputs = {name: value.contiguous() for name, value in model_inputs(batch).items()}
    if task in LANGUAGE_TASKS:
        inputs["labels"] = batch["labels"]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(_example(folder, compared), lambda file: file.write(save(inputs)))


def load_example(folder: Path, compared: str) -> dict[str, torch.Tensor]:
    """The inputs that [`save_example`] saved."""
    return load_file(str(_example(folder, compared)))


def _example(folder: Path, compared: str) -> Path:
    return folder / f"example-{compared}.safetensors"
