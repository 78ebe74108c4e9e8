"""Results of a model that found nothing."""

import pytest
import torch

from unihema.modeling_unihema.outputs import UniHemaDetectionOutput, UniHemaSegmentationOutput


def detections(batch: int, queries: int, score: float = -9.0) -> UniHemaDetectionOutput:
    return UniHemaDetectionOutput(
        logits=torch.full((batch, queries, 2), score),
        pred_boxes=torch.rand(batch, queries, 4),
        pred_morphology=torch.zeros(batch, queries, 5),
    )


@pytest.mark.parametrize(
    "options", [{}, {"nms_iou": 0.5, "nms_within": 0.7}, {"one_class_per_query": False}, {"top_k": 3}]
)
@pytest.mark.parametrize("queries", [0, 7])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_cell_found(processor, batch, queries, options):
    output = detections(batch, queries)
    for threshold in (0.5, torch.tensor([0.5, 0.9])):
        for sizes in (None, [(30, 40)] * batch, torch.tensor([[30, 40]] * batch)):
            found = processor.post_process_object_detection(output, threshold, sizes, **options)
            assert len(found) == batch
            for cells in found:
                assert cells["boxes"].shape == (0, 4)
                assert cells["scores"].shape == cells["labels"].shape == cells["queries"].shape == (0,)
                assert cells["boxes"].dtype == cells["scores"].dtype == torch.float32
                assert cells["labels"].dtype == cells["queries"].dtype == torch.int64
            attributes = {"vacuoles": ["absent", "prominent"], "shape": ["round", "oval", "irregular"]}
            assert processor.post_process_morphology(output, found, attributes) == [[]] * batch


def test_an_empty_image_between_others(processor):
    output = detections(3, 4)
    output.logits[0, 2, 1] = output.logits[2, 0, 0] = 4.0
    found = processor.post_process_object_detection(output, 0.5, [(30, 40)] * 3)
    assert [cells["queries"].tolist() for cells in found] == [[2], [], [0]]
    assert [cells["labels"].tolist() for cells in found] == [[1], [], [0]]
    cells = processor.post_process_morphology(output, found, {"all": list("abcde")})
    assert [len(image) for image in cells] == [1, 0, 1]


@pytest.mark.parametrize("batch", [1, 2])
def test_no_pixel_found(processor, batch):
    output = UniHemaSegmentationOutput(mask_logits=torch.full((batch, 32, 64), -9.0))
    for sizes, shape in (
        (None, (32, 64)),
        ([(30, 40)] * batch, (30, 40)),
        (torch.tensor([[30, 40]] * batch), (30, 40)),
    ):
        masks = processor.post_process_semantic_segmentation(output, target_sizes=sizes)
        assert len(masks) == batch
        for mask in masks:
            assert mask.shape == shape and mask.dtype == torch.int64 and not mask.any()


def test_no_answer(processor):
    end, padding = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    tokens = torch.tensor([[padding, end, padding]])
    assert processor.decode_answers(tokens) == processor.post_process_image_text_to_text(tokens) == [""]
    assert processor.decode_answers(torch.zeros(1, 0, dtype=torch.long)) == [""]
    assert processor.decode_answers(torch.full((2, 3), -100)) == ["", ""]
