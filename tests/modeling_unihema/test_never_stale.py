"""A result depends on the weights and inputs of its call alone: after any change it is that of a new model with these weights."""

import collections
import copy
import itertools
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from head_behaviour import ADAPTED, CONFIG, assert_same, differ
from tiny_models import HEADS, batch, lively, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import TASKS, UniHemaForMultiTask


every_head = pytest.mark.parametrize("task", HEADS)
names = (f"adapter_{number}" for number in itertools.count())


def make(task: str):
    torch.manual_seed(0)
    return lively(HEADS[task]._from_config(very_tiny_config(**CONFIG), attn_implementation="sdpa")).eval()


def inputs_of(task: str, **options) -> dict:
    inputs = batch(task, **options)
    labels = inputs.pop("labels")
    return {**inputs, "decoder_input_ids": labels.clamp(min=0)} if task in ("question_answering", "cloze") else inputs


@torch.no_grad()
def answer(model, inputs: dict):
    dtype = model.dtype
    return model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})


def adapter_layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def fresh(model):
    """A new model with the same weights."""
    new = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="sdpa").to(model.dtype)
    layers = adapter_layers(model)
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        new.add_adapter(copy.deepcopy(config), name)
    if layers and not layers[0].disable_adapters:
        new.set_adapter(list(model.adapters_in_use))
    new.load_state_dict(model.state_dict())
    if layers and (layers[0].merged or layers[0].disable_adapters):
        new.disable_adapters()
    return new.eval()


def assert_fresh(model, task: str) -> None:
    """Checks the answers about an image seen before, and about another."""
    for inputs in (inputs_of(task), inputs_of(task, seed=5)):
        found = answer(model, inputs)
        assert_same(found, answer(fresh(model), inputs), atol=1e-5)


# Changes of the model, or uses of it. What they return is the model from then on.


def evaluate_with_gradients(model, task):
    model(**inputs_of(task))


def evaluate_with_autocast(model, task):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer(model, inputs_of(task))


def change_in_place(model, task):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05).add_(0.01 * torch.randn_like(parameter))


def change_data(model, task):
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.02 * torch.randn_like(parameter)


def copy_into_data(model, task):
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data + 0.02 * torch.randn_like(parameter))


def change_a_buffer(model, task):
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer.add_(0.3)


def replace_parameters(model, task):
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if module.__dict__.get("_active_adapter") is None:
                new = parameter.detach() + 0.02 * torch.randn_like(parameter)
                setattr(module, name, torch.nn.Parameter(new, requires_grad=parameter.requires_grad))


def load_other_weights(model, task):
    torch.manual_seed(7)
    model.load_state_dict({n: v + 0.02 * torch.randn(v.shape) if v.ndim else v for n, v in model.state_dict().items()})


def half_and_back(model, task):
    answer(model.bfloat16(), inputs_of(task))
    model.float()


def double_and_back(model, task):
    answer(model.to(torch.float64), inputs_of(task))
    model.to(torch.float32)


def train_a_step(model, task):
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    model(**batch(task)).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def copied(model, task):
    return copy.deepcopy(model)


def pickled(model, task):
    return pickle.loads(pickle.dumps(model))


def add_adapter(model, task):
    if not any(layer.merged for layer in adapter_layers(model)):
        config = peft.LoraConfig(r=2, target_modules=ADAPTED, init_lora_weights=False)
        model.add_adapter(config, next(names))
        model.enable_adapters()
        model.eval()


def switch_adapters_off(model, task):
    if adapter_layers(model):
        model.disable_adapters()


def switch_adapters_on(model, task):
    if adapter_layers(model):
        model.enable_adapters()


def merge_adapters(model, task):
    if adapter_layers(model) and not any(layer.merged or layer.disable_adapters for layer in adapter_layers(model)):
        model.merge_adapter()


def unmerge_adapters(model, task):
    model.unmerge_adapter()


def make_adapters_part_of_the_model(model, task):
    if adapter_layers(model) and not any(layer.merged for layer in adapter_layers(model)):
        return model.merge_and_unload()
    return None


# What must change the answers, and what must not.
CHANGING = [
    change_in_place,
    change_data,
    copy_into_data,
    change_a_buffer,
    replace_parameters,
    load_other_weights,
    train_a_step,
    add_adapter,
]
KEEPING = [evaluate_with_gradients, evaluate_with_autocast, double_and_back, copied, pickled]
OTHERS = [
    half_and_back,
    switch_adapters_off,
    switch_adapters_on,
    merge_adapters,
    unmerge_adapters,
    make_adapters_part_of_the_model,
]


@pytest.mark.parametrize("change", [*CHANGING, *KEEPING, half_and_back], ids=lambda change: change.__name__)
@every_head
def test_after_a_change_the_answer_is_that_of_a_new_model(task, change):
    model = make(task)
    before = answer(model, inputs_of(task))
    model = change(model, task) or model
    assert_fresh(model, task)
    after = answer(model, inputs_of(task))
    if change in CHANGING:
        assert differ(after, before, atol=1e-6)
    elif change in KEEPING:
        assert_same(after, before)


