"""What happens to malformed detection labels."""

import math

import pytest
import torch

from unihema.modeling_unihema.losses import check_detection_labels


CLASSES = 4
VALUE_COUNTS = [2, 3]


def label(cells: int) -> dict[str, torch.Tensor]:
    return {
        "class_labels": torch.zeros(cells, dtype=torch.int64),
        "boxes": torch.full((cells, 4), 0.5),
        "morphology": torch.tensor([[0, -100]]).repeat(cells, 1),
    }


def test_good_labels_pass():
    full = {**label(2), "annotated_classes": torch.ones(CLASSES, dtype=torch.bool)}
    plain = {key: value for key, value in label(2).items() if key != "morphology"}
    rounded = {**plain, "boxes": torch.tensor([[0.5, 0.5, 1 + 5e-5, 1.0], [0.0, 1.0, 0.1, 0.1]])}
    labels = [full, plain, rounded, label(0)]
    check_detection_labels(labels, 4, CLASSES, 2, VALUE_COUNTS)
    check_detection_labels([], 0, CLASSES, 2, VALUE_COUNTS)


@pytest.mark.parametrize(
    "change,error,message",
    [
        (lambda x: x.pop(), ValueError, "1 label dicts for 2 images"),
        (lambda x: x[1].pop("boxes"), ValueError, "image 1 lack boxes"),
        (lambda x: x[1]["class_labels"].fill_(7), ValueError, "Class id 7 .* image 1 .* ids 0 to 3"),
        (lambda x: x[0]["class_labels"].fill_(-1), ValueError, "Class id -1 .* image 0"),
        (lambda x: x[1].update(boxes=torch.rand(2, 3)), ValueError, r"boxes of image 1 must be \[2, 4\]"),
        (lambda x: x[1]["boxes"][1].mul_(640), ValueError, r"(?s)Box 1 of image 1 .*fractions"),
        (lambda x: x[0]["boxes"][0, 2:].fill_(0), ValueError, "Box 0 of image 0 .*above 0"),
        (lambda x: x[0]["boxes"].fill_(math.nan), ValueError, "Box 0 of image 0"),
        (lambda x: x[1].update(class_labels=torch.rand(2)), TypeError, "class_labels of image 1 .*integers"),
        (lambda x: x[1].update(boxes=[[0, 0, 1, 1]]), TypeError, "boxes of image 1 must be a tensor, got list"),
        (lambda x: x[1].update(morphology=torch.zeros(2, 6).long()), ValueError, r"image 1 must be \[2, 2\].*\(2, 6\)"),
        (lambda x: x[1]["morphology"][1].fill_(2), ValueError, "Value 2 of attribute 0 .* image 1 .* 2 values"),
        (lambda x: x[1].update(annotated_classes=torch.ones(3).bool()), ValueError, r"bool \[4\]"),
    ],
)
def test_wrong_detection_labels_are_named(change, error, message):
    labels = [label(2), label(2)]
    change(labels)
    with pytest.raises(error, match=message):
        check_detection_labels(labels, 2, CLASSES, 2, VALUE_COUNTS)


def test_a_single_dict_is_not_a_list_of_labels():
    with pytest.raises(TypeError, match="list with one dict per image"):
        check_detection_labels(label(1), 1, CLASSES, 2)
