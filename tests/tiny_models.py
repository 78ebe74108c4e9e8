"""Very small models and batches that the modeling tests share."""

import torch

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import (
    UniHemaForDetection,
    UniHemaForImageClassification,
    UniHemaForQA,
    UniHemaForSegmentation,
)


HEADS = {
    "detection": UniHemaForDetection,
    "segmentation": UniHemaForSegmentation,
    "single_cell": UniHemaForImageClassification,
    "question_answering": UniHemaForQA,
}


# Every part of the model at a width that runs in milliseconds.
VERY_TINY = {
    "backbone_config": {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "text_config": {
        "model_type": "t5",
        "vocab_size": 64,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    },
    "d_model": 32,
    "num_attention_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "fusion_ffn_dim": 32,
    "fusion_queries": 16,
    "num_queries": 20,
    "num_sampling_points": 2,
    "denoising_queries": 8,
    "freeze_backbone_norm": False,
}


def very_tiny_config(**overrides) -> UniHemaConfig:
    """A very tiny model with three detection classes, two single-cell classes and two attributes."""
    names = {
        "id2label": {0: "red blood cell", 1: "platelet", 2: "neutrophil"},
        "single_cell_labels": ["neutrophil", "lymphocyte"],
        "morphology": {"vacuoles": ["absent", "prominent"], "shape": ["round", "oval", "irregular"]},
    }
    return UniHemaConfig(**{**VERY_TINY, **names, **overrides})


def batch(task: str, images: int = 2, size: tuple[int, int] = (64, 96), seed: int = 0) -> dict:
    """Random inputs and labels of one task; the last image is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    h, w = size
    inputs = {"pixel_values": torch.randn(images, 3, h, w, generator=generator)}
    inputs["pixel_mask"] = torch.ones(images, h, w, dtype=torch.long)
    inputs["pixel_mask"][-1, :, w - 32 :] = 0
    inputs["pixel_values"] = inputs["pixel_values"] * inputs["pixel_mask"][:, None]
    if task == "single_cell":
        return {**inputs, "labels": torch.arange(images) % 2}
    inputs["input_ids"] = torch.randint(3, 60, (images, 7), generator=generator)
    inputs["attention_mask"] = torch.ones(images, 7, dtype=torch.long)
    inputs["attention_mask"][-1, 5:] = 0
    inputs["input_ids"] *= inputs["attention_mask"]
    if task == "detection":
        inputs["labels"] = [
            {
                "class_labels": torch.tensor([0, 2]),
                "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.2]]),
                "morphology": torch.tensor([[0, -100], [1, 2]]),
            }
            for _ in range(images)
        ]
    elif task == "segmentation":
        labels = (torch.rand(images, h, w, generator=generator) > 0.5).long()
        inputs["labels"] = labels.masked_fill(inputs["pixel_mask"] == 0, -100)
    else:
        inputs["labels"] = torch.randint(3, 60, (images, 5), generator=generator)
        inputs["labels"][-1, 3:] = -100
    return inputs


def lively(model, scale: float = 0.2):
    """The model with every weight drawn anew, so that nothing that starts at zero hides what lies behind it.

    Args:
        model (`PreTrainedModel`): Changed in place, with the current random state.
        scale (`float`): Spread of what usually starts at zero.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or "sampling_offsets.bias" in name:
                parameter.add_(scale * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.add_(scale * torch.randn_like(buffer))
    return model
