"""`unihema predict`: cells, masks and answers of many images."""

from pathlib import Path

import typer

from .options import IMAGE_SIZE_HELP, pairs


def predict(
    checkpoint: Path = typer.Argument(..., help="Checkpoint folder, or a file made by `unihema export`."),
    inputs: list[str] = typer.Argument(..., help="Image files, folders and glob patterns."),
    output: Path = typer.Option("results", "--output", "-o", help="Folder for the results."),
    task: list[str] = typer.Option([], "--task", "-t", help="detection, segmentation or single_cell; may be repeated."),
    prompt: str = typer.Option(None, help="Class names, or a disease, to look for."),
    question: list[str] = typer.Option([], "--question", "-q", help="A question about each image; may be repeated."),
    threshold: float = typer.Option(None, help="Smallest score; the checkpoint's calibrated ones by default."),
    geojson: bool = typer.Option(False, help="Also write GeoJSON for QuPath."),
    overwrite: bool = typer.Option(False, help="Analyse again what was analysed before."),
    image_size: list[str] = typer.Option([], help=IMAGE_SIZE_HELP),
    device: str = typer.Option(None, help="Such as cpu or cuda:0."),
    batch_size: int = typer.Option(1, min=1, help="Images of one size analysed together; more is faster on a GPU."),
    int8: bool = typer.Option(False, "--int8", help="8-bit linear layers on the CPU: faster, less exact."),
) -> None:
    """Find and describe the cells of images: overlays, cells.csv, counts.csv and results.json.

    Stopped runs go on where they stopped. Exit code 1: some files could not be analysed; they are listed.
    """
    import warnings

    from tqdm.auto import tqdm

    from unihema.analyzer import Analyzer, QueryCapWarning
    from unihema.files import printable

    image_sizes = pairs(image_size, "--image-size", "detection=480", int)
    # Shown beside the bar, from the result.
    warnings.simplefilter("ignore", QueryCapWarning)

    # The bar appears with the first image, so that a wrong checkpoint is one line and nothing else.
    bar = tqdm(desc="predict", unit="image", disable=True)

    def on_image(number: int, total: int, path: Path, outcome) -> None:
        nonlocal bar
        if number == 1:
            bar = tqdm(desc="predict", unit="image", total=total)
        bar.update(1)
        problems = [outcome] if isinstance(outcome, str) else outcome.warnings if outcome else []
        for problem in problems:
            tqdm.write(printable(f"{path}: {problem}"))

    try:
        analyzer = Analyzer.from_pretrained(checkpoint, device=device, image_sizes=image_sizes, int8=int8)
        report = analyzer.analyze_files(
            inputs,
            output,
            tasks=list(task) or None,
            prompt=prompt,
            questions=question,
            threshold=threshold,
            geojson=geojson,
            overwrite=overwrite,
            batch_size=batch_size,
            on_image=on_image,
        )
    finally:
        bar.close()
    typer.echo(f"{len(report.analysed)} analysed, {len(report.skipped)} already done, {len(report.failed)} failed.")
    if report.totals:
        typer.echo("Cells: " + ", ".join(f"{label} {count}" for label, count in report.totals.items()))
    typer.echo(f"Results in {output}.")
    if report.failed:
        for item, problem in report.failed.items():
            typer.echo(printable(f"failed: {item}: {problem}"), err=True)
        raise typer.Exit(1)
