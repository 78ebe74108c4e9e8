"""A checkpoint folder of a very small, untrained model that finds a cell with every query."""

from pathlib import Path

import torch
from tiny_models import lively, very_tiny_config

import unihema
from unihema.loading import load_model
from unihema.modeling_unihema.tasks import TASKS
from unihema.processing_unihema.prompts import task_prompt
from unihema.training.adapters import attach_adapter, save_adapter
from unihema.training.run.config import AdapterConfig


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


def save_lively(folder: Path, seed: int, **overrides) -> Path:
    """A checkpoint whose every weight has a say."""
    model, processor = load_model(save_tiny_checkpoint(folder, num_queries=12, **overrides), "cpu")
    torch.manual_seed(seed)
    lively(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_lively_adapter(checkpoint: Path, folder: Path, seed: int) -> Path:
    """An adapter of a checkpoint for detection, of layers behind the backbone."""
    model, processor = load_model(checkpoint, "cpu")
    cells = ["neutrophil", "eosinophil"]
    rows = [{"task": "detection", "image": "a.png", "file_name": "a.png", "dataset": "lab"}]
    rows[0]["objects"] = {"bbox": [[0, 0, 1, 1]] * 2, "category": cells, "morphology": [{}, {}]}
    attach_adapter(model, processor, AdapterConfig(method="lora"), {"detection": rows})
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert not any("backbone" in name and "lora" in name for name, _ in model.named_parameters())
    save_adapter(model, folder)
    return folder
