"""Groups of single-cell classes: what a coarse label costs, and what is answered."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import very_tiny_config

from unihema.errors import InputError
from unihema.modeling_unihema.adapter_mixin import FIELDS_KEY, adapter_fields
from unihema.modeling_unihema.losses import single_cell_loss
from unihema.modeling_unihema.modeling_unihema import UniHemaForImageClassification
from unihema.processing_unihema.post_processing import most_probable_labels, single_cell_probabilities


LABELS = ["neutrophil", "lymphocyte", "ring", "burr_cell", "Platelets"]
PARENTS = {
    "neutrophil": "WBC",
    "lymphocyte": "WBC",
    "ring": "infected red cell",
    "infected red cell": "RBC",
    "burr_cell": "uninfected red cell",
    "uninfected red cell": "RBC",
}


@pytest.fixture
def config():
    return very_tiny_config(single_cell_labels=LABELS, single_cell_parents=PARENTS)


def logits_of(*probabilities):
    return torch.tensor([probabilities]).log()


def test_names_are_the_classes_and_then_the_groups(config):
    assert config.single_cell_names == [*LABELS, "RBC", "WBC", "infected red cell", "uninfected red cell"]
    rows = dict(zip(config.single_cell_names, config.single_cell_members, strict=True))
    assert rows["RBC"] == [False, False, True, True, False]
    assert rows["WBC"] == [True, True, False, False, False]
    assert rows["ring"] == rows["infected red cell"] == [False, False, True, False, False]
    assert very_tiny_config().single_cell_names == very_tiny_config().single_cell_labels


def test_a_tree_that_bites_its_tail_is_refused():
    with pytest.raises(InputError, match="single_cell_parents makes 'a' its own ancestor"):
        very_tiny_config(single_cell_parents={"a": "b", "b": "a"})


def test_a_coarse_label_costs_the_sum_of_its_classes(config):
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.5, 0.1], [1.5, 0.2, -0.7, 0.0, 0.4]], requires_grad=True)
    names = config.single_cell_names
    labels = torch.tensor([names.index("WBC"), names.index("ring")])
    loss = single_cell_loss(logits, labels, members=config.single_cell_members)
    exps = [[math.exp(value) for value in row] for row in logits.tolist()]
    by_hand = -math.log((exps[0][0] + exps[0][1]) / sum(exps[0])) - math.log(exps[1][2] / sum(exps[1]))
    assert loss.item() == pytest.approx(by_hand / 2, abs=1e-6)
    loss.backward()
    # Gradient of -log of the sum: the softmax over all less the softmax within the group.
    first = [value / sum(exps[0]) for value in exps[0]]
    within = [exps[0][0] / sum(exps[0][:2]), exps[0][1] / sum(exps[0][:2]), 0, 0, 0]
    expected = [(one - part) / 2 for one, part in zip(first, within, strict=True)]
    assert logits.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_of_fine_labels_the_loss_is_cross_entropy(config):
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 4, -100, 3, 2])
    for smoothing in (0.0, 0.1):
        plain = single_cell_loss(logits, labels, smoothing)
        assert single_cell_loss(logits, labels, smoothing, members=config.single_cell_members).item() == pytest.approx(
            plain.item(), abs=1e-6
        )
    nothing = single_cell_loss(logits.requires_grad_(), torch.full((6,), -100), members=config.single_cell_members)
    nothing.backward()
    assert nothing == 0 and torch.isfinite(logits.grad).all()
    with pytest.raises(ValueError, match="class id 9 is out of range: the model has ids 0 to 8"):
        single_cell_loss(logits, torch.tensor([9, 0, 0, 0, 0, 0]), members=config.single_cell_members)


def test_the_model_takes_groups_for_labels(config):
    model = UniHemaForImageClassification(config)
    pixels = torch.rand(2, 3, 64, 64)
    output = model.eval()(pixels, labels=torch.tensor([config.single_cell_names.index("RBC"), 0]))
    log = output.logits.log_softmax(-1)
    assert output.loss.item() == pytest.approx(-(log[0, 2:4].logsumexp(0) + log[1, 0]).item() / 2, abs=1e-5)


def test_kind_first_then_what_it_is_among_its_kind(config):
    # The ring is the most probable class, but the cell is more probably white.
    probabilities = single_cell_probabilities(logits_of(0.3, 0.29, 0.35, 0.01, 0.05), config)
    assert LABELS[most_probable_labels(probabilities, config)] == "neutrophil"
    flat = very_tiny_config(single_cell_labels=LABELS)
    assert LABELS[most_probable_labels(single_cell_probabilities(probabilities.log(), flat), flat)] == "ring"


def test_only_what_is_asked_for_is_answered(config):
    logits = logits_of(0.1, 0.2, 0.4, 0.2, 0.1)
    assert single_cell_probabilities(logits, config, ["lymphocyte", "neutrophil"])[0].tolist() == pytest.approx(
        [2 / 3, 1 / 3]
    )
    asked = ["Red blood cells", "leukocyte", "lymphocyte"]
    found = single_cell_probabilities(logits, config, asked)
    # A group is what of it has no finer name among those asked for.
    assert found[0].tolist() == pytest.approx([0.6 / 0.9, 0.1 / 0.9, 0.2 / 0.9])
    assert asked[most_probable_labels(found, config, asked)] == "Red blood cells"
    with pytest.raises(InputError, match="no single-cell label 'eosinophil'; there are neutrophil"):
        single_cell_probabilities(logits, config, ["eosinophil"])
    with pytest.raises(InputError, match="twice"):
        single_cell_probabilities(logits, config, ["WBC", "leukocyte"])


def test_without_groups_it_is_softmax_and_the_largest():
    config = very_tiny_config(single_cell_labels=LABELS)
    logits = torch.randn(20, 5)
    found = single_cell_probabilities(logits, config)
    assert torch.equal(found, logits.softmax(-1))
    assert torch.equal(most_probable_labels(found, config), logits.argmax(-1))


def test_an_adapter_with_classes_of_its_own_has_its_own_groups():
    older = SimpleNamespace(auto_mapping={FIELDS_KEY: {"single_cell_labels": ["a", "b"]}})
    assert adapter_fields(older)["single_cell_parents"] is None
    assert "single_cell_parents" not in adapter_fields(
        SimpleNamespace(auto_mapping={FIELDS_KEY: {"id2label": {0: "a"}}})
    )
