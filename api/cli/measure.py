"""Commands that measure: `evaluate`, on data as they are or corrupted, and `reference`."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .options import (
    PATH,
    SettingsCommand,
    batch_size_option,
    data_of,
    device_option,
    image_size_option,
    int8_option,
    of_all_tasks,
    of_each_task,
    output_option,
    overwrite_option,
    set_option,
    task_option,
)


# Resamples of the images for an interval, of an evaluation and of each corruption.
DRAWS, DRAWS_CORRUPTED = 1000, 200
ALL = "all"
# Files of an evaluation, and with --int8 of the same before the model was quantised.
FIGURES, EXACT_FIGURES = "metrics", "metrics_exact"


@click.command(cls=SettingsCommand, settings=("data.rename",))
@click.argument("checkpoint", type=PATH)
@click.argument("data", nargs=-1, required=True, type=PATH)
@output_option()
@task_option()
@click.option("--split", default="val", show_default=True, help="Split of the data.")
@click.option("--max-samples", type=click.IntRange(1), help="Measure on about this many rows of a task.")
@batch_size_option
@image_size_option
@click.option(
    "--bootstrap",
    type=click.IntRange(0),
    help=f"Resamples of the images for 95 % intervals, 0 for none; {DRAWS} by default, {DRAWS_CORRUPTED} with --corruption.",
)
@click.option(
    "--shuffle-images", is_flag=True, help="The image-blind control: every question is asked of another image."
)
@click.option(
    "--name-classes",
    is_flag=True,
    help="Ask detection for the classes that each data folder annotates, as `predict --prompt` does.",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Only fit what scores of detection and single cells mean, and write it into the checkpoint's config.json.",
)
@device_option
@int8_option
@click.option(
    "--corruption",
    "corruptions",
    multiple=True,
    help="Corrupt the images: defocus, stain and others of docs/limits.md, or `all`; may be repeated. Needs --output.",
)
@click.option(
    "--severity",
    "severities",
    type=int,
    multiple=True,
    help="Severity of the corruptions, 1 to 5; may be repeated. All by default.",
)
@set_option
@overwrite_option
def evaluate(
    checkpoint: Path,
    data: tuple[Path, ...],
    output: Path | None,
    tasks: tuple[str, ...],
    split: str,
    max_samples: int | None,
    batch_sizes: Sequence[tuple[str | None, int]],
    image_sizes: Sequence[tuple[str | None, int]],
    bootstrap: int | None,
    shuffle_images: bool,
    name_classes: bool,
    calibrate: bool,
    device: str,
    int8: bool,
    corruptions: tuple[str, ...],
    severities: tuple[int, ...],
    overwrite: bool,
    settings: Mapping[str, Any],
) -> None:
    """Measure a checkpoint on data folders.

    CHECKPOINT is a folder, an adapter, or a file made by `unihema export`. DATA are data folders; of several, each is also
    reported by itself. With --corruption the images are corrupted: focus, light, stain, file, magnification, dense fields.
    """
    from unihema.checkpoint_files import decisive_files, is_onnx
    from unihema.files import folder_sha256
    from unihema.hub_cards import DataRecord
    from unihema.loading import load_model, require_tasks, set_image_sizes
    from unihema.results.out_of_distribution import ModelReference
    from unihema.training.run.build import load_rows

    _check_corruptions(corruptions, severities, output, shuffle_images, name_classes)
    if calibrate:
        others = {"--corruption": corruptions, "--output": output, "--int8": int8, "--bootstrap": bootstrap is not None}
        others |= {"--shuffle-images": shuffle_images, "--name-classes": name_classes, "--overwrite": overwrite}
        if given := [name for name, value in others.items() if value]:
            raise click.UsageError(
                f"--calibrate writes into the checkpoint and measures nothing else: leave out {given[0]}."
            )
    batch_size = of_all_tasks(batch_sizes, "--batch-size", 8)
    exact = {"device": "cpu" if device == "auto" else device, "dtype": "float32"}
    model, processor = load_model(checkpoint, **(exact if int8 else {"device": device}))
    require_tasks(model, tasks)
    sizes = of_each_task(image_sizes, tasks)
    set_image_sizes(processor, sizes)
    config = data_of(data, _tasks_of(model, tasks, bool(corruptions)), settings, "evaluate")
    rows = load_rows(config, split)
    if calibrate:
        _calibrate(checkpoint, model, processor, rows, batch_size, max_samples)
        return
    # What decides the figures. Names, not places: a report is read elsewhere.
    decisive = {
        "data": [folder.resolve().name for folder in data],
        "split": split,
        "rename": dict(config.rename) or None,
        "data_sha256": [folder_sha256(folder) for folder in data],
        "checkpoint_sha256": decisive_files(checkpoint),
        "image_sizes": sizes or None,
        "int8": int8 or None,
        "data_settings": {name: value for name, value in settings.items() if name != "data.rename"} or None,
    }
    options = {"batch_size": batch_size, "max_samples": max_samples}
    if corruptions:
        options["bootstrap"] = DRAWS_CORRUPTED if bootstrap is None else bootstrap
        assert output is not None
        asked = (None if ALL in corruptions else corruptions, severities or None)
        _under_corruptions(checkpoint, model, processor, rows, output, asked, options, decisive, overwrite)
        return
    options |= {"bootstrap": DRAWS if bootstrap is None else bootstrap}
    options |= {"shuffle_images": shuffle_images, "name_classes": name_classes}
    if not is_onnx(checkpoint):
        options |= {"reference": None if int8 else ModelReference.of_model(model, checkpoint)}
        options |= {"home": sorted(source.name for source in DataRecord.of_checkpoint(checkpoint).sources)}
    _as_they_are(model, processor, rows, output, options, decisive, overwrite)


def _calibrate(
    checkpoint: Path, model: Any, processor: Any, rows: Mapping[str, Any], batch_size: int, max_samples: int | None
) -> None:
    from unihema.checkpoint_files import is_adapter, is_onnx, read_json
    from unihema.errors import RequestError
    from unihema.files import write_json
    from unihema.training.evaluation.evaluate import calibrate_scores

    if is_adapter(checkpoint) or is_onnx(checkpoint):
        raise RequestError(
            f"{checkpoint}: --calibrate writes into the config.json of a checkpoint folder, and this is none."
        )
    found = calibrate_scores(model, processor, rows, batch_size, max_samples)
    if not found:
        raise RequestError("Nothing to calibrate: there are fewer than thirty answers of detection or single cells.")
    # Nothing else of the file changes.
    config = read_json(checkpoint / "config.json")
    trained = model.config.to_dict()["trained"]
    config["trained"] = trained | {"calibration": trained["calibration"] | found}
    write_json(checkpoint / "config.json", config)
    for head, fitted in found.items():
        kept = "no level keeps the types of white cells right"
        if "typed_from" in fitted:
            kept = (
                f"from {fitted['typed_from']:.2f} on {fitted['reached']:.1%} of the types of white cells are right, and "
                f"{fitted['coverage']:.0%} of them are kept"
            )
        click.echo(f"{head}: {fitted['cells']} answers, calibration error {fitted['ece']:.3f}; {kept}")
    for head in trained["calibration"].keys() - found.keys():
        click.echo(f"{head}: as it was; too few answers, or none, were measured")
    click.echo(f"Written to {checkpoint / 'config.json'}.")


def _check_corruptions(
    corruptions: Sequence[str], severities: Sequence[int], output: Path | None, shuffle_images: bool, name_classes: bool
) -> None:
    if severities and not corruptions:
        raise click.UsageError(f"--severity is of corruptions: add --corruption {ALL}, or the name of one.")
    if not corruptions:
        return
    if output is None:
        raise click.UsageError("--corruption measures many points, which are kept in a folder: add --output.")
    for option, given in (("--shuffle-images", shuffle_images), ("--name-classes", name_classes)):
        if given:
            raise click.UsageError(f"{option} is not measured under corruptions: leave out --corruption.")


def _tasks_of(model: Any, tasks: Sequence[str], images_alone: bool) -> list[str]:
    from unihema.loading import available_tasks
    from unihema.modeling_unihema.tasks import IMAGE_TASKS

    return list(tasks) or [task for task in available_tasks(model) if not images_alone or task in IMAGE_TASKS]


def _as_they_are(
    model: Any,
    processor: Any,
    rows: Mapping[str, Any],
    output: Path | None,
    options: Mapping[str, Any],
    decisive: Mapping[str, Any],
    overwrite: bool,
) -> None:
    from unihema.errors import InputError
    from unihema.files import claim_folder, exclusive
    from unihema.inference.int8 import to_int8
    from unihema.training.evaluation.report import figures_text, parts_of, unlike_text

    exact = {}
    with exclusive(output) if output is not None else nullcontext():
        if output is not None:
            alike = {name: value for name, value in options.items() if name not in ("batch_size", "reference", "home")}
            claim_folder(output, {**decisive, **alike}, (f"{FIGURES}.json", f"{EXACT_FIGURES}.json"), overwrite)
        if decisive["int8"]:
            exact = _measured(model, processor, rows, output, EXACT_FIGURES, options)
            to_int8(model)
        report = _measured(model, processor, rows, output, FIGURES, options)
    if not report:
        raise InputError("Nothing to measure: the image-blind control is for question_answering and cloze.")
    for name, figures in report.items():
        click.echo(f"{name} ({figures.get('rows')} rows): {figures_text(figures)}")
        if exact:
            click.echo(f"  without int8: {figures_text(exact[name])}")
        if "out_of_distribution" in figures:
            click.echo(f"  unlike the training: {unlike_text(figures['out_of_distribution'])}")
        for data_set, part in parts_of(figures).items():
            click.echo(f"  {data_set} ({part.get('rows')} rows): {figures_text(part)}")
    if output is not None:
        click.echo(f"Written to {output / FIGURES}.json.")


def _measured(
    model: Any, processor: Any, rows: Mapping[str, Any], output: Path | None, name: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of each task, written after each; those that an earlier call has written are not measured again."""
    from unihema.errors import CheckpointError
    from unihema.training.evaluation import evaluate_model, write_report
    from unihema.training.evaluation.report import read_figures

    file = None if output is None else output / f"{name}.json"
    report = {} if file is None or not file.exists() else read_figures(file)
    unlike = next((task for task, figures in report.items() if not isinstance(figures.get("rows"), int)), None)
    if unlike is not None:
        raise CheckpointError(f"{file}: the figures of {unlike} lack their rows. Delete it, and measure again.")
    for task, found in rows.items():
        if task not in report:
            report |= evaluate_model(model, processor, {task: found}, **options)
        if output is not None:
            # Also where the figures are there: an earlier call may have been killed before its tables.
            write_report(report, output, name)
    return report


