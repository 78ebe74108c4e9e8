"""Trains the peers one after another, measures UniHema's checkpoint on the same rows, and keeps what is finished."""

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.compared import ATTRIBUTES, compared_figures, compared_rows, task_of
from benchmarks.quality.peers import PEERS, chosen_peers
from benchmarks.quality.results import UNIHEMA, Results, unihema_item
from benchmarks.quality.saved import save_example, save_peer
from benchmarks.quality.training import peer_batches, peer_settings, train_peer
from unihema.checkpoint_files import fingerprint
from unihema.errors import RunConfigError
from unihema.loading import available_tasks, load_model
from unihema.training.data.rows import Row, morphology_schema
from unihema.training.evaluation import evaluate_model
from unihema.training.run.build import build, training_rows, validation_rows
from unihema.training.run.config import DataConfig, ModelConfig, OptimisationConfig, RunConfig


FIELDS, CELLS = 320, 128


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
) -> dict[str, dict[str, Any]]:
    """Measures UniHema, then trains and measures each peer; finished ones are not made again.

    Args:
        config ([`RunConfig`]): Data, sizes and settings of every peer; `output_dir` is the folder of the comparison.
        checkpoint (`str` or `Path`): UniHema's folder.
        names (`Sequence[str]`): Peers; all whose task the data have when empty.
        learning_rates (`Mapping[str, float]`, *optional*): Peer -> its own.
        resume (`bool`): Go on with what an earlier call left.

    Returns:
        `dict[str, dict[str, Any]]`: `UNIHEMA` and the peers -> `settings`, `parameters`, `report` and how it was trained.

    Raises:
        RunConfigError: Settings that cannot be, an unknown peer, one whose task the data lack, or a folder that holds
            something else.
        DatasetError: Data that cannot be used.
        TrainingError: See `train_peer`.
    """
    if not config.data.attributes_as_detection:
        config = config.with_overrides({"data.attributes_as_detection": True})
    config = config.with_overrides({"model.trained_parts": None})
    config.check()
    if config.optimisation.time_limit_minutes is None and config.optimisation.max_steps is None:
        raise RunConfigError("No budget: give the minutes of each peer (--minutes).")
    if config.optimisation.accumulation != 1 or config.model.initial_checkpoint:
        raise RunConfigError("Peers start anew, a batch a step: leave out accumulation and model.initial_checkpoint.")
    results = Results(config.output_dir, resume)
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
    found = {UNIHEMA: _unihema(config, checkpoint, val_rows, results)}
    for name in names:
        compared = PEERS[name].compared
        settings = _settings(config, name, rates[name])
        found[name] = results.finished(name, settings) or _peer(
            name, config, rates[name], rows[compared], val_rows[compared], results, settings
        )
    return found


def _settings(config: RunConfig, name: str, rate: float) -> dict[str, Any]:
    """What a peer's figures hang on."""
    values = config.to_dict()
    settings = {part: values[part] for part in ("data", "model", "optimisation", "augmentation")}
    for free in ("workers", "cache_images"):
        settings["data"].pop(free)
    # A peer has its own, which come from those of the run.
    for own in ("learning_rate", "learning_rate_multipliers"):
        settings["optimisation"].pop(own)
    return {**settings, "final_samples": config.logging.final_samples, "peer": name, "learning_rate": rate}


def _unihema(config: RunConfig, checkpoint: str | Path, val_rows: dict[str, list[Row]], results: Results) -> dict:
    """UniHema's results, one thing compared at a time, so that further peers may bring further ones."""
    data = {
        name: getattr(config.data, name) for name in ("folders", "val_split", "rename", "hold_out", "folds", "fold")
    }
    settings = {"checkpoint": fingerprint(checkpoint), "data": data, "final_samples": config.logging.final_samples}
    found = {one: results.finished(unihema_item(one), settings) for one in val_rows}
    if not all(found.values()):
        model, processor = load_model(checkpoint)
        for one in [one for one in found if found[one] is None]:
            report = {}
            if _does(model, one, val_rows[one]):
                report[one] = _measured(one, model, processor, val_rows[one], config)
                save_example(results.folder / UNIHEMA, one, model, processor, val_rows[one])
            found[one] = {"settings": settings, "parameters": _parameters(model), "report": report}
            results.add(unihema_item(one), found[one])
    report = {one: figures for result in found.values() for one, figures in result["report"].items()}
    return {**next(iter(found.values())), "report": report}


def _peer(
    name: str,
    config: RunConfig,
    rate: float,
    rows: list[Row],
    val_rows: list[Row],
    results: Results,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Trains, measures and saves one peer."""
    from accelerate.utils import set_seed

    compared = PEERS[name].compared
    task = task_of(compared)
    set_seed(config.optimisation.seed)
    unihema, processor = build(config.with_overrides({"data.tasks": [task]}), {task: rows})
    names = unihema.config
    if compared != ATTRIBUTES:
        # No detector reads attributes, and what no model answers is not asked.
        names.morphology = {}
    peer = PEERS[name].build(names)
    peer.start_from(unihema.model.visual_backbone.backbone)
    del unihema
    batches = peer_batches(peer, processor, task, rows, config)
    own = peer_settings(peer, config.optimisation, rate)
    trained = train_peer(peer, batches, own, name, config.logging.progress)
    started = time.monotonic()
    report = {compared: _measured(compared, peer, processor, val_rows, config)}
    folder = results.folder / name
    save_example(folder, compared, peer, processor, val_rows)
    save_peer(peer, folder)
    result = {
        "settings": settings,
        "parameters": _parameters(peer),
        "backbone_parameters": _parameters(peer.backbone_network) if peer.backbone_part else 0,
        "trained": trained,
        "evaluation_seconds": time.monotonic() - started,
        "report": report,
    }
    results.add(name, result)
    # The next peer's memory and cached images are its own.
    del batches, peer
    gc.collect()
    return result


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
