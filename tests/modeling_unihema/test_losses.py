"""The losses of detection, attributes, single cells and texts."""

import math
from types import SimpleNamespace

import pytest
import torch

from unihema.modeling_unihema.denoising import ContrastiveDenoising
from unihema.modeling_unihema.labels import check_detection_labels, class_targets
from unihema.modeling_unihema.losses import (
    asymmetric_morphology_loss,
    detection_loss,
    morphology_loss,
    sigmoid_focal_loss,
    single_cell_loss,
    text_loss,
)


LN2 = math.log(2)
CLASSES = 4
ATTRIBUTES = {"vacuoles": ["absent", "prominent"], "shape": ["round", "oval", "irregular"]}


def make_config(**overrides) -> SimpleNamespace:
    fields = {
        "num_labels": CLASSES,
        "ancestor_matrix": None,
        "d_model": 8,
        "morphology": ATTRIBUTES,
        "matching_weights": {"class": 2, "bbox": 5, "giou": 2},
        "focal_alpha": 0.25,
        "auxiliary_loss": True,
        "loss_weights": {"class": 1, "bbox": 5, "giou": 2, "morphology": 2},
        "official_losses": False,
        "denoising_queries": 6,
        "label_noise_ratio": 0.5,
        "box_noise_scale": 0.4,
    }
    return SimpleNamespace(**{**fields, **overrides})


def random_labels(cells: int, morphology: bool = True) -> dict[str, torch.Tensor]:
    image = {
        "class_labels": torch.randint(CLASSES, (cells,)),
        "boxes": torch.cat((torch.rand(cells, 2) * 0.6 + 0.2, torch.rand(cells, 2) * 0.2 + 0.05), -1),
    }
    if morphology:
        image["morphology"] = torch.stack((torch.randint(2, (cells,)), torch.randint(3, (cells,))), -1)
    return image


def predictions(images: int, layers: int = 2, queries: int = 8) -> dict[str, torch.Tensor]:
    parts = {
        "layer_logits": torch.randn(layers, images, queries, CLASSES),
        "layer_boxes": torch.rand(layers, images, queries, 4) * 0.4 + 0.2,
        "layer_morphology": torch.randn(layers, images, queries, 5),
        "selection_logits": torch.randn(images, queries, CLASSES),
        "selection_boxes": torch.rand(images, queries, 4) * 0.4 + 0.2,
    }
    return {name: value.requires_grad_() for name, value in parts.items()}


def with_denoising(parts: dict, labels: list, config: SimpleNamespace) -> dict:
    denoising = ContrastiveDenoising(config)(labels, parts["layer_logits"].shape[2])
    shape = (*parts["layer_logits"].shape[:2], denoising.content.shape[1])
    return {
        **parts,
        "denoising": denoising,
        "denoising_logits": torch.randn(*shape, CLASSES, requires_grad=True),
        "denoising_boxes": (torch.rand(*shape, 4) * 0.4 + 0.2).requires_grad_(),
    }


def one_image(parts: dict, index: int) -> dict:
    return {
        name: value[:, index : index + 1] if name.startswith("layer") else value[index : index + 1]
        for name, value in parts.items()
    }


