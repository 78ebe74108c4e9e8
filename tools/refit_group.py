"""Fits the last layer of the single-cell head anew for the classes of one group, and leaves everything else as it is.

`python -m tools.refit_group CHECKPOINT FOLDER --group field DATA...` writes a copy of a checkpoint. What the features of crops
tell, the last layer may not have learned: of few samples, and where features differ little. The fit is a logistic regression of
the group's classes and of crops of other data folders, which stay what they are; on the train split, each class weighing alike.
"""

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn

from unihema.errors import InputError
from unihema.loading import load_model
from unihema.training.data.dataset import SmearDataset
from unihema.training.run.build import load_rows
from unihema.training.run.checkpoint import save_trained
from unihema.training.run.config import DataConfig


# Weight of the squared coefficients, and steps of the fit.
DECAY, STEPS = 1e-5, 1000
# Crops of each data set that are not of the group.
BESIDE = 300


def hidden_features(model, processor, rows: Sequence[dict]) -> torch.Tensor:
    """What the last layer of the single-cell head sees of each row's crop, `[n, width]`.

    Args:
        model (`UniHemaForMultiTask`): The model, in evaluation mode.
        processor (`UniHemaProcessor`): Its processor.
        rows (`Sequence[dict]`): Of single cells.
    """
    data = SmearDataset(
        rows, processor, "single_cell", single_cell_labels=model.config.single_cell_names, evaluation=True
    )
    seen = []
    with torch.inference_mode():
        for start in range(0, len(data), 32):
            batch = data.collate([data[number] for number in range(start, min(start + 32, len(data)))])
            outputs = model(task="single_cell", pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
            seen.append(model.single_cell_head.layers[:-1](outputs.features))
    return torch.cat(seen)


def fitted_rows(
    features: torch.Tensor, true: torch.Tensor, others: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and biases of the classes of a group by which features tell them from each other and from all else.

    Args:
        features (`torch.Tensor`): `[n, width]`.
        true (`torch.Tensor`): Number of each one's class in the group, and `classes` for what is not of the group, int64 `[n]`.
        others (`torch.Tensor`): Logarithm of the sum of the exponentials of all other classes' logits `[n]`.
        classes (`int`): Of the group.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `[classes, width]` and `[classes]`.
    """
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-4)
    scaled = (features - mean) / spread
    layer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    alike = 1 / torch.bincount(true, minlength=classes + 1).clamp(min=1).float()
    # All that is not of the group weighs as much as the group does.
    alike[-1] *= classes
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        told = torch.cat((layer(scaled), others[:, None]), 1)
        value = nn.functional.cross_entropy(told, true, alike) + DECAY * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = layer.weight.detach() / spread
    return weight, layer.bias.detach() - weight @ mean


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--group", required=True, help="Group of single-cell classes, such as `field`.")
@click.option("--boxes", is_flag=True, help="Boxes of fields as crops, too.")
def main(checkpoint: Path, folder: Path, data: tuple[Path, ...], group: str, boxes: bool) -> None:
    """Fit the last layer for the classes of a group."""
    if folder.exists() and any(folder.iterdir()):
        raise click.UsageError(f"{folder} is not empty: name another folder.")
    model, processor = load_model(checkpoint, device="cpu")
    config = model.config
    if group not in config.single_cell_names:
        raise InputError(f"no single-cell group {group!r}; there are {', '.join(config.single_cell_names)}.")
    members = config.single_cell_members[config.single_cell_names.index(group)]
    names = [name for name, member in zip(config.single_cell_labels, members, strict=True) if member]
    read = DataConfig(folders=list(map(str, data)), tasks=["single_cell"], boxes_as_crops=boxes)
    rows = _drawn(load_rows(read, "train")["single_cell"], names)
    missing = [name for name in names if name not in {row["label"] for row in rows}]
    if missing or len(names) < 2:
        raise InputError(
            f"{group} needs rows of two classes or more, and has none of {', '.join(missing) or 'a second'}."
        )
    true = torch.tensor([names.index(row["label"]) if row["label"] in names else len(names) for row in rows])
    if not (true == len(names)).any():
        raise InputError(f"Name data folders of other crops, too: by {group} alone nothing tells it from them.")
    features = hidden_features(model, processor, rows)
    last = model.single_cell_head.layers[-1]
    numbers = torch.tensor([config.single_cell_labels.index(name) for name in names])
    with torch.inference_mode():
        logits = last(features)
    features, logits = features.clone(), logits.clone()
    right = [float((logits[:, numbers].argmax(1) == true)[true < len(names)].float().mean())]
    logits[:, numbers] = -torch.inf
    weight, bias = fitted_rows(features, true, logits.logsumexp(1), len(names))
    with torch.no_grad():
        last.weight[numbers], last.bias[numbers] = weight, bias
        logits[:, numbers] = features @ weight.T + bias
    right.append(float((logits[:, numbers].argmax(1) == true)[true < len(names)].float().mean()))
    taken = float((logits.argmax(1)[true == len(names)][:, None] == numbers).any(1).float().mean())
    click.echo(
        f"{group}, {int((true < len(names)).sum())} training rows: {right[0]:.3f} right before, {right[1]:.3f} now; of "
        f"{int((true == len(names)).sum())} others {taken:.3f} are called so"
    )
    save_trained(model, processor, folder)
    click.echo(f"Written to {folder}.")


def _drawn(rows: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """All rows of the classes, and of each data set `BESIDE` others."""
    kept = [row for row in rows if row["label"] in names]
    beside: dict[str, list[dict]] = {}
    for row in rows:
        if row["label"] not in names:
            beside.setdefault(row["dataset"], []).append(row)
    generator = np.random.default_rng(0)
    for others in beside.values():
        chosen = generator.permutation(len(others))[:BESIDE]
        kept += [others[number] for number in sorted(chosen.tolist())]
    return kept


if __name__ == "__main__":
    main()
