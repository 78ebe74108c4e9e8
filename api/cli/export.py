"""`unihema export`: a checkpoint as an ONNX file."""

from pathlib import Path

import typer


def export(
    checkpoint: Path = typer.Argument(..., help="Checkpoint folder."),
    output: Path = typer.Argument(..., help="The new .onnx file."),
    task: str = typer.Option("detection", "--task", "-t", help="detection or single_cell."),
) -> None:
    """Export a checkpoint's detection or single-cell path to ONNX; `unihema predict` takes the file as a checkpoint."""
    import logging

    from unihema.onnx_export import export_onnx

    for name in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = export_onnx(checkpoint, output, task)
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB, {task}).")
