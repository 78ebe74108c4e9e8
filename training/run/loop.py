"""The training loop: one batch, one task; stopped and resumed at any step."""

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from unihema.errors import NotFiniteError, RunConfigError, TrainingError, TrainingInterrupted
from unihema.files import exclusive, real_path, remove_file, shortened, write_json, write_text
from unihema.hub_cards import checkpoint_card
from unihema.hub_cards.data_record import RECORD_FILE
from unihema.modeling_unihema.losses import average_over_processes, count_loss_items
from unihema.modeling_unihema.modeling_unihema import UniHemaPreTrainedModel
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.training.data.data_record import data_record
from unihema.training.data.dataset import SmearDataset
from unihema.training.data.image_cache import ImageCache
from unihema.training.data.rows import Row
from unihema.training.evaluation import evaluate_model, headline, write_report
from unihema.training.run.batches import RunBatches, unpack
from unihema.training.run.build import (
    TrainedParts,
    check_val_names,
    training_rows,
    validation_rows,
    verified_rows,
    warn_of_missing_classes,
)
from unihema.training.run.build import build as build_unihema
from unihema.training.run.checkpoint import (
    Progress,
    check_same_run,
    check_unused_folder,
    finished_report,
    last_checkpoint,
    load_trained,
    save_checkpoint,
    save_trained,
)
from unihema.training.run.config import RunConfig
from unihema.training.run.distributed import Agreement, make_accelerator, matrix_products, share_batch_norms
from unihema.training.run.log import RunLog, Waiting, peak_gigabytes, tracker_callback
from unihema.training.run.optimizer import ExponentialMovingAverage, ProgressSchedule, make_optimizer
from unihema.training.run.precision import warn_of_slow_bf16, with_half_weights


DEFAULT_EPOCHS = 24
# The deepest map of a backbone has a pixel for as many of the image.
SMALLEST_ALONE = 32
# What is left of a run whose loss was no number.
DIVERGED_FILE = "diverged.json"
CACHE_FOLDER = "image_cache"
# A compiled model is compiled anew for each size of a batch, so there are few: padding costs less, and changes no result.
COMPILED_SIDES = 128


class Trainable(Protocol):
    """What `train` asks of a model, an `nn.Module`. UniHema is one, the peers in `benchmarks/peers` are others.

    Args:
        config (`Any`): Has `id2label`, `single_cell_names`, `morphology` and `label_parents`, which say what labels the batches
            get.
    """

    config: Any

    def __call__(self, *, task: str, **batch: Any) -> Any:
        """The output of a batch of `SmearDataset`, with `loss` (a scalar), and `loss_dict` where the loss has terms."""

    def save_pretrained(self, folder: Path) -> None:
        """Writes weights and configuration."""

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Trainable":
        """Reads them again, for runs that keep the best weights."""


Build = Callable[[RunConfig, dict[str, Sequence[Row]]], tuple[Trainable, UniHemaProcessor]]


def train(
    config: RunConfig,
    *,
    build: Build = build_unihema,
    rows: Mapping[str, Sequence[Row]] | None = None,
    resume: bool = False,
    callbacks: Iterable[Callable[[dict], None]] = (),
) -> dict[str, Any]:
    """Trains a model as a run configuration says.

    Writes into `config.output_dir`: `run_config.json`, `log.jsonl`, `checkpoints/`, and at the end the model (averaged
    weights, calibrated thresholds), its processor, `metrics.json`, `metrics.md`, `data.json` and a card.

    Args:
        config ([`RunConfig`]): The run.
        build (`Callable`): Makes the model, which may be any [`Trainable`], and its processor, of the run and its training
            rows.
        rows (`Mapping[str, Sequence[Row]]`, *optional*): Task -> training rows, instead of those of `config.data`.
        resume (`bool`): Go on from the last checkpoint of the output folder as if never stopped; a run that is finished is
            not run again.
        callbacks (`Iterable[Callable[[dict], None]]`): Called with every line of the log.

    Returns:
        `dict[str, Any]`: The evaluation report on the validation split; empty without one.

    Raises:
        RunConfigError: Settings that cannot be, a resumed run with other settings, or, without `resume`, an output
            folder that holds a run or a model already.
        OutputError: Another run is writing into the output folder, or it cannot be written.
        DatasetError: Data that cannot be used.
        TrainingError: The loss or its gradient is no number; a checkpoint of the step before and `diverged.json` are left.
        TrainingInterrupted: SIGINT or SIGTERM.
    """
    config.check()
    folder = Path(config.output_dir)
    accelerator = make_accelerator(config.optimisation, config.logging.trackers, folder)
    with exclusive(folder, ("checkpoints", "best")) if accelerator.is_main_process else nullcontext():
        if resume and (report := finished_report(config)) is not None:
            return report
        return _Run(config, build, rows, resume, tuple(callbacks), accelerator).to_the_end()


