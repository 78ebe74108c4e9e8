"""Commands that use a checkpoint: `predict`, `merge`, `ask`, `info` and `demo`."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    PATH,
    batch_size_option,
    device_option,
    image_size_option,
    int8_option,
    of_all_tasks,
    of_each_task,
    output_option,
    overwrite_option,
    task_option,
)


if TYPE_CHECKING:
    from unihema.progress import Progress
    from unihema.result_shards import Shard

# Those of unihema.results.export, which would take PyTorch to import; a test compares them.
FORMATS = ("geojson", "coco", "labels", "imagej", "label_studio")
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "evaluate", "safetensors", "timm")
# Images of which less is looked at have no bar of their own.
LONG = {"tile": 48, "crop": 1000}
DEMO_QUESTIONS = (
    "What type of white blood cell is this?",
    "What is the shape of the nucleus?",
    "What is the colour of the granules?",
)


def _tiles(context: click.Context, parameter: click.Parameter, value: str) -> str | int:
    if value in ("auto", "off"):
        return value
    if not value.isascii() or not value.isdigit():
        raise click.BadParameter(f"{value!r} is neither auto nor off, nor a number of pixels.")
    return int(value)


@click.command()
@click.argument("checkpoint")
@click.argument("images", nargs=-1, required=True)
@output_option(default="results", show_default=True)
@task_option()
@click.option("--prompt", help="Class names, or a disease, to look for.")
@click.option("--question", "-q", "questions", multiple=True, help="Question about each image; may be repeated.")
@click.option("--threshold", type=float, help="Smallest score; the checkpoint's calibrated ones by default.")
@click.option(
    "--tiles", default="auto", show_default=True, metavar="auto|off|PIXELS", callback=_tiles,
    help="Longer edge of the tiles in which an image is seen; by the size of its cells, or whole.",
)  # fmt: skip
@click.option(
    "--um-per-pixel",
    type=float,
    help="Size of a pixel in micrometres; otherwise as the file says, or by the red cells that are found.",
)
@click.option(
    "--white-cells",
    type=click.IntRange(1),
    metavar="NUMBER",
    help="On a slide look for white cells alone, until so many are found.",
)
@click.option(
    "--cell-labels", "labels", help="What a single cell may be: classes or groups of them, with commas; all by default."
)
@click.option(
    "--framing",
    type=click.Choice(("auto", "off")),
    default="auto",
    show_default=True,
    help="See a crop of a nucleated cell in the frame and colours of the training, too.",
)
@click.option(
    "--second-look/--no-second-look",
    default=None,
    help="Type nucleated cells of fields from their crops, too; as the checkpoint says by default.",
)
@click.option(
    "--parasites",
    is_flag=True,
    help="Look at the crop of each red cell for malaria parasites, and call those infected that have one.",
)
@click.option(
    "--format", "formats", type=click.Choice(FORMATS), multiple=True,
    help="Also write a file for QuPath (geojson), of COCO, of instances (labels), of ImageJ's ROIs, or of predictions for Label "
    "Studio; may be repeated.",
)  # fmt: skip
@click.option(
    "--shard", metavar="NUMBER/OF|slurm",
    help="Analyse one part of the images, such as 3/8, or that of the task of a Slurm array; then `unihema merge`.",
)  # fmt: skip
@image_size_option
@batch_size_option
@device_option
@int8_option
@overwrite_option
def predict(
    checkpoint: str,
    images: tuple[str, ...],
    output: Path,
    tasks: tuple[str, ...],
    prompt: str | None,
    questions: tuple[str, ...],
    threshold: float | None,
    tiles: str | int,
    um_per_pixel: float | None,
    white_cells: int | None,
    labels: str | None,
    framing: str,
    second_look: bool | None,
    parasites: bool,
    formats: tuple[str, ...],
    shard: str | None,
    image_sizes: Sequence[tuple[str | None, int]],
    batch_sizes: Sequence[tuple[str | None, int]],
    device: str,
    int8: bool,
    overwrite: bool,
) -> None:
    """Find and describe the cells of images.

    CHECKPOINT is a folder, an adapter, a file made by `unihema export`, or a repository on the Hub. IMAGES are files, folders
    and glob patterns. Writes overlays, cells.csv, counts.csv and results.json.

    Exit code 1: some files could not be analysed; they are listed.
    """
    import warnings

    from tqdm.auto import tqdm

    from unihema.analyzer import Analyzer, QueryCapWarning
    from unihema.files import printable
    from unihema.result_merging import merge_results
    from unihema.result_shards import Shard

    batch_size = of_all_tasks(batch_sizes, "--batch-size", 1)
    part = None if shard is None else Shard.parse(shard)
    # Of `accelerate launch`: each process has a part of this part, on its own device.
    together = Processes()
    part = together.part(part)
    device = together.device if together.device and device == "auto" else device
    # Shown beside the bar, from the result.
    warnings.simplefilter("ignore", QueryCapWarning)

    # The bar appears with the first image, so that a wrong checkpoint is one line and nothing else.
    bar = tqdm(desc="predict", unit="image", disable=True)

    of_image = ImageBar()

    def on_image(number: int, total: int, path: Path, outcome: Any) -> None:
        nonlocal bar
        if number == 1:
            bar = tqdm(desc="predict", unit="image", total=total, disable=not together.is_first)
        bar.update(1)
        problems = [outcome] if isinstance(outcome, str) else outcome.warnings if outcome else []
        for problem in problems:
            tqdm.write(printable(f"{path}: {problem}"))

    try:
        sizes = of_each_task(image_sizes, tasks)
        analyzer = Analyzer.from_pretrained(checkpoint, device=device, image_sizes=sizes, int8=int8)
        report = analyzer.analyze_files(
            images,
            output,
            tasks=list(tasks) or None,
            prompt=prompt,
            questions=questions,
            threshold=threshold,
            formats=formats,
            overwrite=overwrite,
            batch_size=batch_size,
            on_image=on_image,
            tiles=tiles,
            um_per_pixel=um_per_pixel,
            white_cells=white_cells,
            labels=None if labels is None else [name.strip() for name in labels.split(",")],
            framing=framing,
            second_look=second_look,
            parasites=parasites,
            on_progress=of_image,
            shard=part,
        )
    finally:
        bar.close()
        of_image.close()
    click.echo(f"{len(report.analysed)} analysed, {len(report.skipped)} already done, {len(report.failed)} failed.")
    if report.other_settings:
        click.echo(f"{report.other_settings} results of other settings are in the folder and not in its tables.")
    if report.gone:
        named = printable(report.gone[0])
        click.echo(f"{len(report.gone)} images in the tables are no longer where they were analysed, such as {named}.")
    if report.totals:
        click.echo("Cells: " + ", ".join(f"{label} {count}" for label, count in report.totals.items()))
    click.echo(f"Results in {output if part is None else output / part.folder}.")
    if together.merge(shard is None):
        merged = merge_results(output)
        click.echo(f"{merged.images} images of all processes in {output}.")
    if report.failed:
        for item, problem in report.failed.items():
            click.echo(printable(f"failed: {item}: {problem}"), err=True)
        raise click.exceptions.Exit(1)


class ImageBar:
    """How far the work on one image is, shown as a bar; there is none where little is looked at."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._about: tuple[str | None, str] | None = None
        self._cells_before = 0

    def __call__(self, now: "Progress") -> None:
        """Shows it."""
        from tqdm.auto import tqdm

        if (now.image, now.unit) != self._about:
            # The image before may have ended before all of it was seen.
            self.close()
        if now.total < LONG[now.unit]:
            return
        if self._bar is None:
            self._about, self._cells_before = (now.image, now.unit), now.cells
            # What a run that was stopped has done is not counted in the speed.
            name = Path(now.image or "image").name
            self._bar = tqdm(desc=name, unit=now.unit, total=now.total, initial=now.done, leave=False)
        self._bar.update(now.done - self._bar.n)
        seconds = self._bar.format_dict["elapsed"]
        if now.unit == "tile" and seconds > 0:
            self._bar.set_postfix_str(f"{now.cells} cells, {(now.cells - self._cells_before) / seconds:.0f} a second")
        if now.done == now.total:
            self.close()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._about = None


