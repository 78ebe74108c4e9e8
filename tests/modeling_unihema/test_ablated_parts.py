"""Models without one of their parts, as the ablations of the paper need them: not built, not missed."""

import pytest
import torch
from tiny_models import HEADS, batch, lively, very_tiny_config

from unihema.errors import InputError
from unihema.modeling_unihema.modeling_unihema import TASKS, UniHemaForMultiTask, UniHemaModel


SWITCHES = {
    "no fusion": ({"cross_modal_fusion": False}, "model.hema_former.cross_modal_fusion."),
    "no refinement": ({"text_guided_refinement": False}, "model.hema_former.text_guided_visual_refinement."),
}
VISUAL = ("detection", "segmentation")


def switched(options: dict) -> UniHemaForMultiTask:
    torch.manual_seed(0)
    return lively(UniHemaForMultiTask(very_tiny_config(**options)))


@pytest.fixture(params=SWITCHES.values(), ids=SWITCHES.keys())
def switch(request) -> tuple[dict, str]:
    return request.param


def test_a_part_that_is_off_is_not_built_and_all_else_is(switch):
    options, prefix = switch
    whole, less = UniHemaForMultiTask(very_tiny_config()).state_dict(), switched(options).state_dict()
    assert set(whole) - set(less) == {name for name in whole if name.startswith(prefix)} != set()
    assert set(less) <= set(whole)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_without_it(switch, task):
    model = switched(switch[0]).train()
    output = model(task=task, **batch(task))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("task", HEADS)
def test_a_head_without_it_loads_from_the_whole_and_all_of_it_learns(switch, task, tmp_path):
    model = switched(switch[0]).eval()
    model.save_pretrained(tmp_path)
    head, info = HEADS[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        expected, found = model(task=task, **batch(task)), head.eval()(**batch(task))
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)
    head.train()(**batch(task, size=(96, 128))).loss.backward()
    assert [name for name, p in head.named_parameters() if p.requires_grad and p.grad is None] == []


def test_without_fusion_answers_are_of_the_text_alone():
    model = switched({"cross_modal_fusion": False}).eval()
    inputs = batch("question_answering")
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    with torch.no_grad():
        torch.testing.assert_close(
            model(task="cloze", **inputs).logits, model(task="cloze", **other).logits, rtol=0, atol=0
        )
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        states = model.model(task="question_answering", **asked)
        torch.testing.assert_close(states.last_hidden_state, states.text_hidden_state, rtol=0, atol=0)
        answers = model.generate(**asked, max_new_tokens=3)
        whole = switched({}).eval()
        assert (whole(task="cloze", **inputs).logits - whole(task="cloze", **other).logits).abs().max() > 1e-4
    assert answers.shape[0] == 2


@pytest.mark.parametrize("task", VISUAL)
def test_without_refinement_no_prompt_is_read(task):
    model = HEADS[task](very_tiny_config(text_guided_refinement=False)).eval()
    assert not any("text_branch" in name for name, _ in model.named_parameters())
    inputs = batch(task)
    without = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    other = {**inputs, "input_ids": inputs["input_ids"].flip(-1)}
    with torch.no_grad():
        first, second, third = (model(**given) for given in (inputs, without, other))
    torch.testing.assert_close(second.loss, first.loss, rtol=0, atol=0)
    torch.testing.assert_close(third.loss, first.loss, rtol=0, atol=0)


def test_content_queries_reach_the_decoder_unrefined():
    model = UniHemaModel(very_tiny_config(text_guided_refinement=False), ("detection",)).eval()
    inputs = {name: value for name, value in batch("detection").items() if name.startswith("pixel")}
    with torch.no_grad():
        output = model(**inputs)
        content = model.query_selection(output.encoder_last_hidden_state, model.visual_backbone(**inputs)).content
    torch.testing.assert_close(output.refined_queries, content, rtol=0, atol=0)
    assert output.text_hidden_state is None


@pytest.mark.parametrize("field", ["cross_modal_fusion", "text_guided_refinement"])
def test_a_switch_is_true_or_false(field):
    with pytest.raises(InputError, match=field):
        very_tiny_config(**{field: "off"})
