"""Several tasks on one image look at it once, and say what each says alone."""

import threading

import pytest
import torch
from tiny_models import batch, lively, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask
from unihema.modeling_unihema.tasks import IMAGE_TASKS


@pytest.fixture
def model() -> UniHemaForMultiTask:
    torch.manual_seed(0)
    return lively(UniHemaForMultiTask(very_tiny_config())).eval()


@pytest.fixture
def runs(model) -> dict[str, list[int]]:
    """How often each part that looks at the image has run."""
    parts = {"backbone": model.model.visual_backbone, "encoder": model.model.image_encoder}
    counted = {name: [] for name in parts}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: counted[name].append(1))
    return counted


def images(seed: int = 0) -> dict[str, torch.Tensor]:
    inputs = batch("detection", seed=seed)
    return {name: inputs[name] for name in ("pixel_values", "pixel_mask")}


def ask(model, task: str, **inputs):
    output = model(task=task, **inputs)
    return output.mask_logits if task == "segmentation" else output.logits


def afresh(model, task: str, **inputs):
    model.model.image_memory.forget()
    return ask(model, task, **inputs)


@pytest.mark.parametrize("order", [IMAGE_TASKS, IMAGE_TASKS[::-1]])
def test_tasks_on_one_image_share_its_states(model, runs, order):
    with torch.inference_mode():
        expected = {task: afresh(model, task, **images()) for task in order}
        model.model.image_memory.forget()
        before = {name: len(times) for name, times in runs.items()}
        # Equal pixels in other tensors, as the processor gives them for each task; each task twice.
        for task in (*order, *order):
            torch.testing.assert_close(ask(model, task, **images()), expected[task], rtol=0, atol=0)
    assert {name: len(times) - before[name] for name, times in runs.items()} == {"backbone": 1, "encoder": 1}


def test_a_question_and_a_detection_share_the_backbone(model, runs):
    question = batch("question_answering")
    question.pop("labels")
    with torch.inference_mode():
        ask(model, "detection", pixel_values=question["pixel_values"], pixel_mask=question["pixel_mask"])
        model.generate(**question, max_new_tokens=3)
    assert {name: len(times) for name, times in runs.items()} == {"backbone": 1, "encoder": 1}


def test_another_image_mask_or_weight_is_looked_at(model, runs):
    first, other = images(), images(seed=1)
    shorter = {**first, "pixel_mask": first["pixel_mask"].clone()}
    shorter["pixel_mask"][:, :, 32:] = 0
    with torch.no_grad():
        for inputs in (first, other, shorter, {"pixel_values": first["pixel_values"]}):
            shown = ask(model, "detection", **inputs)
            torch.testing.assert_close(shown, afresh(model, "detection", **inputs), rtol=0, atol=0)
        assert len(runs["backbone"]) == len(runs["encoder"]) == 8
        next(model.model.image_encoder.parameters()).mul_(1.5)
        changed = ask(model, "detection", pixel_values=first["pixel_values"])
        assert len(runs["backbone"]) == 8 and len(runs["encoder"]) == 9
        assert not torch.equal(changed, shown)


def test_what_a_caller_does_to_an_output_is_not_remembered(model):
    with torch.inference_mode():
        first = model(task="detection", **images())
        expected = first.logits.clone()
        for _ in range(2):
            first.encoder_last_hidden_state.zero_()
            first = model(task="detection", **images())
            torch.testing.assert_close(first.logits, expected, rtol=0, atol=0)


def test_training_and_gradients_look_every_time(model, runs):
    inputs = batch("detection")
    model.train()
    for _ in range(2):
        model(task="detection", **inputs).loss.backward()
    model.eval()
    inputs.pop("labels")
    for _ in range(2):
        assert model(task="detection", **inputs).logits.requires_grad
    assert len(runs["backbone"]) == len(runs["encoder"]) == 4


def test_recorded_states_are_those_of_an_image_that_is_known_too(model):
    with torch.inference_mode():
        asked = {"task": "detection", "output_hidden_states": True, **images()}
        first, again = model(**asked), model(**asked)
        model.model.image_memory.forget()
        new = model(**asked)
    for output in (first, again):
        assert len(output.encoder_hidden_states) == len(new.encoder_hidden_states) > 1
        for state, expected in zip(output.encoder_hidden_states, new.encoder_hidden_states, strict=True):
            torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_threads_that_look_at_different_images_do_not_get_each_others(model):
    with torch.inference_mode():
        expected = [afresh(model, "detection", **images(seed)) for seed in range(2)]
    wrong: list[int] = []

    def look(number: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                if not torch.equal(ask(model, "detection", **images(number)), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=look, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
