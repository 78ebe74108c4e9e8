"""UniHemaProcessor and its own tokenizer."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from unihema.processing_unihema.processing_unihema import UniHemaProcessor
from unihema.processing_unihema.tokenizer_files import DEFAULT_TOKENIZER, load_default_tokenizer


SMALL = {task: {"longest_edge": 64} for task in ("detection", "segmentation", "single_cell", "question_answering")}
IMAGE = np.zeros((48, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def processor():
    return UniHemaProcessor.from_default(**SMALL)


def test_tokenizer_is_small_and_its_sentinels_are_in_t5_order():
    tokenizer = load_default_tokenizer()
    assert (DEFAULT_TOKENIZER / "tokenizer.json").stat().st_size < 150_000
    ids = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    assert ids == list(range(len(tokenizer) - 1, len(tokenizer) - 101, -1))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "What type of white blood cell is this?",
        "The nuclear to cytoplasmic ratio is low.",
        "Neutrophil with 3 lobes, 12.5 µm ± 0.3; WBC 7.5 x 10^9/L (60 %).",
        "This image is for the detection of acute lymphoblastic leukemia cells",
    ],
)
def test_tokenizer_round_trip(text):
    tokenizer = load_default_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_needs_neither_sentencepiece_nor_protobuf():
    code = (
        "import sys\n"
        "sys.modules['sentencepiece'] = sys.modules['google.protobuf'] = None\n"
        "from unihema.processing_unihema.tokenizer_files import load_default_tokenizer\n"
        "print(len(load_default_tokenizer()('neutrophil')['input_ids']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 2


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
        ({"images": IMAGE, "text": "why " * 100}, "the limit is 64"),
        ({"images": [IMAGE] * 2, "task": "detection", "text": [["a"], ["b"], ["c"]]}, "3 prompts for 2 images"),
    ],
)
def test_what_does_not_fit_is_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


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