class Processes:
    """The processes of `accelerate launch`, or this one alone.

    Attributes:
        device (`str`, *optional*): That of this process.
        is_first (`bool`): Whether it speaks for all.
    """

    def __init__(self) -> None:
        self.device, self.is_first, self._state = None, True, None
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            import torch
            from accelerate import PartialState

            # Without a GPU, unless it is told, it takes each process for one alone.
            self._state = PartialState(cpu=not torch.cuda.is_available())
            self.device, self.is_first = str(self._state.device), self._state.is_main_process

    def part(self, shard: "Shard | None") -> "Shard | None":
        """The shard of this process."""
        if self._state is None:
            return shard
        from unihema.result_shards import Shard

        number, of = shard or (1, 1)
        count = self._state.num_processes
        return Shard((number - 1) * count + self._state.process_index + 1, of * count)

    def merge(self, whole: bool) -> bool:
        """Waits for the other processes; whether this one has to make the tables of all, which were given the `whole` of the
        images."""
        if self._state is None:
            return False
        self._state.wait_for_everyone()
        return whole and self.is_first


@click.command()
@click.argument("results", type=PATH)
def merge(results: Path) -> None:
    """Make one results folder of shards.

    RESULTS is the folder given to `unihema predict --shard`; it gets overlays, cells.csv, counts.csv and results.json of all
    images, each once.

    Exit code 1: some shards or images are missing, or some files could not be analysed; they are listed.
    """
    from tqdm.auto import tqdm

    from unihema.files import printable
    from unihema.result_merging import merge_results

    with tqdm(desc="merge", unit="image") as bar:

        def on_image(number: int, total: int) -> None:
            bar.total = total
            bar.update(number - bar.n)

        report = merge_results(results, on_image)
    again = f", {report.repeated} results of an image that was counted already" if report.repeated else ""
    click.echo(f"{report.images} images, {len(report.failed)} failed{again}.")
    if report.totals:
        click.echo(printable("Cells: " + ", ".join(f"{label} {count}" for label, count in report.totals.items())))
    problems = [*report.problems, *(f"failed: {item}: {text}" for item, text in report.failed.items())]
    for problem in problems:
        click.echo(printable(problem), err=True)
    if problems:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("checkpoint")
