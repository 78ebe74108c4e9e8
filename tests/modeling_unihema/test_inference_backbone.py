"""The fast copy of the backbone: same numbers, never out of date, and left out where it would be wrong."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import batch, lively, very_tiny_config
from torch import nn

from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.inference_backbone import fold
from unihema.modeling_unihema.modeling_unihema import UniHemaForDetection, UniHemaForImageClassification
from unihema.training.pretrained_backbone import LITE0_BACKBONE


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = lively(UniHemaForImageClassification(very_tiny_config()))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


def inputs() -> dict:
    given = batch("single_cell")
    del given["labels"]
    return given


def plain(model) -> torch.Tensor:
    """What the backbone gives as it stands: gradients are wanted."""
    with torch.enable_grad():
        return model(**inputs()).logits.detach()


def fast(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def copy_of(model) -> nn.Module | None:
    return model.model.visual_backbone._inference_backbone.copy


def test_every_norm_is_folded_and_nothing_changes(model):
    torch.testing.assert_close(fast(model), plain(model), rtol=0, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy_of(model).modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any("inference" in name for name in model.state_dict())


def test_changed_weights_and_statistics_make_it_anew(model):
    before = fast(model)
    first = copy_of(model)
    assert fast(model).equal(before) and copy_of(model) is first
    with torch.no_grad():
        next(p for p in model.model.visual_backbone.backbone.parameters() if p.ndim == 4).mul_(1.5)
    assert (fast(model) - before).abs().max() > 1e-3
    torch.testing.assert_close(fast(model), plain(model), rtol=0, atol=1e-5)
    before = fast(model)
    model.train()
    with torch.no_grad():
        model(**inputs())
    model.eval()
    assert (fast(model) - before).abs().max() > 1e-3
    torch.testing.assert_close(fast(model), plain(model), rtol=0, atol=1e-5)


def test_training_and_gradients_use_the_backbone_itself(model):
    fast(model)
    model.train()
    assert torch.is_grad_enabled()
    model(**batch("single_cell")).loss.backward()
    assert all(p.grad is not None for p in model.model.visual_backbone.backbone.parameters() if p.requires_grad)


def test_a_copied_model_does_not_share_it(model):
    before = fast(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(p for p in other.model.visual_backbone.backbone.parameters() if p.ndim == 4).mul_(1.5)
    assert (fast(other) - before).abs().max() > 1e-3
    assert fast(model).equal(before)


def test_a_hook_on_one_of_its_layers_is_called(model):
    fast(model)
    seen = []
    layer = next(m for m in model.model.visual_backbone.backbone.modules() if isinstance(m, nn.Conv2d))
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    fast(model)
    assert seen == [1]
    hook.remove()
    fast(model)
    assert seen == [1]


@torch.no_grad()
def test_asking_for_states_does_not_end_its_use():
    torch.manual_seed(0)
    model = UniHemaForDetection(very_tiny_config()).eval()
    given = batch("detection")
    del given["labels"]
    model(**given, output_hidden_states=True)
    ran = []
    copy_of(model).register_forward_hook(lambda *_: ran.append(1))
    model.model.image_memory.forget()
    model(**given)
    assert ran == [1]


def test_adapters_on_its_convolutions_are_seen(model):
    fast(model)
    targets = [n for n, m in model.named_modules() if "backbone.backbone" in n and isinstance(m, nn.Conv2d)]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    with_adapter = fast(adapted)
    torch.testing.assert_close(with_adapter, plain(adapted), rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert (fast(adapted) - with_adapter).abs().max() > 1e-3


@pytest.mark.parametrize("side", [64, 60, 52])
def test_the_backbone_that_ships_is_folded_and_does_not_read_padding(side):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    config = UniHemaConfig.tiny(backbone_config=LITE0_BACKBONE)
    backbone = UniHemaForImageClassification(config).eval().model.visual_backbone
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    pixels = torch.randn(2, 3, 64, 64)
    mask = torch.zeros(2, 64, 64, dtype=torch.long)
    mask[0, :side] = mask[1, :, :48] = 1
    given = pixels.clone()
    with torch.no_grad():
        levels = backbone(pixels, mask)
    expected = backbone(pixels, mask)
    folded = backbone._inference_backbone.copy
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, timm.layers.BatchNormAct2d) for module in backbone.modules())
    for level, same, valid in zip(levels.maps, expected.maps, expected.valid, strict=True):
        torch.testing.assert_close(level * valid[:, None], same * valid[:, None], rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels, given, rtol=0, atol=0)


def test_a_norm_that_does_not_follow_its_neighbour_is_left_alone():
    class Backbone(nn.Module):
        """Declares a norm after a convolution, and runs it before."""

        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 3)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, pixels):
            from transformers.modeling_outputs import BackboneOutput

            return BackboneOutput(feature_maps=(self.convolution(self.norm(pixels)),))

    Backbone.__module__ = "torch.nn.made_up"
    torch.manual_seed(0)
    backbone = Backbone().eval()
    backbone.norm.running_mean.fill_(0.7)
    assert fold(backbone) is None
