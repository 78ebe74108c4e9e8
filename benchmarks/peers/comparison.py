"""The comparison as a study: UniHema's checkpoint measured on each task, then each peer trained and measured on the same rows."""

import gc
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from benchmarks.peers.peer import WEIGHTS, model_inputs
from benchmarks.peers.peers import ATTRIBUTES, PEERS, chosen_peers, compared_figures, compared_rows, task_of
from unihema.checkpoint_files import fingerprint
from unihema.errors import RunConfigError
from unihema.files import write_atomically
from unihema.loading import available_tasks, load_model
from unihema.modeling_unihema.tasks import LANGUAGE_TASKS
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.class_tree import as_known
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.rows import Row, morphology_schema
from unihema.training.evaluation import evaluate_model
from unihema.training.run.build import build, load_rows, training_rows, validation_rows
from unihema.training.run.checkpoint import last_checkpoint
from unihema.training.run.config import DataConfig, ModelConfig, OptimisationConfig, RunConfig
from unihema.training.run.loop import train
from unihema.training.studies.study import Run, figure_settings, run_study


UNIHEMA = "unihema"
FIELDS, CELLS = 320, 128
# Data set -> its rows, which nothing is trained on.
RowsAbroad = Mapping[str, Sequence[Row]]


def unihema_item(task: str) -> str:
    """What UniHema doing one task is called among the models."""
    return f"{UNIHEMA}/{task}"


def default_config() -> RunConfig:
    """Settings that UniHema's tiny preset is trained with, as far as they concern a peer."""
    sizes = {
        "detection": FIELDS,
        "segmentation": FIELDS,
        "single_cell": CELLS,
        "question_answering": CELLS,
        "cloze": CELLS,
    }
    return RunConfig(
        output_dir="runs/peers",
        data=DataConfig(
            image_sizes={task: {"longest_edge": edge} for task, edge in sizes.items()},
            batch_size={task: 4 if edge == FIELDS else 16 for task, edge in sizes.items()},
            workers=0,
        ),
        model=ModelConfig(backbone_weights="efficientnet-lite0"),
        optimisation=OptimisationConfig(ema_decay=0.998, backbone_multiplier=0.5),
    )


def compare(
    config: RunConfig,
    checkpoint: str | Path,
    names: Sequence[str] = (),
    learning_rates: Mapping[str, float] | None = None,
    resume: bool = False,
    abroad: Sequence[str | Path] = (),
) -> dict[str, dict[str, Any]]:
    """Measures UniHema, then trains and measures each peer; finished ones are not made again.

    `results.json` in `config.output_dir` has the finished ones.

    Args:
        config ([`RunConfig`]): Data, sizes and settings of every peer; `output_dir` is the folder of the comparison.
        checkpoint (`str` or `Path`): UniHema's folder.
        names (`Sequence[str]`): Peers; all whose task the data have when empty.
        learning_rates (`Mapping[str, float]`, *optional*): Peer -> its own.
        resume (`bool`): Go on with what an earlier call left.
        abroad (`Sequence[str | Path]`): Data folders that neither UniHema nor any peer is trained on. All of their images are
            measured.

    Returns:
        `dict[str, dict[str, Any]]`: `UNIHEMA` and the peers -> `parameters`, `report`, `abroad` (task -> data set -> report),
        and of a peer its `learning_rate` and how it was `trained`.

    Raises:
        RunConfigError: Settings that cannot be, an unknown peer, one whose task the data lack, or a folder that holds
            something else.
        DatasetError: Data that cannot be used.
        TrainingError: See `train`.
    """
    if not config.data.attributes_as_detection:
        config = config.with_overrides({"data.attributes_as_detection": True})
    config = config.with_overrides({"model.trained_parts": None})
    config.check()
    if config.optimisation.time_limit_minutes is None and config.optimisation.max_steps is None:
        raise RunConfigError("No budget: give the minutes of each peer (--minutes).")
    if config.model.initial_checkpoint:
        raise RunConfigError("Peers start anew: leave out model.initial_checkpoint.")
    rows = compared_rows(training_rows(config))
    names = chosen_peers(names, rows)
    rates = {name: PEERS[name].learning_rate for name in names} | dict(learning_rates or {})
    if unknown := [name for name in rates if name not in names]:
        raise RunConfigError(f"--learning-rate {unknown[0]}: no such peer is trained; those are {', '.join(names)}.")
    wanted = list(dict.fromkeys(PEERS[name].compared for name in names))
    val_rows = compared_rows(validation_rows(config, dict.fromkeys(map(task_of, wanted))))
    if missing := [compared for compared in wanted if compared not in val_rows]:
        raise RunConfigError(
            f"Nothing to measure {missing[0]} on: split '{config.data.val_split}' of the folders has none."
        )
    val_rows = {compared: val_rows[compared] for compared in wanted}
    strange = _rows_abroad(config, abroad, wanted)
    runs = _unihema_runs(config, checkpoint, val_rows, strange)
    for name in names:
        compared = PEERS[name].compared
        measured = val_rows[compared], strange.get(compared, {})
        runs.append(_peer_run(name, config, rates[name], rows[compared], *measured, resume))
    results = run_study(config.output_dir, "results", runs, resume=resume)
    ours = [results[unihema_item(compared)] for compared in val_rows]
    together = {
        part: {compared: figures for result in ours for compared, figures in result[part].items()}
        for part in ("report", "abroad")
    }
    return {UNIHEMA: {**ours[0], **together}, **{name: results[name] for name in names}}


