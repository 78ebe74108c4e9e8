"""Drafted answers: the same tokens as one by one, in fewer passes of the decoder."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import batch, lively, very_tiny_config
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from unihema.inference.int8 import to_int8
from unihema.modeling_unihema.answer_drafts import AnswerDrafts, AnswerMemory
from unihema.modeling_unihema.modeling_unihema import UniHemaForMultiTask, UniHemaForQA


NEW = 24
END = 1


@pytest.fixture(scope="module", params=[UniHemaForQA, UniHemaForMultiTask])
def built(request):
    torch.manual_seed(0)
    model = lively(request.param(very_tiny_config())).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.fixture
def model(built):
    built.answer_memory.forget()
    return built


def question(seed: int = 0, images: int = 1) -> dict[str, torch.Tensor]:
    inputs = batch("question_answering", images, seed=seed)
    inputs.pop("labels")
    return inputs


class Passes:
    """Counts the passes of a model's decoder."""

    def __init__(self, model):
        self.decoder = model.get_decoder()
        self.number = 0

    def __enter__(self):
        self.hook = self.decoder.register_forward_hook(lambda *_: setattr(self, "number", self.number + 1))
        return self

    def __exit__(self, *_):
        self.hook.remove()


def plainly(model, inputs, **options):
    return model.generate(**inputs, prompt_lookup_num_tokens=None, **options)


@pytest.mark.parametrize("longest", [{"max_new_tokens": NEW}, {"max_new_tokens": NEW, "min_new_tokens": NEW}, {}])
def test_answers_are_those_of_one_token_after_the_other_in_fewer_passes(model, longest):
    tokens = drafted = 0
    for seed in range(8):
        inputs = question(seed)
        expected = plainly(model, inputs, **longest)
        with Passes(model) as passes:
            found = model.generate(**inputs, **longest)
        assert found.tolist() == expected.tolist(), seed
        tokens += expected.shape[1] - 1
        drafted += passes.number
    assert drafted < 0.6 * tokens


def test_scores_are_those_of_one_token_after_the_other(model):
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    found, expected = (model.generate(**question(), **options), plainly(model, question(), **options))
    assert found.sequences.tolist() == expected.sequences.tolist()
    for name in ("logits", "scores"):
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]), rtol=0, atol=1e-4)


def test_an_answer_given_before_is_checked_and_not_spelled_out_again(model):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with Passes(model) as first:
        answer = model.generate(**question(3), **options)
    with Passes(model) as again:
        assert model.generate(**question(3), **options).tolist() == answer.tolist()
    assert again.number < first.number
    model.answer_memory.forget()
    with Passes(model) as forgotten:
        model.generate(**question(3), **options)
    assert forgotten.number == first.number


def test_a_wrong_memory_changes_no_answer(model):
    expected = [plainly(model, question(seed), max_new_tokens=NEW).tolist() for seed in range(4)]
    for seed in range(4):
        model.answer_memory.remember(torch.randint(2, 60, (1, 100), generator=torch.Generator().manual_seed(seed)), 0)
        assert model.generate(**question(seed), max_new_tokens=NEW).tolist() == expected[seed]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}, {}])
def test_several_answers_beams_and_other_caches_go_token_by_token(model, options):
    inputs = question(images=1 if options else 2)
    with Passes(model) as passes:
        model.generate(**inputs, **options, max_new_tokens=NEW, min_new_tokens=NEW)
    assert passes.number == NEW


class ProcessorWatch(LogitsProcessor):
    """Counts the tokens it decides on."""

    seen = 0

    def __call__(self, input_ids, scores):
        self.seen += 1
        return scores


class StopWatch(StoppingCriteria):
    """Counts the tokens it may stop after."""

    seen = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.seen += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Stream(BaseStreamer):
    """Counts the tokens handed on; the first is the start token."""

    seen = -1

    def put(self, value):
        self.seen += 1

    def end(self):
        pass


@pytest.mark.parametrize("role", ["logits_processor", "stopping_criteria", "streamer"])
def test_what_waits_for_every_token_gets_every_token(model, role):
    watch, collect = {
        "logits_processor": (ProcessorWatch(), LogitsProcessorList),
        "stopping_criteria": (StopWatch(), StoppingCriteriaList),
        "streamer": (Stream(), lambda one: one[0]),
    }[role]
    model.generate(**question(), max_new_tokens=NEW, min_new_tokens=NEW, **{role: collect([watch])})
    assert watch.seen == NEW


def test_an_int8_model_goes_token_by_token():
    torch.manual_seed(0)
    model = to_int8(lively(UniHemaForQA(very_tiny_config())))
    with Passes(model) as passes:
        model.generate(**question(), max_new_tokens=NEW, min_new_tokens=NEW)
    assert passes.number == NEW


