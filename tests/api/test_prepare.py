"""A model prepared for inference: the same results, nothing but the backbone changed, and never saved by mistake."""

import pytest
import torch
from tiny_models import batch, lively, very_tiny_config
from torch import nn

from unihema import prepare_for_inference
from unihema.errors import PreparedModelError
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.modeling_unihema.modeling_unihema import UniHemaForImageClassification
from unihema.training.run.build import LITE0_BACKBONE


def model_of(config):
    torch.manual_seed(0)
    model = lively(UniHemaForImageClassification(config))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    given = batch("single_cell")
    del given["labels"]
    return model(**given).logits


def norms(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_every_norm_is_fused_once_and_nothing_else_changes():
    model = model_of(very_tiny_config())
    before, number = logits(model), len(norms(model))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    done = prepare_for_inference(model)
    assert done.fused_norms == number > 0 and done.channels_last and not norms(model)
    assert str(done) == f"{number} norms fused into convolutions, channels last"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert all(model.get_submodule(name) is module for name, module in linears.items())
    assert prepare_for_inference(model) is done


def test_prepared_model_is_not_saved(tmp_path):
    model = model_of(very_tiny_config())
    prepare_for_inference(model)
    with pytest.raises(PreparedModelError, match="Load the checkpoint again"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("side", [64, 60, 52])
def test_backbone_that_ships_is_fused_whole_and_reads_no_padding(side):
    # Its convolutions with a stride pad in a way of their own.
    model = model_of(UniHemaConfig.tiny(backbone_config=LITE0_BACKBONE))
    pixels, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    mask[0, :side] = mask[1, :, :48] = 1
    given = pixels.clone()
    with torch.no_grad():
        expected = model.get_image_features(pixels, mask).levels
        prepare_for_inference(model)
        found = model.get_image_features(pixels, mask).levels
    assert not norms(model)
    for level, same, valid in zip(found.maps, expected.maps, expected.valid, strict=True):
        torch.testing.assert_close(level * valid[:, None], same * valid[:, None], rtol=0, atol=5e-4)
    torch.testing.assert_close(pixels, given, rtol=0, atol=0)


def test_convolution_whose_weight_is_computed_keeps_its_norm():
    model = model_of(very_tiny_config())
    number = len(norms(model))
    first = next(m for m in model.model.visual_backbone.backbone.modules() if isinstance(m, nn.Conv2d))
    nn.utils.parametrizations.weight_norm(first)
    before = logits(model)
    assert prepare_for_inference(model).fused_norms == number - 1
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_norm_that_does_not_follow_its_neighbour_stays():
    class Backbone(nn.Module):
        """Declares a norm after a convolution, and runs it before."""

        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 3)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, pixels):
            from transformers.modeling_outputs import BackboneOutput

            return BackboneOutput(feature_maps=(self.convolution(self.norm(pixels)),))

    model = model_of(very_tiny_config())
    backbone = model.model.visual_backbone.backbone = Backbone()
    backbone.norm.running_mean.fill_(0.7)
    done = prepare_for_inference(model)
    assert done.fused_norms == 0 and norms(model) and "norms not fused" in str(done)