def _rows_abroad(config: RunConfig, folders: Sequence[str | Path], wanted: Sequence[str]) -> dict[str, RowsAbroad]:
    """All rows of data that are in no training, by what is compared."""
    if known := sorted({Path(folder).name for folder in folders} & {Path(each).name for each in config.data.folders}):
        raise RunConfigError(f"--abroad {known[0]}: the peers are trained on it.")
    if not folders:
        return {}
    data = config.with_folders(folders).data
    tasks = list(dict.fromkeys(map(task_of, wanted)))
    found: dict[str, dict[str, list[Row]]] = {}
    for split in (data.train_split, data.val_split):
        for compared, rows in compared_rows(load_rows(data, split, tasks)).items():
            for row in rows:
                found.setdefault(compared, {}).setdefault(row["dataset"], []).append(row)
    return {compared: found[compared] for compared in wanted if compared in found}


def _unihema_runs(
    config: RunConfig, checkpoint: str | Path, val_rows: Mapping[str, list[Row]], strange: Mapping[str, RowsAbroad]
) -> list[Run]:
    """UniHema measured on one thing compared at a time, so that further peers may bring further ones."""
    settings = {name: value for name, value in figure_settings(config).items() if name.startswith(_ROWS_TO_MEASURE)}
    settings["checkpoint"] = fingerprint(checkpoint)
    folder = Path(config.output_dir) / UNIHEMA
    loaded = cache(lambda: load_model(checkpoint))

    def run(compared: str, rows: list[Row]) -> Run:
        def measure(_: Mapping[str, Any]) -> dict[str, Any]:
            model, processor = loaded()
            report, abroad = {}, {}
            if _does(model, compared, rows):
                report[compared] = _measured(compared, model, processor, rows, config)
                abroad[compared] = {
                    name: _measured(compared, model, processor, of_data, config)
                    for name, of_data in strange.get(compared, {}).items()
                }
                save_example(folder, compared, model, processor, rows)
            return {"parameters": _parameters(model), "report": report, "abroad": abroad}

        return Run(unihema_item(compared), settings | _measured_abroad(strange.get(compared, {})), measure)

    return [run(compared, rows) for compared, rows in val_rows.items()]


def _measured_abroad(strange: RowsAbroad) -> dict[str, list[str]]:
    """The setting that says what else a model is measured on; none where it is nothing."""
    return {"abroad": sorted(strange)} if strange else {}


