"""Generated answers: greedy, beam and sampling; with and without cache; what generating leaves alone."""

import pytest
import torch
from tiny_models import VERY_TINY, batch, lively, very_tiny_config
from transformers import GenerationConfig

from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask, UniHemaForQA


NEW = 6


@pytest.fixture(scope="module", params=[UniHemaForQA, UniHemaForMultiTask])
def model(request):
    torch.manual_seed(0)
    model = lively(request.param(very_tiny_config())).eval()
    # Logits far enough apart that the best token is not decided by rounding, and no early end.
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        model.lm_head.weight[model.config.eos_token_id] = 0
    return model


def question(images: int = 2, **options) -> dict[str, torch.Tensor]:
    inputs = batch("question_answering", images, **options)
    inputs.pop("labels")
    return inputs


def answer_logits(model, **inputs) -> torch.Tensor:
    if isinstance(model, UniHemaForMultiTask):
        inputs["task"] = "question_answering"
    return model(**inputs).logits


@torch.no_grad()
def log_likelihood(model, inputs, answers: torch.Tensor) -> torch.Tensor:
    """Of each answer `[B, T]`, start token included, as the model's forward pass gives it."""
    logits = answer_logits(model, **inputs, decoder_input_ids=answers[:, :-1]).log_softmax(-1)
    return logits.gather(-1, answers[:, 1:, None])[..., 0].sum(-1)


@torch.no_grad()
def test_greedy_takes_the_best_token_of_the_forward_pass(model):
    inputs = question()
    answers = torch.full((2, 1), model.config.decoder_start_token_id)
    for _ in range(NEW):
        best = answer_logits(model, **inputs, decoder_input_ids=answers)[:, -1].argmax(-1, keepdim=True)
        answers = torch.cat((answers, best), 1)
    found = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert found.tolist() == answers.tolist()


@torch.no_grad()
def test_beam_search_finds_answers_as_likely_or_likelier(model):
    inputs = question()
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "length_penalty": 0.0}
    greedy = model.generate(**inputs, **settings)
    beams = model.generate(**inputs, **settings, num_beams=8, num_return_sequences=3)
    assert beams.shape == (6, NEW + 1)
    three = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    likelihood = log_likelihood(model, three, beams).view(2, 3)
    assert (likelihood[:, 0] >= log_likelihood(model, inputs, greedy) - 1e-4).all()
    assert (likelihood[:, :-1] >= likelihood[:, 1:] - 1e-4).all()


def test_sampling_follows_the_seed(model):
    inputs = question()
    settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 0}

    def sample(seed: int, **more) -> list:
        torch.manual_seed(seed)
        return model.generate(**inputs, **settings, **more).tolist()

    assert sample(1) == sample(1) != sample(2)
    assert sample(3, temperature=1e-4) == model.generate(**inputs, max_new_tokens=12).tolist()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
@torch.no_grad()
def test_cache_changes_nothing(model, settings):
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, **settings}
    cached = model.generate(**question(), **options)
    uncached = model.generate(**question(), **options, use_cache=False)
    assert cached.sequences.tolist() == uncached.sequences.tolist()
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_shorter_question_in_a_batch_gets_the_answer_it_gets_alone(model):
    inputs = question()
    together = model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
    row = inputs["pixel_mask"][1, 0].sum()
    words = inputs["attention_mask"][1].sum()
    assert row < inputs["pixel_mask"].shape[2] and words < inputs["input_ids"].shape[1]
    alone = model.generate(
        input_ids=inputs["input_ids"][1:, :words],
        pixel_values=inputs["pixel_values"][1:, :, :, :row],
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(alone.logits[0][0], together.logits[0][1], rtol=0, atol=1e-4)
    assert alone.sequences[0].tolist() == together.sequences[1].tolist()


@torch.no_grad()
def test_the_answer_sees_the_image(model):
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    inputs = question(images=1)
    here = model.generate(**inputs, **options)
    inputs["pixel_values"] = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(9))
    elsewhere = model.generate(**inputs, **options)
    assert (here.logits[0] - elsewhere.logits[0]).abs().max() > 1e-3


def test_training_mode_is_left_alone_and_leaves_the_answer_alone():
    torch.manual_seed(0)
    model = lively(UniHemaForQA(very_tiny_config(text_config={**VERY_TINY["text_config"], "dropout_rate": 0.5})))
    model.eval()
    expected = model.generate(**question(), max_new_tokens=NEW).tolist()
    model.train()
    model.model.visual_backbone.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.generate(**question(), max_new_tokens=NEW).tolist() == expected
    assert model.training and model.model.text_branch.decoder.training
    assert not model.model.visual_backbone.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.gradient_checkpointing_enable()
    assert model.generate(**question(), max_new_tokens=NEW).tolist() == expected
    assert model.is_gradient_checkpointing


def test_generation_config_is_saved_and_obeyed(model, tmp_path):
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    model.generation_config.max_new_tokens = None
    saved = GenerationConfig.from_pretrained(tmp_path)
    config = model.config
    assert (saved.pad_token_id, saved.eos_token_id, saved.decoder_start_token_id) == (
        *(config.pad_token_id, config.eos_token_id, config.decoder_start_token_id),
    )
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generate(**question()).shape == (2, 4)


def test_several_questions_about_one_image(model):
    one = question(images=1)
    texts = torch.stack([one["input_ids"][0].roll(shift) for shift in range(3)])
    together = model.generate(
        **{**one, "input_ids": texts, "attention_mask": torch.ones_like(texts)}, max_new_tokens=NEW
    )
    for text, answer in zip(texts, together, strict=True):
        alone = {**one, "input_ids": text[None], "attention_mask": torch.ones_like(text[None])}
        assert model.generate(**alone, max_new_tokens=NEW)[0].tolist() == answer.tolist()


@pytest.mark.parametrize(
    ("missing", "message"), [("pixel_values", "pixel_values is missing"), ("input_ids", "input_ids is missing")]
)
def test_generating_needs_image_and_question(model, missing, message):
    inputs = question()
    del inputs[missing], inputs["attention_mask"]
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)
