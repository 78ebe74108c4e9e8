"""The training loop: one batch, one task; stopped and resumed at any step."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from unihema.hub_cards import checkpoint_card
from unihema.training.batches import RunBatches
from unihema.training.build import build, training_rows, validation_rows
from unihema.training.checkpoint import Progress, last_checkpoint, save_checkpoint
from unihema.training.data.dataset import SmearDataset
from unihema.training.ema import ExponentialMovingAverage
from unihema.training.evaluation import calibrate_thresholds, evaluate_model, headline, write_report
from unihema.training.files import plain, write_text
from unihema.training.optimizer import ProgressSchedule, make_optimizer
from unihema.training.run_config import RunConfig, RunConfigError


DEFAULT_EPOCHS = 24


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stood and what to do."""


class TrainingInterrupted(TrainingError):
    """Stopped by the user or the system; a checkpoint to resume from is saved."""


def train(config: RunConfig, resume: bool = False, callbacks: Iterable[Callable[[dict], None]] = ()) -> dict[str, Any]:
    """Trains a model as a run configuration says.

    Writes into `config.output_dir`: `run_config.json`, `log.jsonl`, `checkpoints/`, and at the end the model (averaged
    weights, calibrated thresholds), its processor, `metrics.json`, `metrics.md` and a card.

    Args:
        config ([`RunConfig`]): The run.
        resume (`bool`): Go on from the last checkpoint of the output folder as if never stopped.
        callbacks (`Iterable[Callable[[dict], None]]`): Called with every line of the log.

    Returns:
        `dict[str, Any]`: The evaluation report on the validation split; empty without one.

    Raises:
        RunConfigError: Settings that cannot be, or a resumed run with other settings.
        DatasetError: Data that cannot be used.
        TrainingError: The loss is no number.
        TrainingInterrupted: SIGINT or SIGTERM.
    """
    config.check()
    return _Run(config, resume, tuple(callbacks)).to_the_end()


