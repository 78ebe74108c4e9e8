"""Coarse and fine classes: what each label teaches, and what it must not touch."""

import math

import pytest
import torch
from tiny_models import very_tiny_config

from unihema.modeling_unihema.denoising import ContrastiveDenoising
from unihema.modeling_unihema.labels import class_targets
from unihema.modeling_unihema.losses import detection_loss
from unihema.modeling_unihema.matching import match_queries


RBC, WBC, NEUTROPHIL, LYMPHOCYTE = range(4)
NAMES = {RBC: "RBC", WBC: "WBC", NEUTROPHIL: "neutrophil", LYMPHOCYTE: "lymphocyte"}
PARENTS = {"neutrophil": "WBC", "lymphocyte": "WBC"}
COARSE_SET = torch.tensor([True, True, False, False])
FINE_SET = torch.tensor([False, False, True, True])
BOXES = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.2, 0.3]])


def image(*classes: int, annotated=None, taught=None) -> dict[str, torch.Tensor]:
    found = {"class_labels": torch.tensor(classes, dtype=torch.int64), "boxes": BOXES[: len(classes)].clone()}
    if annotated is not None:
        found["annotated_classes"] = annotated
    if taught is not None:
        found["taught_classes"] = taught
    return found


def config_with_classes(**overrides):
    return very_tiny_config(**{"id2label": NAMES, "label_parents": PARENTS, "morphology": {}, **overrides})


def class_gradients(labels: list[dict], config) -> dict[str, torch.Tensor]:
    """Gradient of the class logits of decoder layers, selection and denoising; query i sits on cell i."""
    queries, images = 5, len(labels)
    boxes = torch.full((2, images, queries, 4), 0.1)
    boxes[..., : len(BOXES), :] = BOXES
    parts = {
        "layer_logits": torch.randn(2, images, queries, 4, requires_grad=True),
        "layer_boxes": boxes,
        "layer_morphology": None,
        "selection_logits": torch.randn(images, queries, 4, requires_grad=True),
        "selection_boxes": boxes[0],
    }
    denoising = ContrastiveDenoising(config)(labels, queries)
    shape = (2, images, denoising.content.shape[1])
    parts["denoising_logits"] = torch.randn(*shape, 4, requires_grad=True)
    parts |= {"denoising": denoising, "denoising_boxes": torch.rand(*shape, 4) * 0.4 + 0.2}
    loss, _ = detection_loss(**parts, labels=labels, config=config)
    loss.backward()
    gradients = {
        name: parts[name].grad.reshape(-1, images, parts[name].shape[-2], 4)
        for name in ("layer_logits", "selection_logits", "denoising_logits")
    }
    return gradients | {"positive": denoising.positive}


def test_the_finer_classes_of_a_coarse_set_get_no_gradient_at_all():
    gradients = class_gradients([image(WBC, RBC, annotated=COARSE_SET)], config_with_classes())
    for name in ("layer_logits", "selection_logits", "denoising_logits"):
        assert (gradients[name][..., [NEUTROPHIL, LYMPHOCYTE]] == 0).all(), name
        assert (gradients[name][..., [RBC, WBC]] != 0).all(), name


def test_a_fine_set_does_not_punish_the_coarse_class():
    gradients = class_gradients([image(NEUTROPHIL, LYMPHOCYTE, annotated=FINE_SET)], config_with_classes())
    for name in ("layer_logits", "selection_logits"):
        coarse = gradients[name][:, 0, :, WBC]
        assert (coarse[:, :2] < 0).all(), f"{name}: the queries on the cells become more of a white cell"
        assert (coarse[:, 2:] == 0).all(), f"{name}: the others neither more nor less"
        assert (gradients[name][..., RBC] == 0).all(), name
        assert (gradients[name][:, 0, 2:, [NEUTROPHIL, LYMPHOCYTE]] > 0).all(), name
    positive = gradients["positive"][0]
    noisy = gradients["denoising_logits"][:, 0, :, WBC]
    assert (noisy[:, positive] < 0).all() and (noisy[:, ~positive] == 0).all()


def test_a_coarse_class_that_no_set_annotates_is_left_alone():
    labels = [image(NEUTROPHIL, LYMPHOCYTE, annotated=FINE_SET, taught=FINE_SET)]
    gradients = class_gradients(labels, config_with_classes())
    for name in ("layer_logits", "selection_logits", "denoising_logits"):
        assert (gradients[name][..., [RBC, WBC]] == 0).all(), name
        assert (gradients[name][..., [NEUTROPHIL, LYMPHOCYTE]] != 0).any(), name


