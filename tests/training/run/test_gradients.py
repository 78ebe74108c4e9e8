"""A step has the same gradient however its images are shared out: to accumulated batches, to processes, or both."""

import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import HEADS, batch, lively, very_tiny_config
from tiny_runs import run_config
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainingArguments

from unihema import UniHemaForMultiTask, UniHemaProcessor
from unihema.training.run import loop
from unihema.training.run.batches import pack


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is copied")
IMAGES = 8
PROCESSOR = UniHemaProcessor.from_default(max_text_length=16)
# Of the length of a parameter's gradient: sums in another order.
TOLERANCE = 1e-5
# Of the length of the whole gradient: what is zero but for rounding, as of the biases of keys and of those before a norm.
ROUNDING = 1e-6
# What each process draws for itself.
WITHOUT_CHANCE = {"dropout": 0.0, "single_cell_dropout": 0.0, "denoising_queries": 0}
# Head -> the tasks of its step, and the configuration of its model.
STEPS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "detection": (("detection",), {"morphology": {}}),
    "attributes": (("detection",), {}),
    "coarse classes": (("detection",), {"label_parents": {"neutrophil": "platelet"}}),
    "official losses": (("detection",), {"official_losses": True}),
    "segmentation": (("segmentation",), {}),
    "single_cell": (("single_cell",), {}),
    "question_answering": (("question_answering",), {}),
    "cloze": (("cloze",), {}),
    "multitask": (("detection", "segmentation", "single_cell", "question_answering"), {}),
}
# The heads whose labels Transformers' Trainer counts over accumulated batches; boxes and masks it counts in each batch.
COUNTED = ("single_cell", "question_answering")
Gradient = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A step: of which head, of how many accumulated batches, and whether its BatchNorms learn."""

    head: str
    accumulation: int
    norms_learn: bool = False


def uneven(task: str) -> dict[str, Any]:
    """A batch whose images have different numbers of cells, attributes, labelled pixels and tokens, some of them none.

    What is counted is an odd number, so that no two processes have as much of it.
    """
    whole = batch("question_answering" if task == "cloze" else task, images=IMAGES)
    labels = whole["labels"]
    if task == "detection":
        for image, kept in zip(labels, (1, 2, 0, 2, 0, 0, 2, 2), strict=True):
            for name in ("class_labels", "boxes", "morphology"):
                image[name] = image[name][:kept]
        labels[1]["morphology"][0] = -100
        labels[3]["annotated_classes"] = torch.tensor([True, True, False])
    elif task == "segmentation":
        labels[1, :, :40] = -100
        labels[2] = labels[6] = labels[7] = -100
    elif task == "single_cell":
        labels[2] = labels[5] = labels[7] = -100
    else:
        labels[0, 1:] = labels[3, 2:] = labels[4] = -100
    return whole


def part_of(whole: dict[str, Any], start: int, size: int) -> dict[str, Any]:
    return {name: value[start : start + size] for name, value in whole.items()}


class Shared:
    """In place of `RunBatches`: the same images of each task, shared out to accumulated batches and processes."""

    per_epoch = 1_000
    shares: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    tasks: tuple[str, ...] = ()
    accumulation = 1
    without_attributes = False

    def __init__(
        self, datasets: Any, config: Any, seed: int, process: int, processes: int, pin_memory: bool, count: Any = None
    ):
        self.process, self.processes, self.count = process, processes, count

    def stream(self, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        size = IMAGES // (self.accumulation * self.processes)
        for number in range(self.accumulation):
            for task in self.tasks:
                images = part_of(uneven(task), (number * self.processes + self.process) * size, size)
                if task == "detection" and self.without_attributes:
                    images["labels"] = [
                        {name: value for name, value in image.items() if name != "morphology"}
                        for image in images["labels"]
                    ]
                images |= {"task": task, "file_names": [f"{task} {number}"] * size}
                if self.count is not None:
                    images["loss_items"] = self.count(task, images["labels"])
                yield number, pack(images)


class Taken(Exception):
    """The gradient is there, and nothing else is wanted of the run."""


def gradient_of(model: torch.nn.Module, run: Callable[[], Any]) -> Gradient:
    """What the optimizer would take its first step with."""
    found: Gradient = {}

    def take(*arguments: Any) -> None:
        found.update((name, of.grad.clone()) for name, of in model.named_parameters() if of.grad is not None)
        raise Taken

    handle = register_optimizer_step_pre_hook(take)
    try:
        with pytest.raises(Taken):
            run()
    finally:
        handle.remove()
    return found


def keep_statistics(model: torch.nn.Module) -> None:
    """Norms do not learn, so that they have nothing from the other images of a batch: the only other thing that does."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().train = lambda mode=True: None


