"""Auto classes and pipelines on one checkpoint folder named `unihema` in the working directory."""

import base64
import copy
import pickle

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_models import very_tiny_config
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

import unihema
from unihema.errors import InputError, InputTypeError, UnreadableImageError
from unihema.modeling_unihema.tasks import TASK_TABLE, TASKS
from unihema.processing_unihema.pipelines import (
    UniHemaImageClassificationPipeline,
    UniHemaObjectDetectionPipeline,
    VisualQuestionAnsweringPipeline,
)
from unihema.processing_unihema.prompts import task_prompt


SIZES = {task: {"longest_edge": 64} for task in TASKS}
PIPELINES = {task.pipeline: task.pipeline_class for task in TASK_TABLE.values()}


FIELD_SHAPES = [(60, 80, 3), (80, 60, 3), (40, 80, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("lab")
    processor = unihema.UniHemaProcessor.from_default(**SIZES, max_text_length=16)
    config = very_tiny_config(
        trained={"detection_thresholds": {"red blood cell": 0.0, "platelet": 0.0, "neutrophil": 0.0}}
    )
    config.text_config.vocab_size = len(processor.tokenizer)
    config.default_prompt_ids = {
        task: processor.tokenizer(task_prompt(task, names))["input_ids"]
        for task, names in processor.default_prompts.items()
    }
    unihema.UniHemaForMultiTask(config).save_pretrained(root / "unihema")
    processor.save_pretrained(root / "unihema")
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(root / "smear.png")
    return root


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_auto_classes():
    assert isinstance(AutoModel.from_pretrained("unihema"), unihema.UniHemaModel)
    assert isinstance(AutoProcessor.from_pretrained("unihema"), unihema.UniHemaProcessor)
    assert isinstance(AutoImageProcessor.from_pretrained("unihema"), unihema.UniHemaImageProcessor)
    for auto, head in {
        "AutoModelForObjectDetection": unihema.UniHemaForDetection,
        "AutoModelForImageSegmentation": unihema.UniHemaForSegmentation,
        "AutoModelForImageClassification": unihema.UniHemaForImageClassification,
        "AutoModelForVisualQuestionAnswering": unihema.UniHemaForQA,
        "AutoModelForImageTextToText": unihema.UniHemaForQA,
    }.items():
        assert type(getattr(transformers, auto).from_pretrained("unihema")) is head


@pytest.fixture(scope="module")
def fields():
    """Images of three shapes, two of which come to the same padded size."""
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 255, shape, np.uint8)) for shape in FIELD_SHAPES]


@pytest.mark.parametrize("task", ["object-detection", "image-segmentation", "image-classification"])
def test_a_batch_of_different_sizes_gives_what_each_image_gives_alone(task, fields):
    run = pipeline(task, model="unihema")
    options = {"mask_threshold": 0.0} if task == "image-segmentation" else {}
    if task != "image-classification":
        options["prompt"] = ["neutrophil", "platelet"]
    together = run(fields, batch_size=3, **options)
    for image, found in zip(fields, together, strict=True):
        alone = run(image, **options)
        assert [entry["label"] for entry in found] == [entry["label"] for entry in alone] != []
        assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in alone], abs=1e-5)
        if task == "object-detection":
            assert all(abs(a["box"][side] - f["box"][side]) <= 1 for a, f in zip(alone, found) for side in a["box"])
        if task == "image-segmentation":
            assert found[0]["mask"].size == image.size


def test_a_batch_of_questions_gives_what_each_gives_alone(fields):
    ask = pipeline("visual-question-answering", model="unihema")
    questions = ["a?", "What is the cell?", "Is it big or small?"]
    together = ask(image=fields, question=questions, batch_size=3)
    for image, question, found in zip(fields, questions, together, strict=True):
        alone = ask(image=image, question=question)
        assert found[0]["answer"] == alone[0]["answer"]
        assert found[0]["score"] == pytest.approx(alone[0]["score"], abs=1e-5)
    beams = {"num_beams": 2, "num_return_sequences": 2}
    both = ask(image=fields, question="a?", batch_size=2, generate_kwargs=beams)
    assert [len(answers) for answers in both] == [2, 2, 2]
    stream = ask({"image": image, "question": question} for image, question in zip(fields, questions, strict=True))
    assert [answers[0]["answer"] for answers in stream] == [answers[0]["answer"] for answers in together]


