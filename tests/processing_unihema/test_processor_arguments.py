"""What a processor takes and gives: devices, texts, arguments plain and nested, and those that it refuses."""

import pytest
import torch
from both_backends import assert_same, noise

from unihema.errors import InputError
from unihema.processing_unihema.image_processing_unihema import UniHemaImageProcessor


QUESTION = "What type of white blood cell is this?"


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_every_tensor_lands_on_the_device(processor, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image = noise(50, 60)
    annotations = {"annotations": [{"bbox": [3, 4, 20, 15], "category_id": 1, "morphology": [0, 1]}]}

    def devices(batch) -> set[str]:
        values = [v for value in batch.values() for v in (value[0].values() if isinstance(value, list) else [value])]
        return {value.device.type for value in values}

    for inputs in (
        {"images": image, "annotations": annotations, "task": "detection"},
        {"images": image, "masks": image[..., 0], "task": "segmentation"},
        {"images": image, "text": QUESTION, "answers": ["neutrophil"]},
        {"text": QUESTION},
    ):
        for place in (device, torch.device(device)):
            assert devices(processor(**inputs, device=place)) == {device}
        assert devices(processor(**inputs, images_kwargs={"device": device})) == {device}
        assert devices(processor(**inputs)) == {"cpu"}
    for labels in ({"annotations": annotations}, {"masks": image[..., 0]}):
        found = processor.image_processor(image, device=device, **labels)
        assert devices(found) == {device}
        assert found["pixel_values"].shape == processor.image_processor(image)["pixel_values"].shape


def test_a_batch_can_be_cast(processor):
    batch = processor(images=noise(50, 60), text=QUESTION).to("cpu", torch.bfloat16)
    assert batch.pixel_values.dtype == torch.bfloat16
    assert batch.input_ids.dtype == batch.pixel_mask.dtype == torch.int64


def test_the_names_of_the_inputs(processor):
    assert list(processor(images=noise(50, 60), text=QUESTION)) == processor.model_input_names
    assert list(processor(images=noise(50, 60), task="single_cell")) == ["pixel_values", "pixel_mask"]
    assert list(processor(text=QUESTION)) == ["input_ids", "attention_mask"]


def test_text_as_a_string_a_list_or_none_without_a_chat_template(processor):
    assert processor.chat_template is None
    image = noise(50, 60)
    one = processor(images=image, text=QUESTION)
    assert one["input_ids"].shape == one["attention_mask"].shape == (1, one["input_ids"].shape[1])
    assert_same(processor(images=[image], text=[QUESTION]), one)
    assert processor.decode(one["input_ids"][0], skip_special_tokens=True) == f"Q: {QUESTION}"
    both = processor(images=[image] * 2, text=QUESTION)
    assert torch.equal(both["input_ids"], one["input_ids"].expand(2, -1))
    nothing = processor(images=image)
    assert processor.batch_decode(nothing["input_ids"], skip_special_tokens=True) == [
        "This image is for the detection of blood cells"
    ]
    uneven = processor(images=[image] * 2, text=[QUESTION, "Why?"])
    lengths = uneven["attention_mask"].sum(1)
    assert lengths[1] < lengths[0] == uneven["input_ids"].shape[1]
    assert (uneven["input_ids"][1, lengths[1] :] == processor.tokenizer.pad_token_id).all()


def test_nested_arguments_are_the_same_as_plain_ones(processor):
    image = noise(50, 60)
    plain = processor(
        images=image, text="Why?", size={"longest_edge": 32}, do_normalize=False, padding="max_length", max_length=20
    )
    nested = processor(
        images=image,
        text="Why?",
        images_kwargs={"size": {"longest_edge": 32}, "do_normalize": False},
        text_kwargs={"padding": "max_length", "max_length": 20},
        common_kwargs={"return_tensors": "pt"},
    )
    assert_same(nested, plain)
    assert plain["pixel_mask"].sum() == 32 * 27 and plain["pixel_values"].min() >= 0
    assert plain["input_ids"].shape == plain["attention_mask"].shape == (1, 20)


def test_settings_of_the_parts_are_kept_and_arguments_come_before_them(processor):
    processor.image_processor.rescale_factor = -1
    plain = {"do_normalize": False}
    assert processor(images=noise(50, 60), **plain)["pixel_values"].max() <= 0
    assert processor(images=noise(50, 60), rescale_factor=1, **plain)["pixel_values"].min() >= 0
    assert processor(images=noise(50, 60), images_kwargs={"rescale_factor": 1, **plain})["pixel_values"].min() >= 0


def test_texts_padded_to_a_length(processor):
    short = processor(text="Why?")
    for options, length in (({"max_length": 20}, 20), ({}, 64)):
        padded = processor(text=["Why?"], padding="max_length", **options)
        assert padded["input_ids"].shape == (1, length)
        width = short["input_ids"].shape[1]
        assert torch.equal(padded["input_ids"][:, :width], short["input_ids"])
        assert padded["attention_mask"].sum() == width
    for ignored in ({"padding": False}, {"truncation": True, "max_length": 3}, {"return_tensors": "np"}):
        assert_same(processor(text="Why?", **ignored), short)
    with pytest.raises(ValueError, match=r"the limit is 3 \(max_length\)"):
        processor(text="Why?", padding="max_length", max_length=3)
    with pytest.raises(ValueError, match=r"max_length is 65; the limit is 64 \(max_text_length\)"):
        processor(text="Why?", padding="max_length", max_length=65)


@pytest.mark.parametrize(
    "arguments",
    [
        {"paddnig": True},
        {"images_kwargs": {"paddnig": 1}},
        {"text_kwargs": {"paddnig": 1}},
        {"common_kwargs": {"paddnig": 1}},
    ],
)
def test_unknown_arguments_are_named(processor, arguments):
    with pytest.raises(TypeError, match="UniHemaProcessor has no argument paddnig"):
        processor(images=noise(50, 60), text="Why?", **arguments)


def test_an_unknown_argument_of_the_image_processor_is_named(image_processor):
    with pytest.raises(TypeError, match=f"{type(image_processor).__name__} has no argument sizes"):
        image_processor(noise(50, 60), sizes={"longest_edge": 32})


@pytest.mark.parametrize(
    ("arguments", "group"),
    [
        ({"do_rescale": True, "images_kwargs": {"do_rescale": True}}, "images_kwargs"),
        ({"padding": "max_length", "text_kwargs": {"padding": "max_length"}}, "text_kwargs"),
    ],
)
def test_arguments_given_twice_are_refused(processor, arguments, group):
    with pytest.raises(ValueError, match=f"given twice: as an argument and in {group}"):
        processor(images=noise(50, 60), text="Why?", **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pad_multiple", None),
        ("rescale_factor", None),
        ("rescale_factor", 1e-300),
        ("image_mean", None),
        ("image_std", None),
        ("invalid_boxes", None),
    ],
)
def test_a_file_whose_options_have_no_value_is_refused_when_it_is_read(name, value):
    with pytest.raises(InputError, match=f"{name} cannot be {value}"):
        UniHemaImageProcessor.from_dict(UniHemaImageProcessor().to_dict() | {name: value})
