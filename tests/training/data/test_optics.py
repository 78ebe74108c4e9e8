"""Stain, light, lens and camera: in range, the same for the same seed, and strong enough to matter."""

import numpy as np
import pytest
import torch

from unihema.training.data import optics
from unihema.training.data.augmentation import AugmentationConfig, augment, augmentation_rng
from unihema.training.data.framing import framed
from unihema.training.data.optics import recoloured, smoothed, stain_directions, through_another_lens


@pytest.fixture
def cell():
    pixels = torch.full((3, 64, 64), 220, dtype=torch.uint8)
    pixels[:, 20:44, 20:44] = torch.tensor([120, 60, 160], dtype=torch.uint8)[:, None, None]
    return pixels


def test_without_strength_nothing_changes(cell):
    same = recoloured(cell, 0.0, np.random.default_rng(0))
    assert (same * 255 - cell.float()).abs().max() <= 1.01
    assert torch.equal(through_another_lens(same, 0.0, np.random.default_rng(0)), same)


def test_colours_differ_as_far_as_the_strength_says(cell):
    def spread(strength):
        seen = torch.stack([recoloured(cell, strength, np.random.default_rng(seed)).mean((1, 2)) for seed in range(60)])
        assert seen.min() >= 0 and seen.max() <= 1
        return float(seen.std(0).mean())

    assert 0.01 < spread(0.1) < 0.5 * spread(0.5) < 0.5 * spread(1.0) < 0.2


def test_factors_along_stains_change_these_alone(monkeypatch):
    """A pixel of azure alone, seen with nothing but the factors of stains, stays one of azure."""
    for name in ("MIXING", "BACKGROUND", "GAMMA", "OVERALL", "CHANNEL", "OFFSET", "SATURATION"):
        monkeypatch.setattr(optics, name, 0.0)
    azure = stain_directions()[:, 0]
    assert azure.norm().item() == pytest.approx(1, abs=1e-6) and azure.min() > 0
    pixels = (256 * (-0.8 * azure).exp() - 1).round().to(torch.uint8)[:, None, None].expand(3, 4, 4).contiguous()
    factors = set()
    for seed in range(8):
        density = -recoloured(pixels, 1.0, np.random.default_rng(seed), azure_and_eosin=True)[:, 0, 0].log()
        assert (density / density.norm() - azure).abs().max() < 0.02
        factors.add(round(float(density.norm()), 3))
    assert len(factors) == 8
    plain = -recoloured(pixels, 1.0, np.random.default_rng(1))[:, 0, 0].log()
    assert (plain / plain.norm() - azure).abs().max() > 0.02


def test_cell_and_background_stay_apart(cell):
    """The nucleus is the darker part in every stain that is made up."""
    for seed in range(60):
        light = recoloured(cell, 1.0, np.random.default_rng(seed)).mean(0)
        assert light[30, 30] <= light[5, 5]


def test_lenses_are_as_different_as_said(cell):
    pixels = cell.float() / 255
    changed = [through_another_lens(pixels, 1.0, np.random.default_rng(seed)) for seed in range(80)]
    assert all(one.shape == pixels.shape and one.min() >= 0 and one.max() <= 1 for one in changed)
    same = sum(torch.equal(one, pixels) for one in changed) / 80
    # (1 - 1/3) 0.8 0.8 0.5 0.7 is 0.15.
    assert 0.05 < same < 0.27
    blurred = smoothed(pixels, 1.0)
    assert blurred.mean().item() == pytest.approx(pixels.mean().item(), abs=1e-3) and not torch.equal(blurred, pixels)


def test_views_depend_on_seed_epoch_and_index_alone(cell):
    config = AugmentationConfig.for_task("single_cell")
    views = [augment(cell, config, augmentation_rng(0, 0, index), edge=48)[0] for index in range(12)]
    again = [augment(cell, config, augmentation_rng(0, 0, index), edge=48)[0] for index in range(12)]
    assert all(torch.equal(one, other) for one, other in zip(views, again, strict=True))
    assert len({tuple(one.flatten().tolist()) for one in views}) == 12
    assert all(
        one.dtype == torch.uint8 and one.shape[-2:] == one.shape[-1:] * 2 and one.shape[-1] <= 48 for one in views
    )


def test_framing_shows_as_much_of_the_crop_as_said():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200).contiguous()
    config = AugmentationConfig.none()
    config.framing, config.seen_min, config.seen_max, config.shift = 1.0, 0.45, 1.0, 0.1
    spans = []
    for index in range(80):
        view = framed(ramp, config, augmentation_rng(0, 0, index))
        spans.append((int(view.max()) - int(view.min()) + 1) / 200)
    assert 0.44 < min(spans) < 0.5 and max(spans) > 0.9
    assert torch.equal(framed(ramp, AugmentationConfig.none(), augmentation_rng(0, 0, 0)), ramp)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"colour=3 must lie in \[0, 2\]"):
        AugmentationConfig(colour=3)
    with pytest.raises(ValueError, match="seen_min=0.9 must be 0.1 or more and at most seen_max=0.5"):
        AugmentationConfig(framing=1, seen_min=0.9, seen_max=0.5)