def test_visual_question_answering():
    ask = pipeline("visual-question-answering", model="unihema")
    one = ask(image="smear.png", question="What is it?")
    assert list(one[0]) == ["answer", "score"] and isinstance(one[0]["answer"], str) and 0 <= one[0]["score"] <= 1
    two = ask(image="smear.png", question=["What is it?", "How many?"], batch_size=2)
    assert len(two) == 2
    # Padding the shorter question adds rounding: the answer is the same, the score up to 1e-6.
    for same in (two[0], ask({"image": Image.open("smear.png"), "question": "What is it?"})):
        assert [entry["answer"] for entry in same] == [one[0]["answer"]]
        assert same[0]["score"] == pytest.approx(one[0]["score"], abs=1e-6)
    assert ask(image=["smear.png"] * 2, question="What is it?", max_new_tokens=3, generate_kwargs={"num_beams": 2})
    with pytest.raises(ValueError, match="needs an image and a question"):
        ask(image="smear.png")
    with pytest.raises(ValueError, match="1 questions for 2 images"):
        ask(image=["smear.png"] * 2, question=["What?"])
    with pytest.raises(ValueError, match="no question"):
        ask({"image": "smear.png"})


def test_object_detection():
    detect = pipeline("object-detection", model="unihema")
    cells = detect("smear.png")
    # One query of the twenty finds what another one does.
    assert len(cells) == 19
    assert set(cells[0]) == {"score", "label", "box", "morphology"}
    assert {cell["label"] for cell in cells} == {"platelet"} and not any(cell["morphology"] for cell in cells)
    neutrophils = detect("smear.png", prompt="neutrophil")
    assert neutrophils[0]["morphology"]["shape"] in ("round", "oval", "irregular")
    assert all(0 <= cell["box"]["xmin"] <= cell["box"]["xmax"] <= 80 for cell in cells)
    assert detect("smear.png", threshold=0.999) == []
    assert len(detect(["smear.png", "smear.png"], prompt="neutrophil")) == 2


def test_a_model_of_all_tasks_is_asked_for_the_task_of_the_pipeline(folder):
    model = unihema.UniHemaForMultiTask.from_pretrained("unihema")
    processors = {"tokenizer": AutoTokenizer.from_pretrained("unihema")}
    processors["image_processor"] = AutoImageProcessor.from_pretrained("unihema")
    for task in ("object-detection", "image-segmentation", "image-classification"):
        found = pipeline(task, model=model, **processors)("smear.png")
        alone = pipeline(task, model="unihema")("smear.png")
        assert [each["score"] for each in found] == pytest.approx([each["score"] for each in alone], abs=1e-6)


def test_prompts_of_detection(folder):
    detect = pipeline("object-detection", model="unihema")
    asked = detect("smear.png", prompt="neutrophil")
    assert asked == detect("smear.png", candidate_labels="neutrophil") != detect("smear.png")
    with pytest.raises(ValueError, match="not both"):
        detect("smear.png", prompt="neutrophil", candidate_labels=["neutrophil"])
    with pytest.raises(ValueError, match="the limit is 64. Name fewer classes"):
        detect("smear.png", prompt=[f"cell {number}" for number in range(60)])
    bare = pipeline(
        "object-detection",
        model=unihema.UniHemaForDetection.from_pretrained("unihema"),
        image_processor=AutoImageProcessor.from_pretrained("unihema"),
    )
    assert bare("smear.png") == detect("smear.png")
    with pytest.raises(ValueError, match="needs the checkpoint's tokenizer"):
        bare("smear.png", prompt="neutrophil")


def test_boxes_of_a_file_too_large_to_open_whole_are_in_its_own_pixels(folder):
    Image.new("1", (9000, 9000)).save("slide.png")
    cells = pipeline("object-detection", model="unihema")("slide.png")
    small = pipeline("object-detection", model="unihema")(Image.new("RGB", (4500, 4500)))
    for cell, other in zip(cells, small, strict=True):
        assert all(abs(cell["box"][side] - 2 * other["box"][side]) <= 2 for side in cell["box"])