def _under_corruptions(
    checkpoint: Path,
    model: Any,
    processor: Any,
    rows: Mapping[str, Any],
    output: Path,
    asked: tuple[Sequence[str] | None, Sequence[int] | None],
    options: Mapping[str, Any],
    decisive: Mapping[str, Any],
    overwrite: bool,
) -> None:
    from unihema.checkpoint_files import is_onnx
    from unihema.inference.int8 import to_int8
    from unihema.results.out_of_distribution import ModelReference
    from unihema.training.studies.stress import run_stress

    reference = None if is_onnx(checkpoint) else ModelReference.of_model(model, checkpoint)
    if decisive["int8"]:
        to_int8(model)
    report = run_stress(
        model, processor, rows, output, *asked, **options, settings=decisive, overwrite=overwrite, reference=reference
    )
    click.echo(f"{len(report['points'])} points in {output / 'stress.json'}; tables in {output / 'stress.md'}.")


@click.command(cls=SettingsCommand, settings=("data.rename",))
@click.argument("checkpoint", type=PATH)
@click.argument("data", nargs=-1, required=True, type=PATH)
@task_option()
@click.option(
    "--max-images",
    type=click.IntRange(2),
    default=500,
    show_default=True,
    help="Look at no more images of a data set, task and split; for cells of a class, too, and at most 30.",
)
@click.option(
    "--crops",
    is_flag=True,
    help="Record also how crops of nucleated cells are framed and coloured (config.json): others are then seen likewise.",
)
@click.option("--cells", is_flag=True, help="Record only what cells are like, into the reference that is there.")
@device_option
@set_option
def reference(
    checkpoint: Path,
    data: tuple[Path, ...],
    tasks: tuple[str, ...],
    max_images: int,
    crops: bool,
    cells: bool,
    device: str,
    settings: Mapping[str, Any],
) -> None:
    """Record what training images and their cells are like.

    From then on results warn of images unlike them, and say how odd each cell is. CHECKPOINT is a folder or an adapter, into
    which the reference is written. DATA are the data folders it was trained on: their train split says what images are like,
    their val split how much they vary.
    """
    from unihema.checkpoint_files import is_adapter, is_onnx
    from unihema.loading import load_model, require_tasks
    from unihema.modeling_unihema.tasks import IMAGE_TASKS
    from unihema.training.run.build import load_rows
    from unihema.training.studies.reference import (
        IMAGES_OF_CLASS,
        fit_cells,
        fit_reference,
        record_crop_frame,
        with_cells,
    )

    if is_onnx(checkpoint):
        raise click.UsageError(f"{checkpoint}: an ONNX file has no place for a reference; name a checkpoint folder.")
    if crops and is_adapter(checkpoint):
        raise click.UsageError(f"--crops: {checkpoint} is an adapter; its base says how crops are framed.")
    wrong = [name for name in tasks if name not in IMAGE_TASKS]
    if wrong:
        raise click.UsageError(f"--task {wrong[0]}: a reference is of images; choose among {', '.join(IMAGE_TASKS)}.")
    model, processor = load_model(checkpoint, device)
    require_tasks(model, tasks)
    config = data_of(data, _tasks_of(model, tasks, images_alone=True), settings, "reference")
    rows = [load_rows(config, split) for split in (config.train_split, config.val_split)]
    of_cells, figures = fit_cells(model, processor, *rows, max_images=min(max_images, IMAGES_OF_CLASS))
    if cells:
        found = with_cells(checkpoint, model, of_cells)
    else:
        found = replace(fit_reference(model, processor, *rows, max_images=max_images), cells=of_cells)
        for name, of_task in found.tasks.items():
            limits = ", ".join(f"{group} {limit:.2f}" for group, limit in zip(of_task.groups, of_task.limits))
            click.echo(f"{name}: 99 % of validation images are closer than {limits}")
    for name, of_head in of_cells.items():
        limits = ", ".join(f"{label} {limit:.2f}" for label, limit in zip(of_head.classes, of_head.limits))
        told = figures[name]
        click.echo(
            f"{name}: 95 % of cells are closer to their class than {limits}\n"
            f"{name}: of {told['cells']} validation cells {told['odd']:.1%} are odd, of the wrong ones {told['wrong_odd']:.1%} "
            f"(AUC {told['auc']:.3f}); {told['right']:.1%} are right, of those that are not odd {told['right_of_others']:.1%}"
        )
    click.echo(f"Written to {found.save(checkpoint)}.")
    if crops:
        frame = record_crop_frame(checkpoint, rows[0].get("single_cell", ()), max_images)
        click.echo(
            f"A nucleus is {frame['nucleus'][0]:.2f} of the side of its crop; written to {checkpoint / 'config.json'}."
        )