def test_a_cell_without_a_type_in_a_set_that_has_types():
    gradients = class_gradients([image(WBC, NEUTROPHIL)], config_with_classes())
    for name in ("layer_logits", "selection_logits"):
        on_untyped, on_typed, background = gradients[name][:, 0, 0], gradients[name][:, 0, 1], gradients[name][:, 0, 2:]
        assert (on_untyped[:, [NEUTROPHIL, LYMPHOCYTE]] == 0).all(), f"{name}: nobody knows its type"
        assert (on_untyped[:, WBC] < 0).all() and (on_untyped[:, RBC] > 0).all(), name
        assert (on_typed[:, [WBC, NEUTROPHIL]] < 0).all() and (on_typed[:, [RBC, LYMPHOCYTE]] > 0).all(), name
        assert (background > 0).all(), name


def test_images_of_both_kinds_in_a_batch_by_hand():
    labels = [image(WBC, annotated=COARSE_SET), image(NEUTROPHIL, annotated=FINE_SET)]
    logits = torch.zeros(1, 2, 1, 4)
    boxes = BOXES[:1].expand(1, 2, 1, 4)
    config = config_with_classes(auxiliary_loss=False)
    _, terms = detection_loss(logits, boxes, None, logits[0], boxes[0], labels, config)
    # At logit 0 a one costs a quarter of a quarter of ln 2, a zero three times as much. The first image has a one and a
    # zero (RBC); the second two ones and a zero (lymphocyte). Two cells.
    one = math.log(2) / 16
    assert terms["loss_ce"].item() == pytest.approx((one + 3 * one + 2 * one + 3 * one) / 2, rel=1e-5)
    assert terms["loss_bbox"] == 0


def test_targets_of_a_chain_of_classes():
    ancestors = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    positive, counted = class_targets({"class_labels": torch.tensor([0, 1, 2])}, 3, ancestors)
    assert positive.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert counted.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_fine_cell_counts_as_the_coarse_class_that_is_annotated():
    labels = [image(NEUTROPHIL, RBC, annotated=torch.tensor([False, True, False, False]))]
    config = config_with_classes()
    noisy = ContrastiveDenoising(config)(labels, 5)
    assert noisy.target_indices.unique().tolist() == [0]
    gradients = class_gradients(labels, config)["layer_logits"]
    assert (gradients[:, 0, 0, WBC] < 0).all() and (gradients[:, 0, 1:, WBC] > 0).all()
    assert (gradients[..., [RBC, NEUTROPHIL, LYMPHOCYTE]] == 0).all()


def test_matching_takes_the_mean_over_the_classes_of_a_cell():
    logits = torch.tensor([[[-4.0, 2.0, -4.0, -4.0], [-4.0, 1.0, 1.0, -4.0]]])
    boxes = BOXES[:1].expand(1, 2, 4)
    cell = {"class_labels": torch.tensor([NEUTROPHIL]), "boxes": BOXES[:1]}
    ancestors = torch.zeros(4, 4, dtype=torch.bool)
    ancestors[NEUTROPHIL, WBC] = True
    assert match_queries(logits, boxes, [cell], ancestors=ancestors)[0][0].tolist() == [1]
    coarse = {**cell, "class_labels": torch.tensor([WBC])}
    assert match_queries(logits, boxes, [coarse], ancestors=ancestors)[0][0].tolist() == [0]
    assert match_queries(logits, boxes, [coarse])[0][0].tolist() == [0]


def test_cells_without_coarser_or_finer_classes_cost_what_they_do_without_a_hierarchy():
    labels = [image(RBC, LYMPHOCYTE), image(RBC, annotated=COARSE_SET), image()]
    parts = [torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5, 4) * 0.4 + 0.2, None]
    parts += [torch.randn(3, 5, 4), torch.rand(3, 5, 4) * 0.4 + 0.2]
    _, plain = detection_loss(*parts, labels, config_with_classes(label_parents=None))
    _, other = detection_loss(*parts, labels, config_with_classes(label_parents={"neutrophil": "WBC"}))
    assert plain.keys() == other.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], other[name], rtol=1e-6, atol=0)


def test_the_configuration_names_the_coarser_classes(tmp_path):
    parents = {"neutrophil": "granulocyte", "granulocyte": "WBC", "basophil": "granulocyte"}
    config = very_tiny_config(id2label={0: "RBC", 1: "WBC", 2: "neutrophil"}, label_parents=parents)
    expected = [[False] * 3, [False] * 3, [False, True, False]]
    assert config.ancestor_matrix == expected
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).ancestor_matrix == expected
    assert very_tiny_config().ancestor_matrix is None
    with pytest.raises(Exception, match="label_parents makes 'WBC' its own ancestor"):
        very_tiny_config(label_parents={"WBC": "leukocyte", "leukocyte": "WBC"})


def test_a_mask_of_classes_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"taught_classes of image 0 must be bool \[4\]"):
        class_gradients([image(WBC, taught=torch.ones(3, dtype=torch.bool))], config_with_classes())
