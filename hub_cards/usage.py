"""The code that a card shows. Tests run it as it stands."""

import re
from collections.abc import Sequence

from unihema.modeling_unihema.tasks import TASK_TABLE


# The one line of the code that differs between a folder and a repository.
HERE = 'REPO = "."'
_ANALYSES = {
    "detection": 'print(analyzer("smear.png").counts)',
    "segmentation": 'print(analyzer("smear.png", ["segmentation"]).mask.mean())',
    "single_cell": 'print(analyzer("cell.png", ["single_cell"]).single_cell)',
    "question_answering": 'print(analyzer.ask("cell.png", "What type of white blood cell is this?"))',
    "cloze": 'print(analyzer.ask("cell.png", "The cell is a ___."))',
}
# The same by the pipelines of Transformers.
_CALLS = {
    "detection": [
        "detect = {pipeline}",
        'for cell in detect("smear.png"):',
        '    print(cell["label"], round(cell["score"], 2), cell["box"])',
    ],
    "segmentation": [
        "segment = {pipeline}",
        'for region in segment("smear.png"):',
        '    region["mask"].save("mask.png")',
    ],
    "single_cell": [
        "classify = {pipeline}",
        'print(classify("cell.png")[0])',
    ],
    "question_answering": [
        "ask = {pipeline}",
        'print(ask(image="cell.png", question="What type of white blood cell is this?"))',
    ],
    "cloze": [
        "fill_in = {pipeline}",
        'print(fill_in(image="cell.png", question="The cell is a ___."))',
    ],
}


def checkpoint_usage(tasks: Sequence[str]) -> list[str]:
    """How to use a checkpoint: Markdown with a block of code that runs in the checkpoint's folder.

    Args:
        tasks (`Sequence[str]`): What it was trained for.
    """
    calls = [
        ["", *(line.replace("{pipeline}", f'pipeline("{row.pipeline}", model=REPO)') for line in _CALLS[task])]
        for task, row in TASK_TABLE.items()
        if task in tasks
    ]
    return [
        "```python",
        "from transformers import pipeline",
        "from unihema import Analyzer",
        "",
        HERE,
        "",
        "analyzer = Analyzer.from_pretrained(REPO)",
        *(line for task, line in _ANALYSES.items() if task in tasks),
        *(line for call in calls for line in call),
        "```",
        "",
        "Importing `unihema` makes Transformers know the model. Where it is not installed, the pipelines run the code that lies",
        "beside the weights with `trust_remote_code=True`; read it first.",
    ]


def adapter_usage(base_model: str, model_class: str, task: str, own_processor: bool) -> list[str]:
    """How to use an adapter: Markdown with a block of code that runs in the adapter's folder.

    Args:
        base_model (`str`): Id of the base checkpoint.
        model_class (`str`): Class that the adapter was trained on.
        task (`str`): What it was trained for.
        own_processor (`bool`): Whether a processor lies beside the adapter; the base's is taken otherwise.
    """
    text = TASK_TABLE[task].generates_text
    prompt = ', text="What type of white blood cell is this?"' if task == "question_answering" else ""
    prompt = ', text="The cell is a ___."' if task == "cloze" else prompt
    picture = "smear.png" if TASK_TABLE[task].default_prompt else "cell.png"
    task_argument = ", task=task" if model_class == "UniHemaForMultiTask" and not text else ""
    run = [
        f'task = "{task}"',
        f'inputs = processor(images="{picture}"{prompt}, task=task)',
        "with torch.inference_mode():",
        "    outputs = model.generate(**inputs)" if text else f"    outputs = model(**inputs{task_argument})",
    ]
    shown = {
        "detection": "print(processor.post_process_object_detection(outputs, threshold=0.3)[0])",
        "segmentation": "print(processor.post_process_semantic_segmentation(outputs)[0].shape)",
        "single_cell": "print(base.config.single_cell_labels[int(outputs.logits.argmax())])",
    }
    return [
        "```python",
        "import torch",
        "import unihema",
        "from peft import PeftModel",
        "",
        HERE,
        f'BASE = "{base_model}"',
        "",
        f"base = unihema.{model_class}.from_pretrained(BASE)",
        "model = PeftModel.from_pretrained(base, REPO).eval()",
        f"processor = unihema.UniHemaProcessor.from_pretrained({'REPO' if own_processor else 'BASE'})",
        *run,
        shown.get(task, "print(processor.decode_answers(outputs))"),
        "```",
    ]


def dataset_usage(split: str) -> list[str]:
    """How to read a data folder: Markdown with a block of code that runs in it."""
    return [
        "```python",
        "from unihema.training.data.readers import load_folder",
        "",
        HERE,
        "",
        f'for task, rows in load_folder(REPO, "{split}").items():',
        '    print(task, len(rows), rows[0]["file_name"])',
        "```",
    ]


def for_repo(text: str, repo_id: str) -> str:
    """A card whose code names a repository instead of the folder it lies in."""
    return re.sub(rf"^{re.escape(HERE)}$", f'REPO = "{repo_id}"', text, flags=re.M)


def class_of_task(task: str) -> str:
    """The class that has the head of a task."""
    return TASK_TABLE[task].model_class


def pipeline_of(tasks: Sequence[str]) -> str:
    """The Hub's name of what a model with these tasks does first."""
    return next(row.pipeline for task, row in TASK_TABLE.items() if task in tasks)


__all__ = ["adapter_usage", "checkpoint_usage", "class_of_task", "dataset_usage", "for_repo", "pipeline_of"]