@pytest.mark.parametrize(
    ("earlier", "answer", "draft"),
    [
        ([5, 6, 7, 8, END], [0, 5, 6], [7, 8]),  # what followed in the question, up to its end
        ([9, 9, 9], [0, 5, 6], []),
        ([5, 6, 7, 20, 6, 30], [0, 5, 6], [7, 20, 6, 30, 0, 5, 6, 7]),  # two matched tokens before one
        ([6, 20, 6, 30, 31, 32, 33], [0, 4, 6], [30, 31, 32]),  # the last of several; one token matched, three drafted
        ([5, 6, 7, 100, 8], [0, 5, 6], [7]),  # the vocabulary may have become smaller
        ([5, 6, -100], [0, 5, 6], []),
        ([], [0, 3, 3, 3, 3], [3] * 10),  # round and round, and room for the token of the pass itself
    ],
)
def test_drafts(earlier, answer, draft):
    drafts = AnswerDrafts(earlier, longest=12, max_length=16, ends=[END], vocabulary=100)
    candidates, logits = drafts.get_candidates(torch.tensor([answer]))
    assert candidates.tolist() == [answer + draft]
    assert logits is None


def test_memory_keeps_the_last_answers_only():
    memory = AnswerMemory()
    for start in range(0, 1000, 50):
        memory.remember(torch.arange(start, start + 50)[None], padding=None)
    assert memory.tokens == tuple(range(600, 1000))
    memory.forget()
    assert memory.tokens == ()


def test_memory_keeps_no_padding_and_is_not_copied_or_saved():
    memory = AnswerMemory()
    memory.remember(torch.tensor([[0, 5, 6, END], [0, 7, END, 0]]), padding=0)
    assert memory.tokens == (0, 5, 6, END, 0, 7, END)
    assert copy.deepcopy(memory).tokens == pickle.loads(pickle.dumps(memory)).tokens == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"max_time": 1},
        {"max_time": 100.0},
        {"do_sample": True, "num_return_sequences": 2},
    ],
)
def test_settings_of_the_model_count_where_an_object_of_settings_is_given(model, settings):
    asked = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW)
    before = {name: getattr(model.generation_config, name) for name in settings}
    model.generation_config.update(**settings)
    try:
        with Passes(model) as passes:
            answers = model.generate(**question(), generation_config=asked)
    finally:
        model.generation_config.update(**before)
    assert passes.number == NEW
    assert len(answers) == settings.get("num_return_sequences", 1)
    assert asked.prompt_lookup_num_tokens is None


def test_settings_as_an_object_and_a_question_by_place(model, caplog):
    settings = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW)
    expected = plainly(model, question(), max_new_tokens=NEW, min_new_tokens=NEW)
    inputs = question()
    for call in (
        lambda: model.generate(**question(), generation_config=settings),
        lambda: model.generate(inputs.pop("input_ids"), **inputs, max_new_tokens=NEW, min_new_tokens=NEW),
    ):
        model.answer_memory.forget()
        with Passes(model) as passes:
            assert call().tolist() == expected.tolist()
        assert passes.number < NEW
    assert settings.prompt_lookup_num_tokens is None and not caplog.records


def test_states_and_attentions_of_a_drafted_answer(model):
    options = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "return_dict_in_generate": True,
        "output_hidden_states": True,
    }
    found, expected = (model.generate(**question(), **options), plainly(model, question(), **options))
    states, wanted = (torch.stack([token[-1] for token in out.decoder_hidden_states]) for out in (found, expected))
    torch.testing.assert_close(states, wanted, rtol=0, atol=1e-4)


def test_an_encoded_question_after_a_padded_answer(model):
    inputs = question()
    model.answer_memory.remember(torch.tensor([[0, 5, END, 0]]), padding=None)
    encoded = model.get_encoder()(**inputs)
    answers = [
        model.generate(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], max_new_tokens=NEW, **options)
        for options in ({}, {"prompt_lookup_num_tokens": None})
    ]
    assert answers[0].tolist() == answers[1].tolist()


def test_generation_of_ones_own_may_return_anything(model):
    answer = model.generate(**question(), custom_generate=lambda model, input_ids, **_: {"mine": input_ids})
    assert answer["mine"].tolist() == [[0]]


def test_offloaded_and_half_precision_models_go_token_by_token():
    torch.manual_seed(0)
    model = lively(UniHemaForQA(very_tiny_config())).eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    expected = plainly(model, question(), **options)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert offloaded.generate(**question(), **options).tolist() == expected.tolist()
    half = model.to(torch.bfloat16)
    inputs = question()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with Passes(half) as passes:
        half.generate(**inputs, **options)
    assert passes.number == NEW
