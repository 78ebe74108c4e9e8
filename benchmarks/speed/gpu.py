"""What a GPU makes of it, beside DeformableDetr: forward, training step, attention, `unihema train` and `unihema predict`.

`python -m benchmarks.speed --section gpu` measures all of it in less than nine minutes. Every call gets images that are new.
"""

import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw

from benchmarks.speed import attention, models
from unihema import Analyzer, prepare_for_inference
from unihema.inference.graphs import Recorder
from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.shipped import lay_down_checkpoint
from unihema.training.run.config import DataConfig, LoggingConfig, ModelConfig, OptimisationConfig, RunConfig
from unihema.training.run.loop import compile_for_training, train
from unihema.training.run.precision import with_half_weights


PEER = "DeformableDetr"


@dataclass
class Scale:
    """How large everything is. The defaults are what the page tells of; tests take less.

    Args:
        preset (`str`): Of our model.
        size (`tuple[int, int]`): Height and width of an image.
        images (`int`): Images of a batch.
        cells (`int`): Labelled cells of an image.
        rounds (`int`): Timed calls of each case.
        warm (`int`): Calls before them.
        compiled (`bool`): Compile as well, which takes minutes.
        fields (`int`): Images in the folders of `unihema train` and `predict`.
        field_size (`tuple[int, int]`): Height and width of these.
        steps (`int`): Of `unihema train`.
        batch (`int`): Images of its batches.
        seconds (`float`): After so many no further case is begun.
    """

    preset: str = "base"
    size: tuple[int, int] = (800, 1066)
    images: int = 8
    cells: int = 80
    rounds: int = 8
    warm: int = 3
    compiled: bool = True
    fields: int = 192
    field_size: tuple[int, int] = (480, 640)
    steps: int = 100
    batch: int = 16
    seconds: float = 420.0


def machine(device: torch.device) -> dict[str, str]:
    """What the rows were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name,
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(device: torch.device | str = "cuda", scale: Scale | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the table, each as soon as it is measured: `case`, `unit`, `ours`, `peer` and `asked`.

    Args:
        device (`torch.device` or `str`): Where.
        scale ([`Scale`], *optional*): How large everything is.
    """
    device, scale = torch.device(device), scale or Scale()
    begun = time.monotonic()
    parts: list[Callable[[torch.device, Scale], Iterator[dict[str, Any]]]] = [
        forward,
        one_image,
        encoder_attention,
        training_step,
        training_run,
        folder_of_fields,
    ]
    if scale.compiled:
        parts += [compiled_forward, compiled_step]
    for part in parts:
        if time.monotonic() - begun > scale.seconds:
            yield _row(part.__name__.replace("_", " "), "not measured: out of time")
            continue
        yield from part(device, scale)
        _forget(device)


