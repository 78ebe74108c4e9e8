"""What a CUDA device would be sent, counted on the meta device: few operators, nothing read back, whatever the image's size."""

import pytest
import torch
from launches import as_on_cuda, on_meta
from tiny_models import batch as tiny_batch
from tiny_models import very_tiny_config

from unihema.modeling_unihema import deformable_attention, matching
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import (
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForQA,
    UniHemaForSegmentation,
)
from unihema.training.run.precision import with_half_weights


IMAGES, FULL = 8, (800, 1066)


@pytest.fixture(scope="module")
def detector():
    return on_meta(lambda: UniHemaForDetection(UniHemaConfig()))


def inputs(size=FULL, dtype=torch.float32, mask=False):
    ids = torch.ones(IMAGES, 6, dtype=torch.long, device="meta")
    pixels = torch.empty(IMAGES, 3, *size, dtype=dtype, device="meta")
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if mask:
        given["pixel_mask"] = torch.ones(IMAGES, *size, dtype=torch.long, device="meta")
    return given


def labels_on_the_host(config, cells=80):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "class_labels": torch.randint(config.num_labels, (cells,), generator=generator),
            "boxes": torch.rand(cells, 4, generator=generator) * 0.2 + 0.3,
            "morphology": torch.zeros(cells, len(config.morphology), dtype=torch.long),
        }
        for _ in range(IMAGES)
    ]


def launched_by_a_step(model, monkeypatch, size=FULL, cells=80):
    copies = []

    def only_copy(costs):
        copies.append(costs.shape)
        return torch.rand(costs.shape)

    monkeypatch.setattr(matching, "_to_host", only_copy)
    # Without gradients to add to, as after the optimizer.
    model.train().zero_grad()
    with as_on_cuda(monkeypatch) as counted:
        batch = inputs(size) | {"labels": labels_on_the_host(model.config, cells)}
        with_half_weights(model, torch.bfloat16, batch).loss.backward()
    # Costs of all layers and the proposals, of all images, in one piece.
    ((groups, _, columns),) = copies
    assert (groups, columns) == ((model.config.decoder_layers + 1) * IMAGES, cells)
    return counted.total


def test_forward_reads_nothing_back_and_launches_little(monkeypatch):
    # In bfloat16 throughout, as an `Analyzer` on a GPU has it.
    model = on_meta(lambda: UniHemaForDetection(UniHemaConfig())).bfloat16().eval()
    found = {}
    for size in ((480, 640), FULL):
        with as_on_cuda(monkeypatch, autocast=False) as counted, torch.no_grad():
            model(**inputs(size, torch.bfloat16))
        found[size] = counted.total
    assert found[480, 640] == found[FULL] <= 900


@pytest.mark.parametrize("head", [UniHemaForDetection, UniHemaForSegmentation, UniHemaForImageClassification])
@pytest.mark.parametrize("mask", [False, True])
def test_forward_copies_nothing_from_the_host(head, mask, monkeypatch):
    """What a recorded graph would read again whenever it is replayed."""
    model = on_meta(lambda: head(UniHemaConfig())).eval()
    given = inputs((64, 96), mask=mask)
    if head is UniHemaForImageClassification:
        given = {name: value for name, value in given.items() if name.startswith("pixel")}
    with as_on_cuda(monkeypatch) as counted, torch.no_grad():
        model(**given)
    assert counted.total > 100
    assert counted.from_host == []


def test_step_copies_once_to_the_host_and_launches_little(detector, monkeypatch):
    launched = launched_by_a_step(detector, monkeypatch)
    assert launched == launched_by_a_step(detector, monkeypatch, (480, 640)) <= 4000


def test_number_of_cells_does_not_matter(detector, monkeypatch):
    assert launched_by_a_step(detector, monkeypatch, (64, 96), 3) == launched_by_a_step(
        detector, monkeypatch, (64, 96), 90
    )


def test_a_mask_on_the_device_is_not_read_back(detector, monkeypatch):
    detector.eval()
    with as_on_cuda(monkeypatch), torch.no_grad():
        output = detector(**inputs((128, 96), mask=True))
    assert output.logits.shape[::2] == (IMAGES, detector.config.num_labels)


@pytest.mark.parametrize("head", [UniHemaForSegmentation, UniHemaForQA])
def test_other_heads_read_nothing_back(head, monkeypatch):
    config = UniHemaConfig()
    model = on_meta(lambda: head(config)).train()
    batch = inputs((64, 96), mask=True)
    batch["labels"] = torch.zeros(
        IMAGES, 5 if head is UniHemaForQA else 64, *([] if head is UniHemaForQA else [96])
    ).long()
    with as_on_cuda(monkeypatch) as counted:
        with_half_weights(model, torch.bfloat16, batch).loss.backward()
    assert counted.total > 500


@pytest.mark.parametrize("head", [UniHemaForDetection, pytest.param(UniHemaForSegmentation, marks=pytest.mark.slow)])
def test_compiled_there_is_one_graph_with_the_kernels(head, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(deformable_attention, "kernels_work", lambda device: True)
    model = on_meta(lambda: head(very_tiny_config()))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    batch = {key: value.to("meta") for key, value in tiny_batch("detection").items() if isinstance(value, torch.Tensor)}
    for training in (True, False):
        torch.compile(model.train(training), fullgraph=True, backend=keep)(**batch)
    assert len(graphs) == 2
    names = [str(node.target) for node in graphs[0].graph.nodes]
    # One in each layer of encoder and decoder.
    assert sum("deformable_attention" in name for name in names) == 3


def test_reading_back_is_an_error_here(monkeypatch):
    with as_on_cuda(monkeypatch), pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones(3, device="meta").all())


@pytest.mark.slow
def test_compiled_parts_train_as_plain_ones_do():
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = UniHemaForDetection(very_tiny_config(dropout=0.0)).train()
        if compiled:
            names = set(model.state_dict())
            # A break in a graph is an error.
            model.compile_parts(fullgraph=True, backend="aot_eager")
            assert set(model.state_dict()) == names
        torch.manual_seed(1)
        model(**tiny_batch("detection")).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, parts = found
    assert plain.keys() <= parts.keys()
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, plain.get(name, 0 * gradient), rtol=1e-3, atol=1e-4)
