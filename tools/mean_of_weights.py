"""The mean of the weights of several checkpoints: of runs that went on from one start.

`python -m tools.mean_of_weights CHECKPOINT CHECKPOINT... FOLDER` writes the first checkpoint with the mean weights of all. What
was fitted to its scores (thresholds, calibration) is to be fitted anew.
"""

import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from unihema.errors import InputError
from unihema.files import whole_folder


def mean_of_weights(checkpoints: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of tensors of the same names and shapes; of whole numbers those of the first.

    Args:
        checkpoints (`list[dict[str, torch.Tensor]]`): Name -> tensor of each.

    Raises:
        InputError: One has other tensors.
    """
    first, *others = checkpoints
    for other in others:
        odd = sorted(first.keys() ^ other.keys())
        odd += [name for name in first.keys() & other.keys() if first[name].shape != other[name].shape]
        if odd:
            raise InputError(f"the checkpoints have not the same weights: {odd[0]} and {len(odd) - 1} others differ.")
    return {
        name: torch.stack([each[name].float() for each in checkpoints]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
def main(checkpoints: tuple[Path, ...], folder: Path) -> None:
    """Average the weights of checkpoints."""
    if len(checkpoints) < 2:
        raise click.UsageError("Name two checkpoints or more, then the folder.")
    if folder.exists() and any(folder.iterdir()):
        raise click.UsageError(f"{folder} is not empty: name another folder.")
    mean = mean_of_weights([load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints])
    with whole_folder(folder) as whole:
        for path in sorted(checkpoints[0].iterdir()):
            # Not the run's log and its checkpoints, nor figures that are not of these weights.
            if path.is_file() and path.suffix in (".json", ".jinja", ".py") and path.name != "metrics.json":
                shutil.copyfile(path, whole / path.name)
        save_file(mean, whole / "model.safetensors", metadata={"format": "pt"})
    click.echo(f"The mean of {len(checkpoints)} checkpoints is in {folder}.")


if __name__ == "__main__":
    main()