def forward(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """Detection of a batch in bfloat16."""
    cases = {"ours": _ours(device, scale), PEER: _peer(device)}
    ms = _forward_ms(cases, device, scale, scale.images, torch.bfloat16)
    yield _row(f"forward, {scale.images} images, bf16", "ms", ms["ours"], ms[PEER], "60")


def one_image(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """Detection of one image in float32, and by the analyzer in bfloat16."""
    cases = {"ours": _ours(device, scale), PEER: _peer(device)}
    ms = _forward_ms(cases, device, scale, 1, None)
    yield _row("forward, 1 image, float32", "ms", ms["ours"], ms[PEER], "30")
    del cases
    model = models.unihema("detection", scale.preset)
    prepare_for_inference(model)
    processor = UniHemaProcessor.from_default(detection={"longest_edge": max(scale.size)})
    analyzer = Analyzer(model.to(device, torch.bfloat16), processor)
    tensors = _images(device, scale, 1, torch.bfloat16)
    recorder = Recorder(model) if device.type == "cuda" else None

    def alone() -> None:
        with torch.inference_mode():
            analyzer.model(next(tensors))

    def recorded() -> None:
        with torch.inference_mode(), recorder.held():
            recorder("detection", model, next(tensors))

    waiting = [_field(scale.size, number)[0] for number in range(scale.warm + scale.rounds)]
    cases = {"alone": alone, "whole": lambda: analyzer(waiting.pop(), tiles="off")}
    cases |= {} if recorder is None else {"recorded": recorded}
    ms = _times(cases, device, scale)
    yield _row("forward, 1 image, bf16, the model of `Analyzer`", "ms", ms["alone"])
    if recorder is not None:
        yield _row("forward, 1 image, bf16, its recorded graph", "ms", ms["recorded"], asked="12")
    yield _row("`Analyzer`, 1 image, bf16, from pixels to cells", "ms", ms["whole"])


def encoder_attention(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """Deformable attention of an encoder layer, forward and backward."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    from unihema.modeling_unihema.deformable_attention import multi_scale_deformable_attention

    theirs = MultiScaleDeformableAttention()
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    value, shapes, points, weights = attention.problem(scale.size, None)
    value, points, weights = (
        part.to(device, half).expand(scale.images, *part.shape[1:]).contiguous().requires_grad_()
        for part in (value, points, weights)
    )
    sizes = torch.tensor(shapes, device=device)
    forms = {
        "ours": lambda: multi_scale_deformable_attention(value, shapes, points, weights),
        PEER: lambda: theirs(value, sizes, shapes, None, points, weights, 64),
    }

    def both(form: Callable[[], torch.Tensor]) -> None:
        output = form()
        torch.autograd.grad(output, (value, points, weights), torch.ones_like(output))

    ms = _times({name: lambda form=form: both(form) for name, form in forms.items()}, device, scale)
    yield _row(f"deformable attention, encoder, {scale.images} images, with backward", "ms", ms["ours"], ms[PEER], "5")


def training_step(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """A step with labels in bfloat16: forward, loss, backward, optimizer; and its memory. One model on the device at a time."""
    ms, peak = {}, {}
    for name, build in (("ours", lambda: _ours(device, scale)), (PEER, lambda: _peer(device))):
        ms[name], peak[name] = _step_ms(build().train(), name == "ours", device, scale)
        _forget(device)
    case = f"training step, {scale.images} images with {scale.cells} cells each, bf16"
    yield _row(case, "ms", ms["ours"], ms[PEER], "300")
    if device.type == "cuda":
        yield _row("its peak memory", "GB", peak["ours"], peak[PEER], "21")


def compiled_forward(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """Detection of a batch in bfloat16, compiled."""
    model = _ours(device, scale)
    torch.compiler.reset()
    compile_for_training(model)
    begun = time.monotonic()
    ms = _forward_ms({"ours": model}, device, scale, scale.images, torch.bfloat16)
    yield _row(f"forward, {scale.images} images, bf16, compiled", "ms", ms["ours"], asked="45")
    yield _row("its compiling and all calls", "s", time.monotonic() - begun)


def compiled_step(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """A step with labels, compiled as `unihema train --compile` does."""
    model = _ours(device, scale).train()
    torch.compiler.reset()
    compile_for_training(model)
    begun = time.monotonic()
    ms, _ = _step_ms(model, False, device, scale)
    yield _row(
        f"training step, {scale.images} images with {scale.cells} cells each, bf16, compiled", "ms", ms, asked="220"
    )
    yield _row("its compiling and all calls", "s", time.monotonic() - begun)


def training_run(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """`unihema train` from the shipped checkpoint, at 640 pixels."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        checkpoint = lay_down_checkpoint(work / "checkpoint")
        names = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["id2label"]
        fields = folder_of_painted_fields(work / "fields", scale, sorted(names.values())[:3])
        first = min(20, scale.steps)
        config = RunConfig(
            output_dir=str(work / "run"),
            data=DataConfig(
                folders=[str(fields)],
                val_split="",
                tasks=["detection"],
                batch_size={"detection": scale.batch},
                image_sizes={"detection": {"longest_edge": max(scale.field_size)}},
                workers=max(1, (os.cpu_count() or 1) - 2) if device.type == "cuda" else 0,
            ),
            model=ModelConfig(initial_checkpoint=str(checkpoint)),
            optimisation=OptimisationConfig(
                max_steps=scale.steps,
                time_limit_minutes=2.0,
                mixed_precision="bf16" if device.type == "cuda" else "no",
                device="cuda" if device.type == "cuda" else "cpu",
            ),
            logging=LoggingConfig(log_every=first, progress=False, checkpoint_minutes=None),
        )
        lines: list[dict[str, Any]] = []
        begun, reached = time.monotonic(), []

        def note(line: dict[str, Any]) -> None:
            lines.append(line)
            if line.get("step") == first and not reached:
                reached.append(time.monotonic() - begun)

        train(config, callbacks=[note])
    rates = [line["images_per_second"] for line in lines if line["event"] == "step" and line["step"] > first]
    end = next(line for line in lines if line["event"] == "end")
    case = f"`unihema train`, shipped checkpoint, {max(scale.field_size)} px, batches of {scale.batch}"
    yield _row(case, "images a second", statistics.median(rates) if rates else end["images_per_second"], asked="300")
    yield _row(f"its first {first} steps, from the start of the command's work", "s", reached[0], asked="20")
    for name, share in end["waited"].items():
        yield _row(f"its time: {name}", "%", share["percent"])


def folder_of_fields(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """`unihema predict` with boxes and masks over a folder, all files written."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        fields = folder_of_painted_fields(work / "fields", scale, ["RBC"]) / "images"
        analyzer = Analyzer.from_pretrained(lay_down_checkpoint(work / "checkpoint"), device=device)
        paths = sorted(fields.iterdir())
        warm, rest = paths[: scale.images], paths[scale.images :]
        analyzer.analyze_files(warm, work / "warm", ("detection", "segmentation"), batch_size=scale.images)
        begun = time.monotonic()
        report = analyzer.analyze_files(rest, work / "out", ("detection", "segmentation"), batch_size=scale.images)
        seconds = time.monotonic() - begun
    case = f"`unihema predict`, {scale.field_size[1]}x{scale.field_size[0]} fields, detection and masks, {scale.images} at once"
    yield _row(case, "images a second", len(report.analysed) / seconds, asked="150")


def _row(case: str, unit: str, ours: float | None = None, peer: float | None = None, asked: str = "") -> dict[str, Any]:
    return {"case": case, "unit": unit, "ours": ours, "peer": peer, "asked": asked}


def _ours(device: torch.device, scale: Scale) -> torch.nn.Module:
    return models.unihema("detection", scale.preset).to(device)


def _peer(device: torch.device) -> torch.nn.Module:
    return models.deformable_detr().to(device)


def _images(
    device: torch.device, scale: Scale, number: int, dtype: torch.dtype = torch.float32
) -> Iterator[torch.Tensor]:
    """Batches of images that were never seen, made where they are used."""
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(number, 3, *scale.size, device=device, dtype=dtype, generator=generator) for _ in count())


def _field(size: tuple[int, int], seed: int, cells: int = 40) -> tuple[Image.Image, list[list[int]]]:
    """A field of round cells on a ground of soft noise, and their boxes, xywh pixels."""
    random = np.random.default_rng(seed)
    noise = random.integers(190, 235, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)
    draw, side = ImageDraw.Draw(picture), max(6, size[0] // 14)
    boxes = []
    for left, top in zip(
        random.integers(0, size[1] - side, cells).tolist(), random.integers(0, size[0] - side, cells).tolist()
    ):
        draw.ellipse((left, top, left + side - 1, top + side - 1), fill=(205, 120, 140), outline=(150, 60, 90))
        boxes.append([left, top, side, side])
    return picture, boxes


def folder_of_painted_fields(folder: Path, scale: Scale, names: list[str]) -> Path:
    """A data folder of fields in COCO's layout.

    Args:
        folder (`Path`): A new folder.
        scale ([`Scale`]): `fields` and `field_size`.
        names (`list[str]`): Classes of the cells, in turn.
    """
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, scale.fields + 1):
        picture, boxes = _field(scale.field_size, number)
        name, (height, width) = f"{number:04d}.jpg", scale.field_size
        picture.save(folder / "images" / name, quality=92)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for box in boxes:
            cell = {"bbox": box, "category_id": 1 + len(annotations) % len(names), "area": box[2] * box[3]}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **cell})
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(names)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(coco), encoding="utf-8")
    return folder


def _forward_ms(
    cases: dict[str, torch.nn.Module], device: torch.device, scale: Scale, number: int, half: torch.dtype | None
) -> dict[str, float]:
    images = _images(device, scale, number)

    def run(model: torch.nn.Module) -> None:
        with torch.no_grad(), _autocast(device, half):
            model(next(images))

    return _times({name: lambda model=model: run(model) for name, model in cases.items()}, device, scale)


def _step_ms(model: torch.nn.Module, casts: bool, device: torch.device, scale: Scale) -> tuple[float, float]:
    """Milliseconds of a step and gigabytes at its peak."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda" or None)
    images, seeds = _images(device, scale, scale.images), count()
    half = torch.bfloat16 if device.type == "cuda" else None
    on_host = hasattr(model, "denoising")

    def step() -> None:
        labels = models.cells(scale.cells, scale.images, next(seeds))
        if not on_host:
            labels = [{name: value.to(device) for name, value in image.items()} for image in labels]
        batch = {"pixel_values": next(images), "labels": labels}
        optimizer.zero_grad(set_to_none=True)
        with _autocast(device, half):
            output = with_half_weights(model, half, batch) if casts and half is not None else model(**batch)
        output.loss.backward()
        optimizer.step()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ms = _times({"step": step}, device, scale)["step"]
    return ms, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def _autocast(device: torch.device, half: torch.dtype | None) -> Any:
    return torch.autocast(device.type, half) if half is not None and device.type == "cuda" else nullcontext()


def _times(cases: dict[str, Callable[[], object]], device: torch.device, scale: Scale) -> dict[str, float]:
    """Median milliseconds of each case, in turn, the device waited for before and after."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(scale.warm + scale.rounds):
        for name, run in cases.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if number >= scale.warm:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