def _peer_run(
    name: str,
    config: RunConfig,
    rate: float,
    rows: list[Row],
    val_rows: list[Row],
    strange: RowsAbroad,
    resume: bool,
) -> Run:
    """One peer, trained by the loop that trains UniHema, saved and measured."""
    kind = PEERS[name]
    own = peer_config(config, name, rate, rows)
    folder = Path(own.output_dir)

    def make(config: RunConfig, rows: dict[str, Sequence[Row]]):
        unihema, processor = build(config, rows)
        names = unihema.config
        # Of a coarser class no peer is taught.
        names.label_parents = {}
        names.single_cell_parents = {}
        if kind.compared != ATTRIBUTES:
            # No detector reads attributes, and what no model answers is not asked.
            names.morphology = {}
        peer = kind.build(names)
        peer.start_from(unihema.model.visual_backbone.backbone)
        return peer, processor

    def measure(_: Mapping[str, Any]) -> dict[str, Any]:
        from accelerate import PartialState

        train(own, build=make, rows={task_of(kind.compared): rows}, resume=resume and folder.exists())
        # The run's memory and cached images are no longer needed.
        gc.collect()
        _, progress = last_checkpoint(folder)
        device = PartialState().device
        peer, processor = kind.build.from_pretrained(folder).to(device), UniHemaProcessor.from_pretrained(folder)
        report = {kind.compared: _measured(kind.compared, peer, processor, val_rows, config)}
        abroad = {name: _measured(kind.compared, peer, processor, of_data, config) for name, of_data in strange.items()}
        save_example(folder, kind.compared, peer.cpu(), processor, val_rows)
        return {
            "learning_rate": rate,
            "parameters": _parameters(peer),
            "backbone_parameters": _parameters(peer.backbone_network) if peer.backbone_part else 0,
            "trained": {
                "steps": progress.step,
                "seconds": progress.seconds,
                "passes": progress.batch / progress.batches_per_epoch,
                "device": device.type,
            },
            "report": report,
            "abroad": {kind.compared: abroad},
        }

    measured_on = {name: value for name, value in figure_settings(config).items() if name.startswith(_ROWS_TO_MEASURE)}
    measured_on |= _measured_abroad(strange)
    return Run(name, {**figure_settings(own), "measured on": measured_on}, measure, folder / WEIGHTS)


# Settings that say which rows the models are measured on.
_ROWS_TO_MEASURE = (
    "data.folders",
    "data.val_split",
    "data.rename",
    "data.hold_out",
    "data.folds",
    "data.fold",
    "logging.final_samples",
)


def peer_config(config: RunConfig, name: str, rate: float, rows: Sequence[Row]) -> RunConfig:
    """The settings that UniHema would be trained with, for one peer.

    Args:
        config ([`RunConfig`]): Of the comparison.
        name (`str`): The peer.
        rate (`float`): Its learning rate; lower for its backbone by the same factor as UniHema's.
        rows (`Sequence[Row]`): What it is trained on.
    """
    kind = PEERS[name].build
    sources = getattr(rows, "sources", None)
    present = {row["dataset"] for row in rows} if sources is None else {dataset for dataset, _ in sources}
    multiplier = config.optimisation.backbone_multiplier
    return config.with_overrides(
        {
            "output_dir": str(Path(config.output_dir) / name),
            "data.tasks": [task_of(PEERS[name].compared)],
            # A share of the tasks' batches says nothing where there is one task.
            "data.task_weights": {},
            "data.dataset_weights": {
                dataset: weight for dataset, weight in config.data.dataset_weights.items() if dataset in present
            },
            "data.text_only": kind.text_only,
            "optimisation.learning_rate": rate,
            "optimisation.learning_rate_multipliers": {kind.backbone_part: multiplier} if kind.backbone_part else {},
            # Measured once, when it is trained, on what it is compared on.
            "data.val_split": "",
            "data.folds": None,
            "optimisation.patience": None,
            "logging.evaluate_every": 0,
            "logging.keep_best": False,
        }
    )


def _does(model, compared: str, rows: Sequence[Row]) -> bool:
    if compared == ATTRIBUTES and not set(morphology_schema(rows)) & set(model.config.morphology):
        return False
    return task_of(compared) in available_tasks(model)


def _measured(compared: str, model, processor, rows: Sequence[Row], config: RunConfig) -> dict[str, Any]:
    logging = config.logging
    report = evaluate_model(
        model,
        processor,
        {task_of(compared): rows},
        max_samples=logging.final_samples,
        progress=logging.progress,
        seed=config.optimisation.seed,
        text_only=getattr(model, "text_only", False),
    )
    return compared_figures(compared, report)


def _parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save_example(folder: Path, compared: str, model, processor, rows: list[Row]) -> None:
    """Saves the inputs of the first validation image; where the task has questions one of them, and its true answer's tokens.

    Args:
        folder (`Path`): Of the model.
        compared (`str`): What the model does, of `COMPARED`.
        model (`Peer` or `UniHemaForMultiTask`): With the classes that the rows have.
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