def test_focal_loss_by_hand():
    logits, targets = torch.tensor([0.0, 0.0, 100.0, -100.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = torch.tensor([0.25 * 0.25 * LN2, 0.75 * 0.25 * LN2, 0.0, 25.0])
    assert torch.allclose(sigmoid_focal_loss(logits, targets), expected, atol=1e-6)
    assert torch.allclose(sigmoid_focal_loss(logits, targets, None, 0.0)[:2], torch.full((2,), LN2))


def test_detection_terms_by_hand():
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    config = make_config(num_labels=2, auxiliary_loss=False)
    logits = torch.zeros(1, 1, 2, 2)
    # Query 0 is shifted by half its width (IoU 1/3, nothing of the hull left over), query 1 is far away.
    boxes = torch.tensor([[[[0.6, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]])
    loss, terms = detection_loss(logits, boxes, None, logits[0], boxes[0], labels, config)
    ce = 0.25 * LN2 * (0.25 + 3 * 0.75)
    expected = {"loss_ce": ce, "loss_bbox": 0.1, "loss_giou": 2 / 3}
    assert set(terms) == {name + suffix for name in expected for suffix in ("", "_enc")}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, abs=1e-5)
        assert terms[f"{name}_enc"].item() == pytest.approx(value, abs=1e-5)
    assert loss.item() == pytest.approx(2 * (ce + 5 * 0.1 + 2 * 2 / 3), abs=1e-5)


def test_names_and_weights_of_all_terms():
    config, labels = make_config(loss_weights={"class": 3, "bbox": 5, "giou": 2, "morphology": 7}), [random_labels(3)]
    parts = with_denoising(predictions(1, layers=3), labels, config)
    loss, terms = detection_loss(**parts, labels=labels, config=config)
    box_terms = ("loss_ce", "loss_bbox", "loss_giou")
    expected = {name + suffix for name in (*box_terms, "loss_morphology") for suffix in ("", "_0", "_1")}
    expected |= {name + suffix for name in box_terms for suffix in ("_enc", "_dn", "_dn_0", "_dn_1")}
    assert set(terms) == expected
    weights = {"ce": 3, "bbox": 5, "giou": 2, "morphology": 7}
    assert loss.item() == pytest.approx(sum(weights[n.split("_")[1]] * v.item() for n, v in terms.items()), rel=1e-5)
    assert loss.requires_grad and not any(value.requires_grad for value in terms.values())

    config.auxiliary_loss = False
    _, fewer = detection_loss(**parts, labels=labels, config=config)
    assert set(fewer) == {name for name in expected if not name[-1].isdigit()}
    assert all(fewer[name] == terms[name] for name in fewer)


def test_gradient_reaches_every_prediction():
    config, labels = make_config(), [random_labels(3), random_labels(2)]
    parts = with_denoising(predictions(2), labels, config)
    loss, _ = detection_loss(**parts, labels=labels, config=config)
    loss.backward()
    for name, value in parts.items():
        if name == "denoising":
            continue
        assert value.grad.isfinite().all(), name
        by_layer = value.grad if name.startswith(("layer", "denoising")) else value.grad[None]
        assert (by_layer.flatten(2).abs().sum(-1) > 0).all(), f"{name}: some layer and image get no gradient"
    assert (parts["layer_logits"].grad != 0).all(), "background queries learn too"


def test_a_batch_is_its_images():
    config = make_config()
    counts = (4, 0, 1)
    labels, parts = [random_labels(n) for n in counts], predictions(3)
    _, together = detection_loss(**parts, labels=labels, config=config)
    for name in ("loss_ce", "loss_bbox_0", "loss_giou", "loss_ce_enc", "loss_morphology"):
        alone = [detection_loss(**one_image(parts, i), labels=[labels[i]], config=config)[1][name] for i in range(3)]
        # Sums over cells (images without any are divided by 1), or over labelled entries: two a cell.
        total = sum(value * max(n, 1) for value, n in zip(alone, counts, strict=True))
        assert together[name].item() == pytest.approx((total / sum(counts)).item(), rel=1e-5), name


def test_images_without_cells_teach_background_only():
    config, parts = make_config(), predictions(2)
    loss, terms = detection_loss(**parts, labels=[random_labels(0), random_labels(0, False)], config=config)
    loss.backward()
    assert terms["loss_ce"] > 0
    assert all(v == 0 for n, v in terms.items() if not n.startswith("loss_ce"))
    assert all(value.grad is not None and value.grad.isfinite().all() for value in parts.values())


def test_more_cells_than_queries():
    loss, _ = detection_loss(**predictions(1, queries=3), labels=[random_labels(9)], config=make_config())
    assert loss.isfinite()


def test_classes_that_are_not_annotated_cost_nothing():
    config, labels = make_config(), [random_labels(3), random_labels(3)]
    for image in labels:
        image["class_labels"] = torch.tensor([0, 2, 2])
    labels[0]["annotated_classes"] = torch.tensor([True, False, True, False])
    parts = with_denoising(predictions(2), labels, config)
    loss, _ = detection_loss(**parts, labels=labels, config=config)
    loss.backward()
    for name in ("layer_logits", "selection_logits", "denoising_logits"):
        grad = parts[name].grad if parts[name].ndim == 4 else parts[name].grad[None]
        assert (grad[:, 0][..., [1, 3]] == 0).all(), f"{name}: classes not annotated in image 0"
        assert (grad[:, 0][..., [0, 2]] != 0).any() and (grad[:, 1][..., [1, 3]] != 0).any(), name


def test_cells_of_classes_that_are_not_annotated_are_no_targets():
    config, image = make_config(), random_labels(4)
    image["class_labels"] = torch.tensor([0, 1, 0, 1])
    image["annotated_classes"] = torch.tensor([True, False, True, True])
    kept = {key: value[[0, 2]] for key, value in image.items() if key != "annotated_classes"}
    kept["annotated_classes"] = image["annotated_classes"]
    parts = predictions(1)
    _, with_extra = detection_loss(**parts, labels=[image], config=config)
    _, without = detection_loss(**parts, labels=[kept], config=config)
    assert with_extra == without
    parts = with_denoising(parts, [image], config)
    loss, _ = detection_loss(**parts, labels=[image], config=config)
    loss.backward()
    denoising = parts["denoising"]
    unwanted = (image["class_labels"][denoising.target_indices[0].clamp(min=0)] == 1) & (
        denoising.target_indices[0] >= 0
    )
    assert (parts["denoising_boxes"].grad[:, 0, unwanted] == 0).all()
    assert (parts["denoising_boxes"].grad[:, 0][:, denoising.positive[0] & ~unwanted] != 0).any()


def test_denoising_terms_by_hand():
    config, labels = make_config(auxiliary_loss=False), [random_labels(3), random_labels(1)]
    parts = with_denoising(predictions(2, layers=1), labels, config)
    denoising = parts["denoising"]
    _, terms = detection_loss(**parts, labels=labels, config=config)
    ce = l1 = positives = 0
    for i, image in enumerate(labels):
        for slot, cell in enumerate(denoising.target_indices[i].tolist()):
            if cell < 0:
                continue
            target = torch.zeros(CLASSES)
            if denoising.positive[i, slot]:
                positives += 1
                target[image["class_labels"][cell]] = 1
                l1 += (parts["denoising_boxes"][0, i, slot] - image["boxes"][cell]).abs().sum().item()
            ce += sigmoid_focal_loss(parts["denoising_logits"][0, i, slot], target).sum().item()
    assert positives == 4 * denoising.num_groups
    assert terms["loss_ce_dn"].item() == pytest.approx(ce / positives, rel=1e-5)
    assert terms["loss_bbox_dn"].item() == pytest.approx(l1 / positives, rel=1e-5)


def test_empty_denoising_slots_and_negative_boxes_cost_nothing():
    config, labels = make_config(), [random_labels(3), random_labels(1)]
    parts = with_denoising(predictions(2), labels, config)
    detection_loss(**parts, labels=labels, config=config)[0].backward()
    empty = parts["denoising"].target_indices < 0
    assert empty.any() and (parts["denoising_logits"].grad[:, empty] == 0).all()
    assert (parts["denoising_logits"].grad[:, ~empty] != 0).all()
    assert (parts["denoising_boxes"].grad[:, ~parts["denoising"].positive] == 0).all()


def test_counts_are_averaged_over_processes(monkeypatch):
    config, labels, parts = make_config(), [random_labels(2)], predictions(1)
    _, alone = detection_loss(**parts, labels=labels, config=config)

    def add_other_process(counts):
        # Labelled attributes are counted in an exchange of their own.
        counts[0] += 6.0 if len(counts) == 3 else 0.0

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_other_process)
    _, shared = detection_loss(**parts, labels=labels, config=config)
    assert shared["loss_bbox"].item() == pytest.approx(alone["loss_bbox"].item() * 2 / 4, rel=1e-5)


def test_low_precision_predictions_give_a_float32_loss():
    parts = {name: value.detach().bfloat16() for name, value in predictions(1).items()}
    loss, _ = detection_loss(**parts, labels=[random_labels(2)], config=make_config())
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_nonfinite_predictions_are_an_error():
    parts = predictions(1)
    parts["layer_logits"].data[0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="image 0"):
        detection_loss(**parts, labels=[random_labels(2)], config=make_config())


def test_morphology_by_hand_with_missing_labels():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0, 5.0]], requires_grad=True)
    targets = torch.tensor([[0, 1], [1, -100]])
    loss = morphology_loss(logits, targets, [2, 3])
    assert loss.item() == pytest.approx((LN2 + math.log(3) + math.log(1 + math.exp(-2))) / 3, abs=1e-6)
    loss.backward()
    assert (logits.grad[1, 2:] == 0).all() and (logits.grad[1, :2] != 0).all()