class _Run:
    def __init__(self, config: RunConfig, resume: bool, callbacks: tuple[Callable[[dict], None], ...]):
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import set_seed

        self.config, self.callbacks = config, callbacks
        self.settings = config.optimisation
        self.folder = Path(config.output_dir)
        self.accelerator = Accelerator(
            cpu=self.settings.device == "cpu",
            mixed_precision=self.settings.mixed_precision,
            gradient_accumulation_steps=self.settings.accumulation,
            # A task uses its own parts only, so every batch leaves some parameters without a gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        set_seed(self.settings.seed)
        found = last_checkpoint(self.folder) if resume else None
        if found is not None:
            self._check_same_run()
        self.rows = training_rows(config)
        self.val_rows = validation_rows(config, self.rows)
        model, self.processor = build(config, self.rows)
        self.batches = self._make_batches(model.config)
        self.ema = None
        optimizer = make_optimizer(model, self.settings)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = ProgressSchedule(self.optimizer, self.settings)
        if self.settings.ema_decay is not None:
            self.ema = ExponentialMovingAverage(self._plain(), self.settings.ema_decay, self.settings.ema_warmup)
            self.accelerator.register_for_checkpointing(self.ema)
        self.progress = Progress()
        if found is not None:
            path, self.progress = found
            self.accelerator.load_state(str(path))
            self._say(f"Resuming from {path}: step {self.progress.step} of {self._total_steps()}.")
        elif resume:
            self._say(f"No checkpoint in {self.folder / 'checkpoints'}: starting from the beginning.")
        if self.accelerator.is_main_process:
            config.save(self.folder)
        self.stopped_by: int | None = None

    def _check_same_run(self) -> None:
        """A run goes on only as it began; how long it goes on, and what is written, may change."""
        earlier = RunConfig.load(self.folder)
        free = ("output_dir", "logging.", "optimisation.epochs", "optimisation.max_steps", "data.workers")
        free += ("optimisation.time_limit_minutes",)
        changed = {k: v for k, v in self.config.differences(earlier).items() if not k.startswith(free)}
        if changed:
            name, (now, before) = next(iter(changed.items()))
            raise RunConfigError(
                f"{self.folder} was begun with {name}={before!r}, now it is {now!r}. Resume with the same settings, or "
                "train into another folder."
            )

    def _make_batches(self, model_config) -> RunBatches:
        datasets = {
            task: SmearDataset(
                rows,
                self.processor,
                task,
                augmentation=self.config.augmentation.for_task(task),
                class_names=list(model_config.id2label.values()),
                single_cell_labels=model_config.single_cell_labels,
                morphology=model_config.morphology,
                seed=self.settings.seed,
                questions_per_image=self.config.data.questions_per_image,
                cache_images=self.config.data.cache_images,
            )
            for task, rows in self.rows.items()
        }
        return RunBatches(
            datasets,
            self.config.data,
            self.settings.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _plain(self):
        return self.accelerator.unwrap_model(self.model)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def _total_steps(self) -> int:
        """Steps of the whole run as far as epochs and steps limit it; without any limit, of the default epochs."""
        settings = self.settings
        limits = []
        if settings.max_steps is not None:
            limits.append(settings.max_steps)
        unlimited = settings.max_steps is None and settings.time_limit_minutes is None
        epochs = settings.epochs if settings.epochs is not None else DEFAULT_EPOCHS if unlimited else None
        if epochs is not None:
            limits.append(math.ceil(epochs * self.batches.per_epoch / settings.accumulation))
        return min(limits) if limits else 0

    def _fraction_done(self) -> float:
        total = self._total_steps()
        fraction = self.progress.step / total if total else 0.0
        if self.settings.time_limit_minutes is not None:
            fraction = max(fraction, self.progress.seconds / 60 / self.settings.time_limit_minutes)
        return fraction

    def to_the_end(self) -> dict[str, Any]:
        """Trains until a limit is reached, then measures and saves."""
        sizes = ", ".join(f"{task} {len(rows)}" for task, rows in self.rows.items())
        self._say(f"Training on {self.accelerator.device} ({self.accelerator.num_processes} process(es)): {sizes}.")
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._finish()

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped_by = number

    def _train(self) -> None:
        logging = self.config.logging
        last_save = clock = time.monotonic()
        bar = tqdm(
            total=self._total_steps() or None,
            initial=self.progress.step,
            desc="train",
            unit="step",
            disable=not (logging.progress and self.accelerator.is_main_process),
        )
        self.model.train()
        with bar:
            for number, batch in self.batches.stream(self.progress.batch):
                if self._fraction_done() >= 1:
                    return
                stepped = self._step(batch, bar)
                self.progress.batch = number + 1
                if stepped and self.progress.batch % self.batches.per_epoch == 0:
                    self._end_of_epoch(self.progress.batch // self.batches.per_epoch)
                now = time.monotonic()
                self.progress.seconds += now - clock
                clock = now
                if self.stopped_by is not None and stepped:
                    path = save_checkpoint(self.folder, self.accelerator, self.progress, logging.keep_checkpoints)
                    raise TrainingInterrupted(
                        f"Stopped at step {self.progress.step}; {path} is saved. The same command with --resume goes on."
                    )
                minutes = logging.checkpoint_minutes
                due = minutes is not None and now - last_save > 60 * minutes
                due = due or bool(logging.checkpoint_steps and self.progress.step % logging.checkpoint_steps == 0)
                if due and stepped:
                    save_checkpoint(self.folder, self.accelerator, self.progress, logging.keep_checkpoints)
                    last_save = clock = time.monotonic()

    def _step(self, batch: dict[str, Any], bar: tqdm) -> bool:
        """One batch; `True` when the optimizer has stepped."""
        progress, task = self.progress, batch.pop("task")
        files = batch.pop("file_names")
        rate = self.schedule.set(progress.step, self._fraction_done())
        with self.accelerator.accumulate(self.model):
            output = self.model(task=task, **self._on_device(batch))
            loss = output.loss * self.settings.loss_weights.get(task, 1.0)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"The {task} loss is {loss.item()} at step {progress.step}, with {', '.join(files)}. The last "
                    f"checkpoint in {self.folder / 'checkpoints'} is from before. Look at these files, lower the "
                    "learning rate, or train without mixed precision."
                )
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.settings.gradient_clipping:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clipping)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if not self.accelerator.sync_gradients:
            return False
        progress.step += 1
        if self.ema is not None:
            self.ema.update(self._plain())
        bar.update(1)
        if progress.step % self.config.logging.log_every == 0 or progress.step == 1:
            bar.set_postfix(task=task, loss=f"{loss.item():.3f}", refresh=False)
            self._log(
                {
                    "event": "step",
                    "step": progress.step,
                    "epoch": round(progress.batch / self.batches.per_epoch, 3),
                    "task": task,
                    "loss": loss.item(),
                    "learning_rate": rate,
                    "seconds": progress.seconds,
                    "losses": output.loss_dict,
                }
            )
        return True

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.accelerator.device)

    def _log(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            line = plain(line)
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            for callback in self.callbacks:
                callback(line)

    def _averaged(self):
        return self.ema.applied(self._plain()) if self.ema is not None else nullcontext()

    def _end_of_epoch(self, epoch: int) -> None:
        logging = self.config.logging
        if not logging.evaluate_every or epoch % logging.evaluate_every or not self.val_rows:
            return
        if self.accelerator.is_main_process:
            with self._averaged():
                report = self._evaluate(logging.evaluation_samples)
                score, text = headline(report)
                if logging.keep_best and (self.progress.best is None or score > self.progress.best):
                    self.progress.best = score
                    self._plain().save_pretrained(self.folder / "best")
            self._log({"event": "evaluation", "epoch": epoch, "step": self.progress.step, **report})
            self._say(f"epoch {epoch}: {text}")
        self.accelerator.wait_for_everyone()
        self.model.train()

    def _evaluate(self, samples: int | None) -> dict[str, Any]:
        progress = self.config.logging.progress
        return evaluate_model(self._plain(), self.processor, self.val_rows, max_samples=samples, progress=progress)

    def _finish(self) -> dict[str, Any]:
        logging = self.config.logging
        save_checkpoint(self.folder, self.accelerator, self.progress, logging.keep_checkpoints)
        report: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            with self._averaged():
                model = self._plain().eval()
                if logging.keep_best and (self.folder / "best").is_dir():
                    model = type(model).from_pretrained(self.folder / "best").to(self.accelerator.device).eval()
                if self.val_rows.get("detection"):
                    model.config.detection_thresholds = calibrate_thresholds(
                        model, self.processor, self.val_rows["detection"], progress=logging.progress
                    )
                if self.val_rows:
                    report = evaluate_model(
                        model,
                        self.processor,
                        self.val_rows,
                        max_samples=logging.final_samples,
                        progress=logging.progress,
                    )
                self._save(model, report)
        self.accelerator.wait_for_everyone()
        return report

    def _save(self, model, report: dict[str, Any]) -> None:
        model.save_pretrained(self.folder)
        self.processor.save_pretrained(self.folder)
        if report:
            write_report(report, self.folder)
        write_text(self.folder / "README.md", checkpoint_card(model.config, report))
        self._say(f"Saved {self.folder}. {headline(report)[1]}".strip())


__all__ = ["TrainingError", "TrainingInterrupted", "train"]