def test_image_segmentation():
    segment = pipeline("image-segmentation", model="unihema")
    found = segment("smear.png", mask_threshold=0.0)
    assert found[0]["mask"].size == (80, 60) and found[0]["label"] == "white blood cell"
    assert segment("smear.png", mask_threshold=0.0, prompt="nucleus")[0]["label"] == "nucleus"
    assert segment("smear.png", mask_threshold=1.0) == []
    with pytest.raises(ValueError, match="panoptic"):
        segment("smear.png", subtask="panoptic")


def test_image_classification():
    classes = pipeline("image-classification", model="unihema")("smear.png")
    assert {entry["label"] for entry in classes} == {"neutrophil", "lymphocyte"}
    assert sum(entry["score"] for entry in classes) == pytest.approx(1, abs=1e-5)
    plain = pipeline("image-classification", model="unihema")("smear.png", function_to_apply="none")
    expected = torch.tensor([entry["score"] for entry in plain]).softmax(0).tolist()
    assert [entry["score"] for entry in classes] == pytest.approx(expected, abs=1e-5)


def test_the_first_class_is_chosen_from_coarse_to_fine(folder, tmp_path):
    labels = ["neutrophil", "lymphocyte", "monocyte", "target cell"]
    kinds = {"neutrophil": "WBC", "lymphocyte": "WBC", "monocyte": "WBC", "target cell": "RBC"}
    logits = torch.tensor([[1.0, 1.0, 1.1, 1.3]])
    config = very_tiny_config(single_cell_labels=labels, single_cell_parents=kinds)
    classify = pipeline("image-classification", model="unihema")
    classify.model.config.single_cell_labels = config.single_cell_labels
    classify.model.config.single_cell_parents = config.single_cell_parents
    found = classify.postprocess({"logits": logits})
    assert [entry["label"] for entry in found[:2]] == ["monocyte", "target cell"]
    assert found[0]["score"] < found[1]["score"]


def test_only_labels_that_are_asked_for_are_answered():
    classify = pipeline("image-classification", model="unihema")
    assert classify("smear.png", labels=["Lymphocytes"]) == [{"label": "lymphocyte", "score": 1.0}]
    both = classify("smear.png", labels=["lymphocyte", "neutrophil"])
    assert {entry["label"]: entry["score"] for entry in both} == pytest.approx(
        {entry["label"]: entry["score"] for entry in classify("smear.png")}, abs=1e-6
    )
    with pytest.raises(ValueError, match="no single-cell label 'blast'"):
        classify("smear.png", labels=["blast"])
    with pytest.raises(ValueError, match="told apart by softmax"):
        classify("smear.png", labels=["lymphocyte"], function_to_apply="none")


def test_image_text_to_text():
    answer = pipeline("image-text-to-text", model="unihema")(images="smear.png", text="What is it?", max_new_tokens=4)
    assert isinstance(answer[0]["generated_text"], str)


def call(run, image):
    """What a pipeline of any task says of an image, masks as pixels."""
    found = run(image=image, question="What?") if run.task == "visual-question-answering" else run(image)
    return [entry | {"mask": entry["mask"].tobytes()} if "mask" in entry else entry for entry in found]


def assert_same(found, expected):
    """Equal but for the last digit of a score, which depends on where in memory the weights are."""
    assert [entry | {"score": None} for entry in found] == [entry | {"score": None} for entry in expected] != []
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-6)


def image_pipeline(task):
    """A pipeline that finds something with an untrained model."""
    return pipeline(task, model="unihema", **({"mask_threshold": 0.0} if task == "image-segmentation" else {}))


