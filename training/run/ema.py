"""Exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unihema.errors import InputError


class ExponentialMovingAverage:
    """Keeps `average = d * average + (1 - d) * weights`, with `d = min(decay, (1 + t) / (warmup + t))` at update t.

    Buffers such as BatchNorm statistics are averaged as well; integer ones are copied.

    Args:
        model (`nn.Module`): Where the average starts from.
        decay (`float`): Largest `d`.
        warmup (`float`): How long early weights, far from good, are forgotten fast.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9997, warmup: float = 10.0):
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay {decay} must lie in [0, 1).")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.average = {name: value.detach().clone() for name, value in _tensors(model).items()}

    def current_decay(self) -> float:
        """`d` of the next update."""
        return min(self.decay, (1 + self.updates) / (self.warmup + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights after an optimizer step."""
        averages, values = [], []
        for name, value in _tensors(model).items():
            if value.is_floating_point():
                averages.append(self.average[name])
                values.append(value.detach().to(self.average[name].dtype))
            else:
                self.average[name].copy_(value)
        get_ema_multi_avg_fn(self.current_decay())(averages, values, self.updates)
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again."""
        tensors = _tensors(model)
        own = {name: value.detach().clone() for name, value in tensors.items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in tensors.items():
                    value.copy_(own[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the model's weights with the average."""
        for name, value in _tensors(model).items():
            value.copy_(self.average[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average, and the number of updates as `updates`."""
        return {**self.average, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores `state_dict()`.

        Raises:
            ValueError: The average of another model.
        """
        if set(state) - {"updates"} != set(self.average):
            odd = sorted((set(state) - {"updates"}) ^ set(self.average))
            raise InputError(f"The averaged weights are of another model; '{odd[0]}' is in one of the two only.")
        self.updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(state[name])


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers, a shared one once."""
    seen: set[int] = set()
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value
    return tensors
