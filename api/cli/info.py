"""`unihema info`: versions for a bug report, and what a checkpoint is."""

import json
import platform
from pathlib import Path

import typer

from .figures import figures_text


PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "evaluate", "safetensors", "timm")


def info(checkpoint: Path = typer.Argument(None, help="Checkpoint folder.")) -> None:
    """Show versions, and of a checkpoint its size, tasks, classes, thresholds and measured figures."""
    from importlib import metadata

    import torch

    from unihema.version import __version__

    typer.echo(f"unihema {__version__}, Python {platform.python_version()}, {platform.platform()}")
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    typer.echo(", ".join(found))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    typer.echo(f"{torch.get_num_threads()} threads, {gpu}")
    if checkpoint is None:
        return

    from unihema.checkpoint_files import adapter_base, fingerprint, is_adapter
    from unihema.loading import available_tasks, load_model

    model, processor = load_model(checkpoint, device="cpu")
    config = model.config
    typer.echo(f"\n{checkpoint}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters")
    if is_adapter(checkpoint):
        (adapter,) = model.peft_config.values()
        rank = f", rank {adapter.r}" if hasattr(adapter, "r") else ""
        typer.echo(f"adapter ({adapter.peft_type.value}{rank}) of {adapter_base(checkpoint)}")
    for name, digest in fingerprint(checkpoint).items():
        if name.endswith(".safetensors"):
            typer.echo(f"{name}: sha256 {digest}")
    tasks = available_tasks(model)
    typer.echo(f"tasks: {', '.join(tasks)}")
    if "detection" in tasks:
        thresholds = config.trained.detection_thresholds
        shown = [
            f"{name} ({thresholds[name]:.2f})" if name in thresholds else name for name in config.id2label.values()
        ]
        typer.echo(f"detection classes (threshold): {', '.join(shown)}")
        for name, values in config.morphology.items():
            typer.echo(f"  {name}: {', '.join(values)}")
    if "single_cell" in tasks:
        typer.echo(f"single-cell classes: {', '.join(config.single_cell_labels)}")
    sizes = processor.image_processor.task_sizes
    typer.echo("image sizes: " + ", ".join(f"{task} {max(sizes[task].values())} px" for task in tasks))
    run = checkpoint / "run_config.json"
    folders = json.loads(run.read_text(encoding="utf-8"))["data"]["folders"] if run.is_file() else ["not recorded"]
    typer.echo(f"licence: code Apache-2.0; weights as their training data ({', '.join(folders)})")
    metrics = checkpoint / "metrics.json"
    if metrics.is_file():
        typer.echo("measured on validation data:")
        for task, figures in json.loads(metrics.read_text(encoding="utf-8")).items():
            typer.echo(f"  {task}: {figures_text(figures)}")
    else:
        typer.echo("nothing was measured on validation data")
