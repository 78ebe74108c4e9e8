"""What `Analyzer` runs on an NVIDIA GPU: operators recorded once and replayed. Elsewhere a tape of them stands for the graph."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from same_results import assert_same
from tiny_checkpoint import save_lively, save_lively_adapter
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from unihema import Analyzer
from unihema.inference.graphs import MOST_GRAPHS, Recorder


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")
ALL = {"tasks": ["detection", "segmentation", "single_cell"], "questions": ["What is it?", "The cell is ___."]}


class Tape(TorchDispatchMode):
    """Keeps operators with the tensors they were given and those they made."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(*(pytree.tree_leaves(part) for part in (result, again)), strict=False):
                # A view shows what it is a view of.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """Records as a CUDA graph does: operators and the memory that they read and write. Nothing of Python is run again."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, compute):
        self.recorded += 1
        with Tape() as tape:
            output = compute()

        def replay():
            self.replayed += 1
            tape.replay()

        return output, replay


def field(seed, size=(96, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_lively(tmp_path_factory.mktemp("models") / "first", 1)


@pytest.fixture
def analyzer(checkpoint):
    found = Analyzer.from_pretrained(checkpoint, device="cpu")
    found.recorder = Recorder(found.model, Tapes())
    return found


@pytest.fixture(scope="module")
def plain(checkpoint):
    return Analyzer.from_pretrained(checkpoint, device="cpu")


def test_replayed_results_are_those_of_the_operators_launched_one_by_one(analyzer, plain):
    for seed in range(6):
        # Of two sizes in turn.
        image = field(seed, (96, 64) if seed % 2 else (64, 96))
        assert_same(analyzer(image, **ALL), plain(image, **ALL))
    tapes = analyzer.recorder._record
    # Each size is recorded at its second image and replayed at its third.
    assert tapes.recorded == tapes.replayed == 2


def test_a_size_that_comes_once_is_not_recorded(analyzer, plain):
    for width in (64, 80, 96):
        image = field(0, (width, 48))
        assert_same(analyzer(image, ["detection"]), plain(image, ["detection"]))
    assert analyzer.recorder._record.recorded == 0


def test_prompts_are_inputs(analyzer, plain):
    for prompt in (None, "platelets", "white blood cells", None):
        for seed in range(3):
            assert_same(analyzer(field(seed), "detection", prompt), plain(field(seed), "detection", prompt))


def test_padding_is_an_input_too(analyzer, plain):
    for sizes in ([(96, 64), (64, 64)], [(64, 64), (96, 64)], [(96, 64), (96, 64)]):
        images = [field(seed, size) for seed, size in enumerate(sizes)]
        for _ in range(3):
            for found, expected in zip(analyzer.analyze_images(images), plain.analyze_images(images), strict=True):
                assert_same(found, expected)
    assert analyzer.recorder._record.replayed == 3


def twice_and_again(analyzer):
    """So often that what can be recorded is replayed."""
    return [analyzer(field(seed), ["detection", "single_cell"]) for seed in range(3)][-1]


def last_layer(model):
    return [part for part in model.single_cell_head.modules() if isinstance(part, nn.Linear)][-1]


def scaled(model):
    for weight in model.parameters():
        weight.mul_(1.01)


def swapped(model):
    for weight in model.parameters():
        weight.data = weight.data * 1.01


def replaced(model):
    layer = last_layer(model)
    layer.weight = nn.Parameter(layer.weight * 2)


def hooked(model):
    model.single_cell_head.register_forward_hook(lambda module, inputs, output: output.flip(-1))


def overridden(model):
    layer = last_layer(model)
    layer.forward = lambda states: nn.functional.linear(states, -layer.weight)


def another(model):
    class Doubled(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    last_layer(model).__class__ = Doubled


@pytest.mark.parametrize("change", [scaled, swapped, replaced, hooked, overridden, another])
def test_changes_of_the_model_are_seen(checkpoint, change):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu", prepare=False)
    analyzer.recorder = Recorder(analyzer.model, Tapes())
    before = twice_and_again(analyzer)
    expected = Analyzer.from_pretrained(checkpoint, device="cpu", prepare=False)
    with torch.no_grad():
        change(analyzer.model)
        change(expected.model)
    found = analyzer(field(2), ["detection", "single_cell"])
    assert_same(found, expected(field(2), ["detection", "single_cell"]))
    assert found.single_cell != before.single_cell
    assert_same(twice_and_again(analyzer), found)


def test_adapters_are_switched_and_merged(checkpoint, tmp_path):
    places = [save_lively_adapter(checkpoint, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    found, expected = (Analyzer.from_pretrained(checkpoint, device="cpu", adapters=places) for _ in range(2))
    found.recorder = Recorder(found.model, Tapes())
    results = []
    for change in (
        lambda model: None,
        lambda model: model.set_adapter("two"),
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: [layer.merge() for layer in model.modules() if hasattr(layer, "merge")],
        lambda model: [layer.unmerge() for layer in model.modules() if hasattr(layer, "merge")],
        lambda model: [layer.set_scale("two", 3.0) for layer in model.modules() if hasattr(layer, "set_scale")],
    ):
        change(found.model)
        change(expected.model)
        results.append([found(field(seed), "detection", threshold=0.0) for seed in range(3)][-1])
        assert_same(results[-1], expected(field(2), "detection", threshold=0.0))
    scores = [result.cells[0].score for result in results]
    assert len(set(scores[:3])) == 3
    assert abs(scores[-1] - scores[-2]) > 1e-3


def test_threads_share_a_recorder(analyzer, plain):
    images = [field(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: analyzer(image, **ALL), images))
    for image, result in zip(images, found, strict=True):
        assert_same(result, plain(image, **ALL))


def test_a_model_that_cannot_be_recorded_runs_without_and_says_so(checkpoint, plain):
    def refuse(compute):
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    analyzer.recorder = Recorder(analyzer.model, refuse)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = [analyzer(field(0), "detection") for _ in range(4)]
    for result in results:
        assert_same(result, plain(field(0), "detection"))
    assert [str(warning.message) for warning in said if "CUDA graph" in str(warning.message)] == [
        "No CUDA graph can be recorded of this model, which is slower without: operation not permitted when stream is capturing"
    ]


def test_graphs_give_way_to_a_batch_without_memory():
    recorder, asked = Recorder(nn.Linear(2, 2), Tapes()), []

    def large(states):
        asked.append(len(recorder._graphs))
        if recorder._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recorder.model(states)

    with torch.no_grad():
        for _ in range(2):
            recorder("small", recorder.model, torch.zeros(1, 2))
        assert recorder("large", large, torch.zeros(8, 2)).shape == (8, 2)
        assert asked == [1, 0]

        def too_large(states):
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            recorder("larger", too_large, torch.zeros(9, 2))


def test_graphs_are_kept_for_the_sizes_used_last(analyzer):
    recorder = Recorder(nn.Linear(2, 2), Tapes())
    with torch.no_grad():
        for _ in range(2):
            for length in range(1, MOST_GRAPHS + 5):
                recorder("linear", recorder.model, torch.zeros(length, 2))
    assert len(recorder._graphs) == MOST_GRAPHS
    recorder.forget()
    assert len(recorder._graphs) == 0


def test_surroundings_are_seen():
    recorder = Recorder(nn.Linear(2, 2), Tapes())
    precision = torch.get_float32_matmul_precision()
    try:
        with torch.no_grad():
            for chosen in ("highest", "high", "highest", "high"):
                torch.set_float32_matmul_precision(chosen)
                recorder("linear", recorder.model, torch.zeros(1, 2))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert recorder._record.recorded == 2


def test_copies_record_their_own(analyzer):
    for copied in (copy.copy(analyzer.recorder), pickle.loads(pickle.dumps(Recorder(nn.Linear(2, 2))))):
        assert copied._graphs == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(checkpoint):
    found = Analyzer.from_pretrained(checkpoint, device="cuda")
    expected = Analyzer.from_pretrained(checkpoint, device="cuda", cuda_graphs=False)
    for seed in range(4):
        assert_same(found(field(seed), **ALL), expected(field(seed), **ALL))
    assert len(found.recorder._graphs) > 0