@click.argument("image", type=PATH)
@click.argument("questions", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Answer as JSON.")
@device_option
def ask(checkpoint: str, image: Path, questions: tuple[str, ...], as_json: bool, device: str) -> None:
    """Answer questions about an image.

    CHECKPOINT is a folder, an adapter, or a repository on the Hub. QUESTIONS may also be sentences with ___ where a word is to
    be filled in. How many cells there are, whether there are any and what per cent they are is counted among the cells that are
    found; where text and heads disagree, a line on standard error says so. With --json all that supports an answer.
    """
    from unihema.analyzer import Analyzer
    from unihema.files import printable

    answers = Analyzer.from_pretrained(checkpoint, device=device).ask(image, questions)
    if as_json:
        listed = [{"question": each.question, "answer": each.answer, **each.support()} for each in answers]
        click.echo(json.dumps(listed, ensure_ascii=True, indent=2))
        return
    for each in answers:
        click.echo(printable(each.answer if len(questions) == 1 else f"{each.question} {each.answer}"))
        for said in (each.disagreement, each.note):
            if said:
                click.echo(printable(f"  {said}"), err=True)


@click.command()
@click.argument("checkpoint", type=PATH, required=False)
def info(checkpoint: Path | None) -> None:
    """Show versions, and what a checkpoint is.

    That is its size, tasks, classes, thresholds and measured figures. CHECKPOINT is a folder or an adapter; without one the
    versions are shown alone, for a bug report.
    """
    from importlib import metadata

    import torch

    from unihema.version import __version__

    click.echo(f"unihema {__version__}, Python {platform.python_version()}, {platform.platform()}")
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    click.echo(", ".join(found))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    click.echo(f"{torch.get_num_threads()} threads, {gpu}")
    if checkpoint is not None:
        _show_checkpoint(checkpoint)


def _show_checkpoint(checkpoint: Path) -> None:
    from unihema.checkpoint_files import adapter_base, fingerprint, is_adapter, is_onnx, read_json
    from unihema.errors import CheckpointError
    from unihema.files import printable
    from unihema.loading import available_tasks, load_model
    from unihema.training.evaluation.report import figures_text, read_figures

    model, processor = load_model(checkpoint, device="cpu")
    config = model.config
    size = "" if is_onnx(checkpoint) else f", {model.num_parameters() / 1e6:.1f} M parameters"
    click.echo(f"\n{checkpoint}: {type(model).__name__}{size}")
    if is_adapter(checkpoint):
        (adapter,) = model.peft_config.values()
        rank = f", rank {adapter.r}" if hasattr(adapter, "r") else ""
        click.echo(f"adapter ({adapter.peft_type.value}{rank}) of {adapter_base(checkpoint)}")
    for name, digest in fingerprint(checkpoint).items():
        if name.endswith(".safetensors"):
            click.echo(f"{name}: sha256 {digest}")
    tasks = available_tasks(model)
    click.echo(f"tasks: {', '.join(tasks)}")
    if "detection" in tasks:
        thresholds = config.trained.detection_thresholds
        shown = [
            f"{name} ({thresholds[name]:.2f})" if name in thresholds else name for name in config.id2label.values()
        ]
        click.echo(f"detection classes (threshold): {', '.join(shown)}")
        if unfound := config.trained.unfound_classes:
            click.echo(f"  never found in validation, answered only where a prompt names them: {', '.join(unfound)}")
        if told := config.trained.parasites:
            click.echo(
                f"  infected red cells, with --parasites: recall {told['recall']:.2f} at precision {told['precision']:.2f} on "
                f"validation data; of healthy people's at most {told['false_positives']:.2%}"
            )
        for name, values in config.morphology.items():
            click.echo(f"  {name}: {', '.join(values)}")
    if "single_cell" in tasks:
        click.echo(f"single-cell classes: {', '.join(config.single_cell_labels)}")
    sizes = processor.image_processor.task_sizes
    click.echo("image sizes: " + ", ".join(f"{task} {max(sizes[task].values())} px" for task in tasks))
    run = checkpoint / "run_config.json"
    try:
        folders = list(map(str, read_json(run)["data"]["folders"])) if run.is_file() else ["not recorded"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run}: not the settings of a run ({error!r}). Delete it, or copy it again.") from error
    click.echo(printable(f"licence: code Apache-2.0; weights as their training data ({', '.join(folders)})"))
    metrics = checkpoint / "metrics.json"
    if metrics.is_file():
        click.echo("measured on validation data:")
        for task, figures in read_figures(metrics).items():
            click.echo(printable(f"  {task}: {figures_text(figures)}"))
    else:
        click.echo("nothing was measured on validation data")


# As `unihema.shipped` has them, which is not imported to say what a command can do; a test compares.
WEIGHTS = ("research", "open")
weights_option = click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default=WEIGHTS[0],
    show_default=True,
    help="Some data of `research` state no licence; `open` is of open data alone, and knows no malaria, blast or sickle cell.",
)


