"""Trains one peer as the project trains UniHema: same batches, optimizer, schedule by time, clipping and average."""

import math
import time
from typing import Any

from accelerate.utils import send_to_device
from tqdm.auto import tqdm

from benchmarks.quality.peer import Peer
from unihema.errors import TrainingError
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.rows import Row
from unihema.training.run.batches import RunBatches
from unihema.training.run.config import OptimisationConfig, RunConfig
from unihema.training.run.distributed import make_accelerator
from unihema.training.run.optimizer import ExponentialMovingAverage, ProgressSchedule, make_optimizer


def peer_batches(peer: Peer, processor: UniHemaProcessor, task: str, rows: list[Row], config: RunConfig) -> RunBatches:
    """Batches of one task, augmented as UniHema's.

    Args:
        peer ([`Peer`]): With the classes in its configuration.
        processor (`UniHemaProcessor`): Makes its inputs.
        task (`str`): The task.
        rows (`list[Row]`): Training rows.
        config ([`RunConfig`]): Of the run.
    """
    names = peer.config
    dataset = SmearDataset(
        rows,
        processor,
        task,
        augmentation=config.augmentation.for_task(task),
        class_names=list(names.id2label.values()),
        single_cell_labels=names.single_cell_labels,
        morphology=names.morphology,
        seed=config.optimisation.seed,
        questions_per_image=config.data.questions_per_image,
        cache_images=config.data.cache_images,
        text_only=peer.text_only,
    )
    # A share of the tasks' batches says nothing where there is one task.
    data = config.with_overrides({"data.task_weights": {}}).data
    present = {name for name, _ in dataset.sources}
    data.dataset_weights = {name: weight for name, weight in data.dataset_weights.items() if name in present}
    return RunBatches({task: dataset}, data, config.optimisation.seed)


def peer_settings(peer: Peer, settings: OptimisationConfig, learning_rate: float) -> OptimisationConfig:
    """UniHema's settings with the peer's learning rate, lower for its backbone by the same factor.

    Args:
        peer ([`Peer`]): The peer.
        settings ([`OptimisationConfig`]): UniHema's.
        learning_rate (`float`): The peer's.
    """
    multipliers = {} if peer.backbone_part is None else {peer.backbone_part: settings.backbone_multiplier}
    fields = {**vars(settings), "learning_rate": learning_rate, "learning_rate_multipliers": multipliers}
    return OptimisationConfig(**fields)


def train_peer(
    peer: Peer, batches: RunBatches, settings: OptimisationConfig, title: str, progress: bool = True
) -> dict[str, Any]:
    """Trains until the time, or the steps, are over; the peer then has the averaged weights where those are kept.

    Args:
        peer ([`Peer`]): Changed in place; on the CPU afterwards or before, on the run's device in between.
        batches ([`RunBatches`]): What to train on.
        settings ([`OptimisationConfig`]): `time_limit_minutes` or `max_steps`, or both.
        title (`str`): For the progress bar.
        progress (`bool`): Show one.

    Returns:
        `dict[str, Any]`: `steps`, `seconds`, `images`, `passes` over the data and the `device`.

    Raises:
        TrainingError: A loss or gradient that is not finite.
    """
    accelerator = make_accelerator(settings)
    optimizer = make_optimizer(peer, settings)
    model, optimizer = accelerator.prepare(peer, optimizer)
    schedule = ProgressSchedule(optimizer, settings)
    average = None
    if settings.ema_decay is not None:
        average = ExponentialMovingAverage(peer, settings.ema_decay, settings.ema_warmup)
    peer.train()
    steps = images = 0
    limit = 60 * settings.time_limit_minutes if settings.time_limit_minutes else math.inf
    start = time.monotonic()
    with tqdm(total=settings.max_steps, desc=title, unit="step", disable=not progress) as bar:
        for _, batch in batches.stream():
            seconds = time.monotonic() - start
            done = max(seconds / limit, steps / settings.max_steps if settings.max_steps else 0.0)
            if done >= 1:
                break
            schedule.set(steps, done)
            files = batch.pop("file_names")
            loss = model(**send_to_device(batch, accelerator.device)).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(peer.parameters(), settings.gradient_clipping or math.inf)
            if not (math.isfinite(loss.item()) and math.isfinite(norm)):
                raise TrainingError(
                    f"{title}: the loss is {loss.item()} and its gradient {float(norm)} at step {steps}, with "
                    f"{', '.join(files)}. Look at these files, or lower the peer's learning rate (--learning-rate)."
                )
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(peer)
            steps, images = steps + 1, images + len(files)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", done=f"{done:.0%}", refresh=False)
    if average is not None:
        average.copy_to(peer)
    # Mixed precision ends here: what is saved is measured as it is used.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    peer.eval()
    return {
        "steps": steps,
        "seconds": time.monotonic() - start,
        "images": images,
        "passes": steps / batches.per_epoch,
        "device": accelerator.device.type,
    }
