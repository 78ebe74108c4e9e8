"""Layers that start from other values than their kind usually does.

Transformers initialises models from outside its own tree layer by layer and passes over modules without parameters of
their own, so what is special about a layer has to be written on the layer.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .class_rows import ClassLinear


def initialised(layer: nn.Linear, gain: float = 1.0, bias: Callable[[], torch.Tensor] | None = None) -> nn.Linear:
    """Marks a linear layer with its own start.

    Args:
        layer (`nn.Linear`): The layer.
        gain (`float`): Gain of its Xavier-uniform weight; 0 for a zero weight.
        bias (`Callable[[], torch.Tensor]`, *optional*): Makes its first bias; zero when missing.

    Returns:
        `nn.Linear`: The same layer.
    """
    layer.initial_gain = gain
    layer.initial_bias = bias
    return layer


def class_scores(width: int, classes: int, probability: float = 0.01) -> nn.Linear:
    """A sigmoid classifier that starts at `probability` for every class (focal loss, arXiv 1708.02002, section 4.1)."""
    start = -math.log((1 - probability) / probability)
    return initialised(ClassLinear(width, classes), bias=partial(torch.full, (classes,), start))
