"""Every head: `HeadBehaviour` for each class, and for each task of the model of all heads."""

import pytest
from head_behaviour import AnsweringBehaviour, ExportsAnySize, HeadBehaviour, OneHead, PromptedBehaviour
from tiny_models import HEADS, very_tiny_config

from unihema.modeling_unihema.modeling_unihema import (
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForMultiTask,
    UniHemaForQA,
    UniHemaForSegmentation,
)


# Two images of 64 x 96: tokens of four levels; 4 heads, 4 levels and 2 points; 12 queries; width 32.
TOKENS = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
OF_IMAGE = {"encoder_hidden_states": [(2, TOKENS, 32)] * 2, "encoder_attentions": [(2, TOKENS, 4, 4, 2)]}
OF_QUERIES = OF_IMAGE | {
    "decoder_hidden_states": [(2, 12, 32)] * 3,
    "decoder_attentions": [(2, 4, 12, 12)] * 2,
    "cross_attentions": [(2, 12, 4, 4, 2)] * 2,
}
# Questions of 7 tokens, answers of 5; 2 heads, width 24.
OF_TEXT = {
    "encoder_hidden_states": [(2, 7, 24)] * 2,
    "encoder_attentions": [(2, 2, 7, 7)],
    "decoder_hidden_states": [(2, 5, 24)] * 2,
    "decoder_attentions": [(2, 2, 5, 5)],
    "cross_attentions": [(2, 2, 5, 7)],
}


class TestDetection(ExportsAnySize, OneHead, PromptedBehaviour):
    task, model_class, layer_shapes = "detection", UniHemaForDetection, OF_QUERIES


class TestSegmentation(OneHead, PromptedBehaviour):
    task, model_class, layer_shapes = "segmentation", UniHemaForSegmentation, OF_QUERIES

    def test_what_a_mask_cannot_teach_is_frozen_also_after_loading(self, tmp_path):
        model = self.make()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert any("query_selection.class_head" in name for name in frozen)
        loaded = self.save_and_load(model, tmp_path)
        assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen


class TestImageClassification(ExportsAnySize, OneHead, HeadBehaviour):
    task, model_class, layer_shapes = "single_cell", UniHemaForImageClassification, OF_IMAGE

    def test_a_model_that_reads_no_text_says_so(self):
        with pytest.raises(NotImplementedError, match="reads no text"):
            self.make().get_input_embeddings()


class TestQA(OneHead, AnsweringBehaviour):
    task, model_class, layer_shapes = "question_answering", UniHemaForQA, OF_TEXT


class TestMultiTaskDetection(PromptedBehaviour):
    task, model_class, layer_shapes = "detection", UniHemaForMultiTask, OF_QUERIES


class TestMultiTaskSegmentation(PromptedBehaviour):
    task, model_class, layer_shapes = "segmentation", UniHemaForMultiTask, OF_QUERIES


class TestMultiTaskSingleCell(HeadBehaviour):
    task, model_class, layer_shapes = "single_cell", UniHemaForMultiTask, OF_IMAGE


class TestMultiTaskQuestionAnswering(AnsweringBehaviour):
    task, model_class, layer_shapes = "question_answering", UniHemaForMultiTask, OF_TEXT


class TestMultiTaskCloze(AnsweringBehaviour):
    task, model_class, layer_shapes = "cloze", UniHemaForMultiTask, OF_TEXT


def test_every_parameter_is_taught_by_some_task(tmp_path):
    model = UniHemaForMultiTask(very_tiny_config())
    taught = {name for head in HEADS.values() for name, p in head(model.config).named_parameters() if p.requires_grad}
    assert taught == {name for name, _ in model.named_parameters()}
    model.save_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in UniHemaForMultiTask.from_pretrained(tmp_path).parameters())