@every_head
def test_adapters_on_off_merged_and_unmerged(task):
    model = make(task)
    base = answer(model, inputs_of(task))
    add_adapter(model, task)
    adapted = answer(model, inputs_of(task))
    for change, expected in (
        (switch_adapters_off, base),
        (switch_adapters_on, adapted),
        (merge_adapters, adapted),
        (change_data, None),
        (unmerge_adapters, None),
        (make_adapters_part_of_the_model, None),
    ):
        change(model, task)
        assert_fresh(model, task)
        if expected is not None:
            assert_same(answer(model, inputs_of(task)), expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@every_head
def test_after_any_sequence_of_changes_the_answer_is_that_of_a_new_model(task, seed):
    chooser = random.Random(f"{task} {seed}")
    model, done = make(task), []
    answer(model, inputs_of(task))
    for _ in range(8):
        change = chooser.choice([*CHANGING, *KEEPING, *OTHERS])
        done.append(change.__name__)
        model = change(model, task) or model
        try:
            assert_fresh(model, task)
        except AssertionError as error:
            raise AssertionError(f"stale after {', '.join(done)}") from error


@every_head
def test_moved_within_inference_mode(task):
    with torch.inference_mode():
        model = make(task)
        answer(model, inputs_of(task))
        answer(model.to(torch.bfloat16), inputs_of(task))
        model.to(torch.float32)
        first = answer(model, inputs_of(task))
    assert_same(answer(model, inputs_of(task)), first)
    assert_fresh(model, task)


@every_head
def test_hooks_added_later_run_and_what_they_return_counts(task):
    model, inputs = make(task), inputs_of(task)
    before = answer(model, inputs)
    # Containers have no forward of their own; Transformers' ResNet takes the layers of a stage one by one; and the noise on
    # queries is for training.
    parts = {
        name: part
        for name, part in model.named_modules()
        if type(part).forward is not torch.nn.Module.forward
        and not name.endswith(".layers")
        and "denoising" not in name
    }
    ran = collections.Counter()
    watched = [part.register_forward_hook(lambda *_, name=name: ran.update([name])) for name, part in parts.items()]
    for seed in (0, 0, 5):
        answer(model, inputs_of(task, seed=seed))
    for hook in watched:
        hook.remove()
    assert len(parts) > 50 and [name for name in parts if ran[name] < 3] == []
    layer = model.model.visual_backbone.input_projection[0]
    changed = layer.register_forward_hook(lambda module, arguments, maps: maps * 1.5 + 0.2)
    assert differ(answer(model, inputs), before, atol=1e-5)
    changed.remove()
    assert_same(answer(model, inputs), before)


def state(model) -> dict:
    """What is on every module beside its weights: names of attributes, and hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (set(vars(module)), [list(getattr(module, kind)) for kind in hooks], module.training)
        for name, module in model.named_modules()
    }


def test_any_number_of_threads_share_a_model():
    torch.manual_seed(0)
    model = lively(UniHemaForMultiTask(very_tiny_config(**CONFIG))).eval()
    # Without, with little, and with much padding.
    sizes = [(64, 96), (96, 64), (70, 101), (33, 120), (129, 65), (50, 50)]
    jobs = [(task, size, seed) for seed in range(3) for size in sizes for task in TASKS]
    before = state(model)

    def run(job):
        task, size, seed = job
        inputs = inputs_of(task, size=size, seed=seed)
        if size == (50, 50):
            del inputs["pixel_mask"]
        if seed == 2 and task in ("question_answering", "cloze"):
            del inputs["decoder_input_ids"]
            return {"answers": model.generate(**inputs, max_new_tokens=4)}
        with torch.no_grad():
            return model(task=task, **inputs)

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(run, jobs))
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected, atol=1e-6)
    assert state(model) == before


@pytest.mark.parametrize("task", ["single_cell", "question_answering"])
def test_compiled_it_follows_its_weights(task):
    model = make(task)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    inputs = inputs_of(task)
    with torch.no_grad():
        compiled(**inputs)
        assert_fresh(model, task)
        for change in (change_in_place, change_data, copy_into_data, replace_parameters, change_a_buffer):
            change(model, task)
            assert_same(compiled(**inputs), answer(fresh(model), inputs), atol=2e-5)
    assert_fresh(model, task)


@pytest.mark.parametrize("task", ["single_cell", "segmentation"])
def test_exporting_leaves_nothing_on_the_model(task):
    model = make(task)
    before = state(model)
    with torch.no_grad():
        torch.export.export(model, (), inputs_of(task), strict=False)
    assert state(model) == before
    assert_fresh(model, task)
    change_data(model, task)
    assert_fresh(model, task)