@pytest.mark.parametrize("cells", [0, 3])
def test_morphology_all_missing_is_zero_with_a_graph(cells):
    logits = torch.randn(cells, 5, requires_grad=True)
    loss = morphology_loss(logits, torch.full((cells, 2), -100), [2, 3])
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_asymmetric_morphology_by_hand():
    logits = torch.tensor([[0.0, 0.0, 2.0, -4.0], [1.0, 3.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[0, -100], [1, -100]])
    loss = asymmetric_morphology_loss(logits, targets, [2, 2], torch.tensor(2.0))
    expected = 0.0
    for right, wrong in ((0.0, 0.0), (3.0, 1.0)):
        right, wrong = 1 / (1 + math.exp(-right)), 1 - 1 / (1 + math.exp(-wrong)) + 0.08
        expected -= (1 - right) * math.log(right) + (1 - wrong) ** 4 * math.log(wrong)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)
    loss.backward()
    assert (logits.grad[:, 2:] == 0).all() and (logits.grad[:, :2] != 0).all()


def test_the_configuration_chooses_the_morphology_loss():
    config, parts, labels = make_config(official_losses=True), predictions(1), [random_labels(3)]
    _, asymmetric = detection_loss(**parts, labels=labels, config=config)
    _, plain = detection_loss(**parts, labels=labels, config=make_config())
    assert asymmetric["loss_morphology"] != plain["loss_morphology"]
    assert asymmetric["loss_ce"] == plain["loss_ce"]