def ours(smears: Path, folder: Path, case: Case) -> Gradient:
    """The gradient of a step of our training loop."""
    tasks, changes = STEPS[case.head]
    torch.manual_seed(0)
    config = very_tiny_config(**WITHOUT_CHANCE, freeze_backbone_norm=not case.norms_learn, **changes)
    model = lively(UniHemaForMultiTask(config))
    if not case.norms_learn:
        keep_statistics(model)
    run = run_config(
        smears,
        folder / str(case),
        **{
            "data.val_split": "",
            # Of any task: what a step takes is `Shared`.
            "data.tasks": ["segmentation"],
            "optimisation.accumulation": case.accumulation * len(tasks),
            "optimisation.gradient_clipping": 0.0,
            "optimisation.ema_decay": None,
            "optimisation.device": "cpu",
        },
    )
    loop.RunBatches = Shared
    Shared.tasks, Shared.accumulation, Shared.without_attributes = tasks, case.accumulation, not config.morphology
    return gradient_of(model, lambda: loop.train(run, build=lambda *_: (model, PROCESSOR)))


def of_the_trainer(folder: Path, case: Case, processes: int) -> Gradient:
    """The gradient of a step of Transformers' Trainer."""
    torch.manual_seed(0)
    model = lively(HEADS[case.head](very_tiny_config(**WITHOUT_CHANCE, freeze_backbone_norm=True)))
    keep_statistics(model)
    whole = uneven(case.head)
    arguments = TrainingArguments(
        output_dir=str(folder / str(processes) / str(case)),
        per_device_train_batch_size=IMAGES // (case.accumulation * processes),
        gradient_accumulation_steps=case.accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_find_unused_parameters=True,
    )
    rows = [part_of(whole, number, 1) for number in range(IMAGES)]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=joined)
    return gradient_of(model, trainer.train)


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: torch.cat([row[name] for row in rows])
        if isinstance(value, torch.Tensor)
        else [each for row in rows for each in row[name]]
        for name, value in rows[0].items()
    }


def in_processes(
    count: int, folder: Path, cases: list[Case], step: Callable[[Case, int], Gradient]
) -> dict[Case, Gradient]:
    """The gradients that the first of so many processes has, which work together by gloo."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                _join(rank, count, port)
                found = [step(case, count) for case in cases]
                if rank == 0:
                    torch.save(found, folder / f"{count}.pt")
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    assert ended == [0] * count, "failed; its traceback is above"
    return dict(zip(cases, torch.load(folder / f"{count}.pt"), strict=True))


def _join(rank: int, count: int, port: int) -> None:
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    # What Accelerate knows of the process that was copied.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_same(found: Gradient, expected: Gradient, what: Any) -> None:
    assert found.keys() == expected.keys(), what
    whole_length = torch.stack([value.norm() for value in expected.values()]).norm()
    assert whole_length > 0, what
    for name, value in expected.items():
        assert (found[name] - value).norm() <= TOLERANCE * value.norm() + ROUNDING * whole_length, (what, name)


def check(alone: list[Case], together: list[Case], folder: Path, step: Callable[[Case, int], Gradient]) -> None:
    """Each case, in one process or in two, has the gradient of the case without accumulation in one."""
    found = {count: in_processes(count, folder, cases, step) for count, cases in ((1, alone), (2, together))}
    for count, gradients in found.items():
        for case, gradient in gradients.items():
            assert_same(gradient, found[1][case._replace(accumulation=1)], (case, count))


def test_two_processes_that_accumulate_learn_what_one_does_at_once(smears, tmp_path):
    check(
        [Case(head, 1) for head in STEPS],
        [Case(head, 2) for head in STEPS],
        tmp_path,
        lambda case, count: ours(smears, tmp_path / str(count), case),
    )


@pytest.mark.slow
def test_neither_accumulation_nor_processes_change_a_gradient(smears, tmp_path):
    cases = [Case(head, accumulation) for head in STEPS for accumulation in (1, 2, 4)]
    # Norms that learn have the statistics of a batch, which is that of all processes.
    cases += [Case(head, 1, norms_learn=True) for head in STEPS]
    check(cases, cases, tmp_path, lambda case, count: ours(smears, tmp_path / str(count), case))


@pytest.mark.slow
def test_the_trainer_of_transformers_however_it_accumulates(tmp_path):
    cases = [Case(head, 1) for head in HEADS] + [Case(head, each) for head in COUNTED for each in (2, 4)]
    check(cases, cases, tmp_path, partial(of_the_trainer, tmp_path))
