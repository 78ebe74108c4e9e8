"""Weights stored in half precision."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint

from tools.store_in_half import store_in_half
from unihema import UniHemaForMultiTask


def test_half_the_size_and_the_same_model(tmp_path):
    """Loaded in float32, each weight within half precision's 2^-11 of itself."""
    source = save_tiny_checkpoint(tmp_path / "whole")
    size = store_in_half(source, tmp_path / "half")
    assert size < 0.6 * (source / "model.safetensors").stat().st_size
    whole, half = (UniHemaForMultiTask.from_pretrained(tmp_path / name) for name in ("whole", "half"))
    assert half.dtype == torch.float32 and half.config.label2id == whole.config.label2id
    for (name, a), b in zip(whole.state_dict().items(), half.state_dict().values()):
        torch.testing.assert_close(b, a, rtol=2**-11, atol=1e-7, msg=name)


def test_a_weight_that_does_not_fit_stops_it(tmp_path):
    source = save_tiny_checkpoint(tmp_path / "whole")
    weights = load_file(source / "model.safetensors")
    weights["detection_head.class_head.weight"] = weights["detection_head.class_head.weight"] * 0 + 1e6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="detection_head.class_head.weight has values that float16 cannot hold"):
        store_in_half(source, tmp_path / "half")
    assert not (tmp_path / "half").exists()
