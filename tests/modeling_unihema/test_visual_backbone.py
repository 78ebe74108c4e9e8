"""The memory format that a backbone trains in."""

import pytest
import torch
from tiny_models import VERY_TINY, very_tiny_config

from unihema.modeling_unihema.visual_backbone import VisualBackbone
from unihema.training.run.build import LITE0_BACKBONE


@pytest.mark.parametrize(
    ("backbone", "channels_last"),
    [(VERY_TINY["backbone_config"], False), (LITE0_BACKBONE, True)],
    ids=["resnet", "lite0"],
)
def test_strided_pointwise_convolutions_train_channels_first(backbone, channels_last):
    """Their backward with channels last writes past its memory in oneDNN, and takes the process with it."""
    torch.manual_seed(0)
    model = VisualBackbone(very_tiny_config(backbone_config=dict(backbone))).train()
    seen = []
    model.backbone.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].is_contiguous(memory_format=torch.channels_last))
    )
    for _ in range(3):
        sum(level.sum() for level in model(torch.randn(2, 3, 64, 96)).maps).backward()
    assert seen == [channels_last] * 3
