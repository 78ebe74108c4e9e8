"""Fits the last layer of the single-cell head anew for the classes of one group, and leaves everything else as it is.

`python -m tools.refit_group CHECKPOINT FOLDER --group field DATA...` writes a copy of a checkpoint. What the features of crops
tell, the last layer may not have learned: of few samples, and where features differ little. The fit is a logistic regression of
the group's classes, on the train split, each class weighing alike; crops of other classes are to stay what they are, and those
labelled with a group one of it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn

from unihema.errors import InputError
from unihema.loading import load_model
from unihema.training.data.class_tree import as_known
from unihema.training.data.dataset import SmearDataset
from unihema.training.run.build import load_rows
from unihema.training.run.checkpoint import save_trained
from unihema.training.run.config import DataConfig


# Of the fit.
STEPS = 1000
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
    features: torch.Tensor,
    logits: torch.Tensor,
    allowed: torch.Tensor,
    classes: torch.Tensor,
    weights: torch.Tensor,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and biases of some classes under which the labels are most probable, those of all others being what they are.

    Args:
        features (`torch.Tensor`): `[n, width]`.
        logits (`torch.Tensor`): Of all classes `[n, classes]`.
        allowed (`torch.Tensor`): Which classes each one's label is made of, bool `[n, classes]`.
        classes (`torch.Tensor`): Numbers of the classes to fit, int64 `[m]`.
        weights (`torch.Tensor`): How much each one counts `[n]`.
        decay (`float`): Weight of the squared coefficients, of features of unit deviation.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `[m, width]` and `[m]`.
    """
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-4)
    scaled = (features - mean) / spread
    layer = nn.Linear(features.shape[1], len(classes))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    weights = weights / weights.sum()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        told = logits.index_copy(1, classes, layer(scaled))
        missed = told.logsumexp(1) - told.masked_fill(~allowed, -torch.inf).logsumexp(1)
        value = weights @ missed + decay * layer.weight.square().sum()
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
@click.option(
    "--decay", type=click.FloatRange(0), default=1e-5, show_default=True, help="Weight of squared coefficients."
)
def main(checkpoint: Path, folder: Path, data: tuple[Path, ...], group: str, boxes: bool, decay: float) -> None:
    """Fit the last layer for the classes of a group."""
    if folder.exists() and any(folder.iterdir()):
        raise click.UsageError(f"{folder} is not empty: name another folder.")
    model, processor = load_model(checkpoint, device="cpu")
    config = model.config
    made_of = dict(zip(config.single_cell_names, config.single_cell_members, strict=True))
    if group not in made_of:
        raise InputError(f"no single-cell group {group!r}; there are {', '.join(made_of)}.")
    members = made_of[group]
    names = [name for name, member in zip(config.single_cell_labels, members, strict=True) if member]
    read = DataConfig(folders=list(map(str, data)), tasks=["single_cell"], boxes_as_crops=boxes)
    rows = _drawn(as_known(load_rows(read, "train")["single_cell"], list(made_of)), names)
    if unknown := sorted({row["label"] for row in rows} - set(made_of)):
        raise InputError(f"the checkpoint does not know {', '.join(unknown)}: leave these data out.")
    missing = [name for name in names if name not in {row["label"] for row in rows}]
    if missing or len(names) < 2:
        raise InputError(
            f"{group} needs rows of two classes or more, and has none of {', '.join(missing) or 'a second'}."
        )
    classes = torch.tensor([config.single_cell_labels.index(name) for name in names])
    allowed = torch.tensor([made_of[row["label"]] for row in rows])
    within = torch.tensor([row["label"] in names for row in rows])
    beside = ~allowed[:, classes].any(1)
    if not beside.any():
        raise InputError(f"Name data folders of other crops, too: by {group} alone nothing tells it from them.")
    # Each class weighs alike, and all that is none of them as much as they do together.
    counts = Counter(row["label"] for row in rows)
    weights = torch.tensor([1 / counts[row["label"]] for row in rows])
    weights[~within] = len(names) / int((~within).sum())
    features = hidden_features(model, processor, rows)
    last = model.single_cell_head.layers[-1]
    with torch.inference_mode():
        logits = last(features)
    features, logits = features.clone(), logits.clone()
    right = [_right(logits, allowed, classes, within)]
    weight, bias = fitted_rows(features, logits, allowed, classes, weights, decay)
    with torch.no_grad():
        last.weight[classes], last.bias[classes] = weight, bias
        logits[:, classes] = features @ weight.T + bias
    right.append(_right(logits, allowed, classes, within))
    taken = float(torch.isin(logits.argmax(1), classes)[beside].float().mean())
    click.echo(
        f"{group}, {int(within.sum())} training rows: {right[0]:.3f} right before, {right[1]:.3f} now; of "
        f"{int(beside.sum())} others {taken:.3f} are called so"
    )
    save_trained(model, processor, folder)
    click.echo(f"Written to {folder}.")


def _right(logits: torch.Tensor, allowed: torch.Tensor, classes: torch.Tensor, within: torch.Tensor) -> float:
    """Share of the rows of the classes that are told from each other."""
    best = classes[logits[:, classes].argmax(1)]
    return float(allowed.gather(1, best[:, None])[within].float().mean())


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
