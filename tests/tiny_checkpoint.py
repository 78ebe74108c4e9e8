"""A checkpoint folder of a very small, untrained model that finds a cell with every query."""

from pathlib import Path

import torch
from tiny_models import very_tiny_config

import unihema
from unihema.modeling_unihema.tasks import TASKS
from unihema.processing_unihema.prompts import task_prompt


def save_tiny_checkpoint(folder: Path, model_class: type | None = None, text_length: int = 32, **overrides) -> Path:
    """Writes model and processor, seeded.

    Args:
        folder (`Path`): Where.
        model_class (`type`, *optional*): A class with one head; all heads by default.
        text_length (`int`): Longest text in tokens.
        **overrides: Fields of the configuration.
    """
    torch.manual_seed(0)
    processor = unihema.UniHemaProcessor.from_default(
        **{task: {"longest_edge": 64} for task in TASKS}, max_text_length=text_length
    )
    config = very_tiny_config(fusion_queries=text_length, **overrides)
    config.trained.detection_thresholds = dict.fromkeys(config.label2id, 0.0) | config.trained.detection_thresholds
    config.text_config.vocab_size = len(processor.tokenizer)
    config.default_prompt_ids = {
        task: processor.tokenizer(task_prompt(task, names))["input_ids"]
        for task, names in processor.default_prompts.items()
    }
    (model_class or unihema.UniHemaForMultiTask)(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