@click.command("init")
@click.argument("folder", type=PATH, default="unihema")
@weights_option
@overwrite_option
def init(folder: Path, weights: str, overwrite: bool) -> None:
    """Lay down a checkpoint of this package.

    FOLDER, `unihema` by default, is then what `AutoModel.from_pretrained("unihema")` loads. Nothing is downloaded. Its NOTICE.md
    says what the weights may be used for.
    """
    from unihema.shipped import lay_down_checkpoint

    checkpoint = lay_down_checkpoint(folder, replace=overwrite, weights=weights)
    click.echo(f"Checkpoint in {checkpoint}; its terms are in {checkpoint / 'NOTICE.md'}")


@click.command()
@click.argument("folder", type=PATH, default="demo")
@weights_option
@click.option("--files-only", is_flag=True, help="Lay down the checkpoint and the smears, and analyse nothing.")
@overwrite_option
def demo(folder: Path, weights: str, files_only: bool, overwrite: bool) -> None:
    """Lay down the checkpoint of this package, and analyse example smears.

    Nothing is downloaded or trained. FOLDER, `demo` by default, gets the checkpoint as `unihema`, the images in `smears`,
    what was found in `results`, and a report of it in `results/report`.
    """
    from unihema.analyzer import Analyzer
    from unihema.report.smear_report import SmearReport
    from unihema.review.reviewed_results import reviewed_samples
    from unihema.shipped import copy_examples, lay_down_checkpoint

    checkpoint = lay_down_checkpoint(folder / "unihema", replace=overwrite, weights=weights)
    images = copy_examples(folder / "smears")
    click.echo(f"Checkpoint in {checkpoint}, {len(images)} example smears in {folder / 'smears'}")
    if files_only:
        return
    fields = [path for path in images if path.name.startswith("field")]
    analyzer = Analyzer.from_pretrained(checkpoint)
    batch = analyzer.analyze_files(fields, folder / "results", overwrite=overwrite)
    totals = ", ".join(f"{name} {count}" for name, count in batch.totals.items())
    click.echo(f"Cells in {batch.images} fields: {totals}. Pictures and tables in {folder / 'results'}")

    for sample in reviewed_samples(folder / "results", checkpoint=checkpoint):
        page = SmearReport.of(sample.results, folder.absolute().name, **sample.details).save(
            folder / "results" / "report"
        )

    click.echo("Single cells:")
    for path in images:
        if path in fields:
            continue
        questions = DEMO_QUESTIONS if path.name.startswith("white") else ()
        result = analyzer(path, tasks=("single_cell",), questions=questions)
        click.echo(f"{path.name}: {result.single_cell['label']} ({result.single_cell['score']:.0%})")
        for answer in result.answers:
            click.echo(f"  {answer['question']} {answer['answer']}")
    click.echo(f"The report of the fields, a page to open in a browser: {page}")