def test_labels_without_morphology_are_missing_ones():
    config, parts = make_config(), predictions(2)
    described, plain = random_labels(3), random_labels(3, morphology=False)
    missing = {**plain, "morphology": torch.full((3, 2), -100)}
    _, terms = detection_loss(**parts, labels=[described, plain], config=config)
    _, explicit = detection_loss(**parts, labels=[described, missing], config=config)
    _, alone = detection_loss(**one_image(parts, 0), labels=[described], config=config)
    assert terms == explicit and terms["loss_morphology"] > 0
    assert terms["loss_morphology"].item() == pytest.approx(alone["loss_morphology"].item(), rel=1e-5)


def test_morphology_of_the_wrong_width_names_both():
    with pytest.raises(ValueError, match=r"6 wide.*5 values"):
        morphology_loss(torch.zeros(1, 6), torch.zeros(1, 2, dtype=torch.int64), [2, 3])
    with pytest.raises(ValueError, match="have 3 attributes, but the model 2"):
        morphology_loss(torch.zeros(1, 5), torch.zeros(1, 3, dtype=torch.int64), [2, 3])


def test_single_cell_by_hand():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]], requires_grad=True)
    loss = single_cell_loss(logits, torch.tensor([0, 0, -100]))
    assert loss.item() == pytest.approx((LN2 + math.log(1 + math.exp(-2))) / 2, abs=1e-6)
    smooth = single_cell_loss(logits, torch.tensor([-100, 0, -100]), label_smoothing=0.2)
    assert smooth.item() == pytest.approx(math.log(1 + math.exp(-2)) + 0.1 * 2, abs=1e-6)
    nothing = single_cell_loss(logits, torch.full((3,), -100))
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()