@pytest.mark.parametrize("task", PIPELINES)
def test_copies_and_pickles_answer_as_the_original(task):
    run = image_pipeline(task)
    expected = call(run, "smear.png")
    assert type(run).__name__ == PIPELINES[task]
    for again in (copy.copy(run), copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert type(again) is type(run)
        assert_same(call(again, "smear.png"), expected)


@pytest.mark.parametrize("task", PIPELINES)
def test_a_saved_pipeline_is_loaded_as_the_same_class(task, tmp_path):
    run = image_pipeline(task)
    run.save_pretrained(tmp_path)
    if task == "image-classification":
        # Its pipeline has no tokenizer to save, and this one loads none.
        assert not (tmp_path / "tokenizer.json").exists()
    again = pipeline(task, model=str(tmp_path))
    assert type(again) is type(run)


@pytest.mark.parametrize("task", PIPELINES)
def test_images_as_base64_text_and_bytes(task):
    run = image_pipeline(task)
    expected = call(run, "smear.png")
    with open("smear.png", "rb") as file:
        content = file.read()
    text = base64.b64encode(content).decode()
    for image in (text, base64.encodebytes(content).decode(), f"data:image/png;base64,{text}", content):
        assert_same(call(run, image), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "nowhere.png: no such image file"),
        ("smear", "smear: no such image file"),
        ("data:image/png;base64,bm90aGluZw==", "no image as base64 text"),
        ("A" * 5000, r"A{60}\.\.\.: no such image file"),
        (b"nothing", "image: not an image"),
        (b"", "image: the file is empty"),
    ],
)
def test_what_is_no_image_is_named_in_a_short_line(image, message):
    with pytest.raises(UnreadableImageError, match=message) as error:
        pipeline("image-classification", model="unihema")(image)
    assert len(str(error.value)) < 200


def test_a_model_of_others_gets_the_stock_pipeline(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stock = transformers.ImageClassificationPipeline(model=model, image_processor=processor)
    for run in (
        pipeline("image-classification", model=str(tmp_path)),
        pipeline("image-classification", model=model, image_processor=processor),
        UniHemaImageClassificationPipeline(model, image_processor=processor),
    ):
        assert type(run) is transformers.ImageClassificationPipeline
        assert_same(run("smear.png"), stock("smear.png"))
    detect = UniHemaObjectDetectionPipeline(model=model, image_processor=processor)
    assert type(detect) is transformers.ObjectDetectionPipeline


def test_visual_question_answering_of_a_model_that_chooses_among_answers(tmp_path):
    config = transformers.ViltConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=3
    )
    transformers.ViltForQuestionAnswering(config).save_pretrained(tmp_path)
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what"])}
    processor = transformers.ViltProcessor(
        transformers.ViltImageProcessor(size={"shortest_edge": 32}), transformers.BertTokenizer(vocab=words)
    )
    processor.save_pretrained(tmp_path)
    ask = pipeline("visual-question-answering", model=str(tmp_path))
    assert type(ask) is VisualQuestionAnsweringPipeline
    answers = ask(image="smear.png", question="what", top_k=2)
    assert len(answers) == 2 and answers[0]["score"] >= answers[1]["score"]
    assert answers[0]["answer"] in config.id2label.values()


@pytest.mark.parametrize("task", ["object-detection", "image-segmentation"])
def test_what_a_pipeline_does_not_know_is_refused(task):
    with pytest.raises(InputTypeError, match="Unknown argument 'treshold'; there are prompt"):
        image_pipeline(task)("smear.png", treshold=0.5)


@pytest.mark.parametrize("threshold", [float("nan"), -0.1, 1.5])
def test_a_threshold_that_no_score_can_have(threshold):
    with pytest.raises(InputError, match="threshold must be a number from 0 to 1"):
        image_pipeline("object-detection")("smear.png", threshold=threshold)


@pytest.mark.parametrize("task", PIPELINES)
def test_no_images_give_no_results(task):
    run = image_pipeline(task)
    assert (run([], []) if task == "visual-question-answering" else run([])) == []


def test_an_answer_of_no_tokens_is_the_error_of_generate():
    with pytest.raises(ValueError, match="max_new_tokens"):
        pipeline("visual-question-answering", model="unihema")("smear.png", "What is this?", max_new_tokens=0)


def test_bytes_that_are_no_text_are_named():
    with pytest.raises(InputError, match=r"The text 'Q: Gr\\udcc3.*' is no text: give it in UTF-8"):
        pipeline("visual-question-answering", model="unihema")("smear.png", "Gr\udcc3\udcb6sse?")