class _Run:
    def __init__(
        self,
        config: RunConfig,
        build: Build,
        rows: Mapping[str, Sequence[Row]] | None,
        resume: bool,
        callbacks: tuple[Callable[[dict], None], ...],
        accelerator: Any,
    ):
        from accelerate.utils import set_seed

        self.config = config
        self.settings = config.optimisation
        self.folder = Path(config.output_dir)
        self.accelerator = accelerator
        if config.logging.trackers:
            callbacks = (*callbacks, tracker_callback(self.accelerator, config))
        self.log = RunLog(self.folder / "log.jsonl", callbacks, self.accelerator.is_main_process)
        if self.settings.mixed_precision == "bf16" and self.accelerator.is_main_process:
            warn_of_slow_bf16(self.accelerator.device)
        set_seed(self.settings.seed)
        found = last_checkpoint(self.folder) if resume else None
        if found is not None:
            check_same_run(config, found[1], self.accelerator.num_processes)
        elif not resume:
            check_unused_folder(self.folder)
        rows = training_rows(config) if rows is None else dict(rows)
        val_rows = validation_rows(config, config.data.evaluation_tasks or rows)
        self.rows, self.val_rows = verified_rows(config, rows, val_rows)
        model, self.processor = build(config, self.rows)
        if self.settings.gradient_checkpointing:
            _checkpoint_gradients(model)
        check_val_names(model, self.val_rows)
        warn_of_missing_classes(model, self.rows, self.val_rows)
        self.parts = TrainedParts(model, config.model.trained_parts)
        if self.accelerator.num_processes > 1:
            share_batch_norms(model)
        if self.accelerator.process_index:
            # Weights start alike in every process; noise and dropout need not be the same.
            set_seed(self.settings.seed + self.accelerator.process_index)
        self.agreement = Agreement(self.accelerator.num_processes)
        self.cache: ImageCache | None = None
        self.batches = self._make_batches(model.config)
        self._place(model)
        self.progress = Progress(processes=self.accelerator.num_processes)
        if found is not None:
            self._restore(*found)
        elif resume:
            self._say(f"No checkpoint in {self.folder / 'checkpoints'}: starting from the beginning.")
            self.log.forget_after(0)
        self.progress.batches_per_epoch = self.batches.per_epoch
        if self.accelerator.is_main_process:
            remove_file(self.folder / RECORD_FILE)
            config.save(self.folder)
        self.stopped_by: int | None = None
        self.files: list[str] = []
        self.waiting = Waiting()
        self.images = 0

    def _place(self, model: Any) -> None:
        """Puts the model on its device, with the optimizer and the averages of its weights."""
        on_gpu = self.accelerator.device.type == "cuda"
        # The optimizer is chosen by the device of the weights.
        model.to(self.accelerator.device)
        if self.settings.compile:
            compile_for_training(model)
        optimizer = make_optimizer(model, self.settings)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if on_gpu and isinstance(model, UniHemaPreTrainedModel):
            # As its maps are, so that no convolution turns its weights around.
            model.base_model.visual_backbone.backbone.to(memory_format=torch.channels_last)
        self.schedule = ProgressSchedule(self.optimizer, self.settings)
        self.ema = None
        if self.settings.ema_decay is not None:
            self.ema = ExponentialMovingAverage(self._plain(), self.settings.ema_decay, self.settings.ema_warmup)
            self.accelerator.register_for_checkpointing(self.ema)
        # Autocast casts a weight at every use. Compiled, and computed again in the backward pass, weights are cast there.
        self.casts_weights = (
            on_gpu
            and self.accelerator.num_processes == 1
            and self.settings.mixed_precision == "bf16"
            and not (self.settings.compile or self.settings.gradient_checkpointing)
        )

    def _restore(self, path: Path, progress: Progress) -> None:
        """Goes on from a checkpoint of the run."""
        self.progress = progress
        try:
            self.accelerator.load_state(str(path))
        except Exception as error:
            # Accelerate, PyTorch and safetensors raise anything on damaged files.
            raise TrainingError(
                f"{path}: a damaged checkpoint ({shortened(error)}). Delete it, and the run goes on from the one before."
            ) from error
        total = self._total_steps()
        self._say(f"Resuming from {path}: step {progress.step}{f' of {total}' if total else ''}.")
        self.log.forget_after(progress.step)

    def _make_batches(self, model_config) -> RunBatches:
        data = self.config.data
        if data.cache_images:
            writers = max(1, data.workers) * self.accelerator.num_processes
            self.cache = ImageCache(self.folder / CACHE_FOLDER, data.cache_gigabytes * 1e9, writers)
        datasets = {
            task: SmearDataset(
                rows,
                self.processor,
                task,
                augmentation=self.config.augmentation.for_task(task),
                augmentation_of={
                    name: self.config.augmentation.for_task(task, name) for name in self.config.augmentation.data_sets
                },
                class_names=list(model_config.id2label.values()),
                single_cell_labels=model_config.single_cell_names,
                morphology=model_config.morphology,
                seed=self.settings.seed,
                questions_per_image=data.questions_per_image,
                cache=self.cache,
                text_only=data.text_only,
                label_parents=model_config.label_parents,
                pixels_as_bytes=True,
                pad_multiple=COMPILED_SIDES if self.settings.compile else None,
                cell_masks=model_config.trained.cell_masks,
            )
            for task, rows in self.rows.items()
        }
        # A set of other tasks than those of the run has no part in it, and its views no use.
        names = {real_path(folder).name for folder in data.folders}
        names |= {name for dataset in datasets.values() for name, _ in dataset.sources}
        if unknown := [name for name in self.config.augmentation.data_sets if name not in names]:
            raise RunConfigError(
                f"augmentation.data_sets names {', '.join(unknown)}: no such data set. There are {', '.join(sorted(names))}."
            )
        return RunBatches(
            datasets,
            data,
            self.settings.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
            # A single batch counts for itself.
            count=partial(count_loss_items, config=model_config) if self.settings.accumulation > 1 else None,
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

    def _waited_enough(self) -> bool:
        return self.settings.patience is not None and self.progress.waited >= self.settings.patience

    def to_the_end(self) -> dict[str, Any]:
        """Trains until a limit is reached, then measures and saves."""
        sizes = ", ".join(f"{task} {len(rows)}" for task, rows in self.rows.items())
        self._say(f"Training on {self.accelerator.device} ({self.accelerator.num_processes} process(es)): {sizes}.")
        for task, shares in self.batches.shares.items():
            self._say(f"{task}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
        # Python lets only the main thread handle signals.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        handlers = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            self._train()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._finish()

    def _stop(self, number: int, frame: Any) -> None:
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = number
        self._say("Stopping after this step, with a checkpoint; once more stops at once.")

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
        self.parts.train(self._plain())
        with bar:
            stream = self.batches.stream(self.progress.batch)
            while self._fraction_done() < 1 and not self._waited_enough():
                with self.waiting.on("data"):
                    batches = [batch for _, batch in islice(stream, self.settings.accumulation)]
                with self.waiting.on("processor"), matrix_products(self.settings.tf32, self.accelerator.device):
                    to_log = self._step(batches, bar)
                if to_log is not None:
                    self._log_step(bar, to_log)
                self.progress.batch += len(batches)
                self._end_of_epoch(self.progress.batch // self.batches.per_epoch)
                now = time.monotonic()
                seconds = self.progress.seconds + now - clock
                since_save, clock = now - last_save, now
                stop, self.progress.seconds, since_save = self.agreement.largest(
                    self.stopped_by is not None, seconds, since_save
                )
                if stop:
                    path = save_checkpoint(self.folder, self.accelerator, self.progress, logging.keep_checkpoints)
                    raise TrainingInterrupted(
                        f"Stopped at step {self.progress.step}; {path} is saved. The same command goes on from there."
                    )
                minutes = logging.checkpoint_minutes
                due = minutes is not None and since_save > 60 * minutes
                due = due or bool(logging.checkpoint_steps and self.progress.step % logging.checkpoint_steps == 0)
                if due:
                    save_checkpoint(self.folder, self.accelerator, self.progress, logging.keep_checkpoints)
                    last_save = clock = time.monotonic()
            stream.close()
        self.batches.close()
        self._say_what_was_waited_for()

    def _say_what_was_waited_for(self) -> None:
        """What would make the run faster, in the log and on the screen; of a run that was resumed, since then."""
        shares, seconds = self.waiting.shares(), sum(self.waiting.seconds.values())
        if not seconds:
            return
        images = self.images * self.accelerator.num_processes
        line = {"event": "end", "step": self.progress.step, "seconds": seconds, "images": images, "waited": shares}
        line |= {"images_per_second": images / seconds, "peak_gigabytes": peak_gigabytes(self.accelerator.device)}
        self.log.write(line)
        words = ", ".join(f"{name} {of['seconds']:.1f} s ({of['percent']:.0f} %)" for name, of in shares.items())
        self._say(f"{images / seconds:.1f} images a second. Waited for: {words}.")

    def _step(self, batches: Sequence[dict[str, Any]], bar: tqdm) -> dict[str, Any] | None:
        """One step of the optimizer, on all batches that are accumulated for it. The device is waited for once, before it.

        Gives what the log says of it, where it has a line.
        """
        progress, counts = self.progress, self._counts(batches)
        self.files = [name for batch in batches for name in batch["file_names"]]
        self.images += len(self.files)
        logged = (progress.step + 1) % self.config.logging.log_every == 0 or progress.step == 0
        rate = self.schedule.set(progress.step, self._fraction_done())
        tasks: list[str] = []
        losses: list[torch.Tensor] = []
        for batch in batches:
            task = batch.pop("task")
            batch.pop("file_names")
            with self.accelerator.accumulate(self.model):
                output, problem = self._forward(task, batch | counts.get(task, {}))
                if self.agreement.largest(problem is not None)[0]:
                    self._diverged(problem or "another process has met a loss that is not finite")
                loss = output.loss * self.settings.loss_weights.get(task, 1.0)
                tasks.append(task)
                losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    # Without clipping this only measures.
                    limit = self.settings.gradient_clipping or math.inf
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                    # Each process has the loss of its part of the batch only; the terms are those of the first.
                    terms = dict(getattr(output, "loss_dict", None) or {}) if logged else {}
                    whole = [self.accelerator.reduce(losses[-1], reduction="mean")] if logged else []
                    read = self._read([*losses, norm, *whole, *terms.values()])
                    self._check_finite(tasks, read)
                self.optimizer.step()
                self.optimizer.zero_grad()
        for number, task in enumerate(tasks):
            self.log.add(task, read[number])
        self.log.count_images(len(self.files))
        progress.step += 1
        if self.ema is not None:
            self.ema.update(self._plain())
        bar.update(1)
        if not logged:
            return None
        whole_loss, *values = read[len(tasks) + 1 :]
        terms = dict(zip(terms, values, strict=True)) or None
        return {"task": tasks[-1], "loss": whole_loss, "learning_rate": rate, "losses": terms}

    def _read(self, values: Sequence[Any]) -> list[float]:
        """Scalars of the device, in one copy."""
        with self.waiting.on("card"):
            scalars = [torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device) for value in values]
            return torch.stack([scalar.detach().reshape(()) for scalar in scalars]).tolist()

    def _check_finite(self, tasks: Sequence[str], read: Sequence[float]) -> None:
        """A step whose loss or gradient is no number would spoil the weights, and the next checkpoint."""
        problems = [f"the {task} loss is {loss}" for task, loss in zip(tasks, read) if not math.isfinite(loss)]
        norm = read[len(tasks)]
        if not problems and not math.isfinite(norm):
            problems = [f"the gradient of the {tasks[-1]} loss is {norm}"]
        if self.agreement.largest(bool(problems))[0]:
            self._diverged(problems[0] if problems else "another process has met a loss that is not finite")

    def _log_step(self, bar: tqdm, figures: dict[str, Any]) -> None:
        progress = self.progress
        rate_of_images = self.log.images_per_second() * self.accelerator.num_processes
        means = self.log.take_means()
        shown = {name: f"{mean['loss']:.3f}" for name, mean in means.items()}
        shown |= {"img/s": f"{rate_of_images:.1f}", "done": f"{self._fraction_done():.0%}"}
        bar.set_postfix(shown, refresh=False)
        self.log.write(
            {
                "event": "step",
                "step": progress.step,
                "epoch": round(progress.batch / self.batches.per_epoch, 3),
                **figures,
                "seconds": progress.seconds,
                "images_per_second": rate_of_images,
                # Seconds, since the line before.
                "waited": self.waiting.since_last(),
                "peak_gigabytes": peak_gigabytes(self.accelerator.device),
                # Every task of a mix, since the line before.
                "means": means,
            }
        )

    def _counts(self, batches: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Task -> what the losses of its accumulated batches divide by, so that a step learns what it would from one large batch
        of each task. A single batch counts for itself.
        """
        if len(batches) == 1:
            return {}
        totals: dict[tuple[str, str], int] = {}
        for batch in batches:
            for name, count in batch.pop("loss_items").items():
                totals[batch["task"], name] = totals.get((batch["task"], name), 0) + count
        # All processes have the same tasks in the same order.
        means = average_over_processes(*totals.values(), device=self.accelerator.device)
        shares = Counter(batch["task"] for batch in batches)
        counts: dict[str, dict[str, Any]] = {task: {} for task in shares}
        for (task, name), mean in zip(totals, means, strict=True):
            # The loss is divided by the number of batches afterwards, whatever their tasks.
            counts[task][name] = mean / shares[task]
        return {task: {"num_items_in_batch": of_task} for task, of_task in counts.items()}

    def _forward(self, task: str, batch: dict[str, Any]) -> tuple[Any, str | None]:
        """The output, or what is wrong with its predictions."""
        try:
            return self._call(task, batch), None
        except NotFiniteError as error:
            return None, f"the {task} loss is nan ({shortened(error)})"

    def _call(self, task: str, packed: dict[str, Any]) -> Any:
        ours = isinstance(self._plain(), UniHemaPreTrainedModel)
        batch = unpack(
            {"task": task, **packed}, self.accelerator.device, self.processor.image_processor, truth_on_host=ours
        )
        pixels = batch.get("pixel_values")
        if pixels is not None and len(pixels) == 1 and max(pixels.shape[-2:]) <= SMALLEST_ALONE:
            norms = (part for part in self.model.modules() if isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)))
            if any(norm.training for norm in norms):
                raise TrainingError(
                    f"{', '.join(self.files)}: a batch of one image of {pixels.shape[-1]} x {pixels.shape[-2]} pixels, of which "
                    f"the backbone's norms see one value. Raise data.image_sizes of {task}, or its data.batch_size."
                )
        if self.casts_weights:
            return with_half_weights(self.model, torch.bfloat16, batch)
        return self.model(**batch)

    def _diverged(self, problem: str) -> None:
        """Keeps what is sound, writes down what happened, and stops."""
        progress, folder = self.progress, self.folder
        sound = all(bool(torch.isfinite(value).all()) for value in self._plain().parameters())
        if sound:
            # The weights are those before this step: nothing is lost, and resuming meets the same batches again.
            saved = save_checkpoint(folder, self.accelerator, progress, self.config.logging.keep_checkpoints)
        else:
            found = last_checkpoint(folder)
            saved = found[0] if found else None
        if self.accelerator.is_main_process:
            account = {"step": progress.step, "problem": problem, "files": self.files, "checkpoint": saved}
            account |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "recent": self.log.take_means()}
            write_json(folder / DIVERGED_FILE, account)
        raise TrainingError(
            f"Training stopped at step {progress.step}: {problem}, with {', '.join(self.files)}. The state before this "
            f"step is in {saved or 'no checkpoint yet'}, an account in {folder / DIVERGED_FILE}. Look at these files, lower "
            "the learning rate, or train without mixed precision."
        )

    def _averaged(self):
        return self.ema.applied(self._plain()) if self.ema is not None else nullcontext()

    def _end_of_epoch(self, epoch: int) -> None:
        logging = self.config.logging
        # An epoch may end in the middle of accumulated batches, and is then over one step later.
        if not logging.evaluate_every or not self.val_rows or epoch == self.progress.evaluated or epoch < 1:
            return
        self.progress.evaluated = epoch
        if epoch % logging.evaluate_every:
            return
        if self.accelerator.is_main_process:
            with self._averaged():
                report = self._evaluate(self._plain(), logging.evaluation_samples)
                score, text = headline(report)
                if self.progress.take_score(score) and logging.keep_best:
                    save_trained(self._plain(), None, self.folder / "best")
            self.log.write({"event": "evaluation", "epoch": epoch, "step": self.progress.step, **report})
            self._say(f"epoch {epoch}: {text}")
        self.accelerator.wait_for_everyone()
        self.progress.waited = int(self.agreement.largest(self.progress.waited)[0])
        self.parts.train(self._plain())

    def _evaluate(self, model: Any, samples: int | None, calibrate: bool = False) -> dict[str, Any]:
        # Images of other sizes, and figures that do not hang on compilation.
        with torch.compiler.set_stance("force_eager"):
            return evaluate_model(
                model,
                self.processor,
                self.val_rows,
                max_samples=samples,
                progress=self.config.logging.progress,
                calibrate=calibrate,
                text_only=self.config.data.text_only,
            )

    def _finish(self) -> dict[str, Any]:
        logging = self.config.logging
        save_checkpoint(self.folder, self.accelerator, self.progress, logging.keep_checkpoints)
        report: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            # Mixed precision ends here: what is saved is measured as it will be used.
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            with self._averaged():
                if logging.keep_best and self.progress.best is not None:
                    model = load_trained(model, self.folder / "best")
                if self.val_rows:
                    report = self._evaluate(model.eval(), logging.final_samples, calibrate=True)
                self._save(model, report)
            if self.cache is not None:
                self.cache.clear()
        self.accelerator.wait_for_everyone()
        return report

    def _save(self, model, report: dict[str, Any]) -> None:
        save_trained(model, self.processor, self.folder)
        if report:
            write_report(report, self.folder)
        data = self.config.data
        val_split = data.val_split if data.folds is None else "held out"
        rows = {data.train_split: self.rows, val_split: self.val_rows}
        record = data_record(data.folders, {split: found for split, found in rows.items() if found}, val_split)
        # What an adapter's card has to say, nobody but its maker knows: `unihema adapt` and `unihema card` ask.
        if isinstance(model, UniHemaPreTrainedModel) and self.config.adapter.method == "none":
            card = checkpoint_card(model.config, report, data=record, run=self.config.to_dict())
            write_text(self.folder / "README.md", card)
        # Last: by this file a finished run is known.
        write_json(self.folder / RECORD_FILE, asdict(record))
        self._say(f"Saved {self.folder}. {headline(report)[1]}".strip())


def _checkpoint_gradients(model: Any) -> None:
    try:
        # Newer releases of Transformers have another name for it.
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    except (AttributeError, ValueError) as error:
        raise RunConfigError(f"optimisation.gradient_checkpointing: {type(model).__name__} cannot do that.") from error


def compile_for_training(model: Any) -> None:
    """Compiles a model in place, by its own choice of parts where it has one.

    Args:
        model (`nn.Module`): Its `compile_parts` is called; without one all of it is compiled, for any size.
    """
    if hasattr(model, "compile_parts"):
        model.compile_parts()
    else:
        model.compile(dynamic=True)


__all__ = ["Build", "Trainable", "compile_for_training", "train"]
