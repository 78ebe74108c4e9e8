"""Every head: `HeadBehaviour` for each class, and for each task of the model of all heads."""

from head_behaviour import AnsweringBehaviour, HeadBehaviour, OneHead, PromptedBehaviour

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


class TestDetection(OneHead, PromptedBehaviour):
    task, model_class, layer_shapes = "detection", UniHemaForDetection, OF_QUERIES


class TestSegmentation(OneHead, PromptedBehaviour):
    task, model_class, layer_shapes = "segmentation", UniHemaForSegmentation, OF_QUERIES


class TestImageClassification(OneHead, HeadBehaviour):
    task, model_class, layer_shapes = "single_cell", UniHemaForImageClassification, OF_IMAGE


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
