"""UniHemaProcessor: images, texts and labels that belong together."""

import numpy as np
import pytest
import torch

from unihema.processing_unihema.processing_unihema import UniHemaProcessor


SMALL = {task: {"longest_edge": 64} for task in ("detection", "segmentation", "single_cell", "question_answering")}
IMAGE = np.zeros((48, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def processor():
    return UniHemaProcessor.from_default(**SMALL)


def test_task_follows_from_the_text(processor):
    assert processor.decode(processor(images=IMAGE)["input_ids"][0]).startswith("This image is for the detection of")
    assert processor.decode(processor(images=IMAGE, text="Why?")["input_ids"][0]).startswith("Q: Why?")
    assert "input_ids" not in processor(images=IMAGE, task="single_cell")


def test_prompts_for_all_images_or_for_each(processor):
    def texts(**arguments):
        return processor.tokenizer.batch_decode(
            processor(images=[IMAGE] * 2, task="detection", **arguments)["input_ids"], skip_special_tokens=True
        )

    both = "This image is for the detection of RBC, WBC, platelet cells"
    assert texts(class_names=["RBC", "WBC", "platelet"]) == [both] * 2
    for names in (["RBC", "WBC"], ["RBC", "WBC", "platelet"]):
        assert texts(class_names=names) == [f"This image is for the detection of {', '.join(names)} cells"] * 2
    assert texts(text="malaria") == ["This image is for the detection of malaria cells"] * 2
    assert texts(text=["RBC", "WBC"]) == [f"This image is for the detection of {name} cells" for name in ("RBC", "WBC")]
    assert texts(text=[["RBC", "WBC", "platelet"], ["WBC"]])[0] == both


def test_several_questions_of_each_image(processor):
    inputs = processor(
        images=[IMAGE, IMAGE], text=[["a?", "b?", "c?"], ["d?", "e?", "f?"]], answers=[["1", "2", "3"], ["4", "5", "6"]]
    )
    assert inputs["pixel_values"].shape[0] == 2 and inputs["input_ids"].shape[0] == 6
    assert processor.decode_answers(inputs["labels"].clamp(min=0)) == ["1", "2", "3", "4", "5", "6"]
    assert (inputs["labels"] != 0).all()
    assert processor.decode_answers(inputs["labels"]) == ["1", "2", "3", "4", "5", "6"]
    flat = processor(images=[IMAGE] * 2, text=["a?", "b?"], answers=[["1"], ["2"]])
    assert processor.decode_answers(flat["labels"]) == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Nothing to process"),
        ({"images": IMAGE, "task": "counting"}, "Unknown task 'counting'"),
        ({"images": IMAGE, "task": "cloze"}, "text is missing"),
        ({"images": [IMAGE] * 2, "text": ["a?", "b?", "c?"]}, "3 texts for 2 images"),
        ({"images": [IMAGE] * 2, "text": [["a?"], ["b?", "c?"]]}, "1 and 2 texts"),
        ({"images": IMAGE, "text": "a?", "answers": ["x", "y"]}, "2 answers for 1 texts"),
        ({"images": IMAGE, "answers": ["x"]}, "answers go with question_answering and cloze"),
        ({"images": [IMAGE] * 4, "text": [["a?", "b?"], ["c?", "d?"]]}, "2 lists of texts for 4 images"),
        (
            {"images": [IMAGE] * 2, "text": [["a?", "b?"], ["c?", "d?"]], "answers": [["1"], ["2", "3", "4"]]},
            "different numbers of answers",
        ),
        ({"images": IMAGE, "text": []}, "list of texts is empty"),
        ({"images": [], "text": "a?"}, "list of images is empty"),
        ({"images": IMAGE, "text": "  "}, "question is empty"),
        ({"images": IMAGE, "task": "single_cell", "answers": ["x"]}, "answers go with .* not with single_cell"),
        ({"images": IMAGE, "masks": np.zeros((48, 64))}, "masks go with segmentation, not with detection"),
        ({"images": IMAGE, "text": "a?", "annotations": {"annotations": []}}, "annotations go with detection"),
        ({"images": IMAGE, "text": "a?", "class_names": ["RBC"]}, "class_names go with"),
        ({"text": "RBC", "task": "detection", "annotations": {"annotations": []}}, "annotations without images"),
        ({"images": IMAGE, "text": "why " * 100}, "the limit is 64"),
        ({"images": [IMAGE] * 2, "task": "detection", "text": [["a"], ["b"], ["c"]]}, "3 prompts for 2 images"),
    ],
)
def test_what_does_not_fit_is_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_arguments_of_the_image_processor(processor):
    for options in ({"size": {"longest_edge": 128}}, {"images_kwargs": {"size": {"longest_edge": 128}}}):
        assert processor(images=IMAGE, **options)["pixel_values"].shape == (1, 3, 96, 128)
    with pytest.raises(TypeError, match="no argument inavlid_boxes"):
        processor(images=IMAGE, inavlid_boxes="drop")


def test_round_trip(tmp_path):
    processor = UniHemaProcessor.from_default(**SMALL, max_text_length=32)
    processor.default_prompts["detection"] = "RBC, WBC"
    processor.save_pretrained(tmp_path)
    loaded = UniHemaProcessor.from_pretrained(tmp_path)
    assert loaded.default_prompts == processor.default_prompts
    assert loaded.max_text_length == 32
    before, after = processor(images=IMAGE), loaded(images=IMAGE)
    assert set(before) == set(after)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=0)