def test_text_by_hand():
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    loss = text_loss(logits, labels)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    loss.backward()
    assert (logits.grad[labels == -100] == 0).all() and (logits.grad[labels >= 0] != 0).all()
    assert text_loss(logits, torch.full((2, 3), -100)).item() == 0


def test_wrong_ids_and_shapes_are_named():
    with pytest.raises(ValueError, match="Single-cell class id 5 .* 0 to 3"):
        single_cell_loss(torch.zeros(2, 4), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"\[2\], got shape \(3,\)"):
        single_cell_loss(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="Token id -1 .* 0 to 3"):
        text_loss(torch.zeros(1, 2, 4), torch.tensor([[-1, 2]]))
    with pytest.raises(ValueError, match=r"\[1, 2\] token ids, got shape \(1, 3\)"):
        text_loss(torch.zeros(1, 2, 4), torch.zeros(1, 3, dtype=torch.int64))


def test_malformed_detection_labels_are_refused():
    labels = [random_labels(2)]
    labels[0]["morphology"][1, 0] = 2
    with pytest.raises(ValueError, match="Value 2 of attribute 0 .* image 0"):
        detection_loss(**predictions(1), labels=labels, config=make_config())
    with pytest.raises(ValueError, match="1 label dicts for 2 images"):
        detection_loss(**predictions(2), labels=[random_labels(2)], config=make_config())


def test_what_is_found_where_its_class_is_ignored_costs_nothing():
    config = make_config(num_labels=2, auxiliary_loss=False, ancestor_matrix=[[False, False], [True, False]])
    image = {
        "class_labels": torch.tensor([0]),
        "boxes": torch.tensor([[0.2, 0.2, 0.2, 0.2]]),
        "ignored_boxes": torch.tensor([[0.7, 0.7, 0.4, 0.4]]),
        "ignored_classes": torch.tensor([1]),
    }
    boxes = torch.tensor([[[[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.1, 0.1], [0.7, 0.3, 0.1, 0.1]]]])
    logits = torch.zeros(1, 1, 3, 2, requires_grad=True)
    loss, _ = detection_loss(logits, boxes, None, logits[0], boxes[0], [image], config)
    loss.backward()
    gradient = logits.grad[0, 0]
    # The second query lies there: its class and the coarser one cost nothing; the third lies elsewhere.
    assert (gradient[1] == 0).all() and (gradient[2] > 0).all() and gradient[0, 0] < 0
    # Beside masks, whose number is that of the cells, not of the ignored places.
    masked = image | {"masks": torch.zeros(1, 32, 32, dtype=torch.uint8)}
    masked["ignored_boxes"], masked["ignored_classes"] = torch.rand(3, 4), torch.tensor([0, 1, 1])
    check_detection_labels([masked], 1, 2, 0)
    image["ignored_classes"] = torch.tensor([3])
    with pytest.raises(ValueError, match="ignored_boxes and ignored_classes of image 0"):
        detection_loss(logits, boxes, None, logits[0], boxes[0], [image], config)


def test_a_coarse_cell_of_a_set_with_the_finest_names_is_none_of_the_finer():
    ancestors = torch.tensor([[False, False, False], [True, False, False], [True, False, False]])
    image = {"class_labels": torch.tensor([0, 1]), "annotated_classes": torch.tensor([True, True, False])}
    positive, counted = class_targets(image, 3, ancestors)
    assert positive.tolist() == [[True, False, False], [True, True, False]]
    assert counted.tolist() == [[True, False, False], [True, True, False]]
    exact = image | {"exact_classes": torch.tensor([True, False, False])}
    positive, counted = class_targets(exact, 3, ancestors)
    assert positive.tolist() == [[True, False, False], [True, True, False]]
    # Of the third class its data set says nothing.
    assert counted.tolist() == [[True, True, False], [True, True, False]]
