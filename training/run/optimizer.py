"""AdamW with a learning rate for each group of parameters, its schedule, and the moving average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unihema.errors import InputError, RunConfigError
from unihema.training.run.config import OptimisationConfig


BACKBONE = "visual_backbone"


def make_optimizer(model: nn.Module, config: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, fused where these are on a GPU.

    Groups differ in learning rate (backbone, and names listed in `learning_rate_multipliers`; several factors
    multiply) and in weight decay (none for norms and biases, which have one dimension). A factor of 0 freezes its
    parameters: no gradient is computed for them.

    Raises:
        RunConfigError: A multiplier that fits no parameter, or nothing to train.
    """
    multipliers = {BACKBONE: config.backbone_multiplier, **config.learning_rate_multipliers}
    groups: dict[tuple[float, bool], dict] = {}
    used = set()
    for name, parameter in model.named_parameters():
        matching = [part for part in multipliers if part in name]
        used.update(matching)
        if not parameter.requires_grad:
            continue
        factor = math.prod(multipliers[part] for part in matching)
        if factor == 0:
            parameter.requires_grad_(False)
            continue
        decays = parameter.ndim > 1
        group = groups.setdefault(
            (factor, decays),
            {
                "params": [],
                "lr": config.learning_rate * factor,
                "weight_decay": config.weight_decay if decays else 0.0,
                "name": f"lr x {factor:g}, {'decay' if decays else 'no decay'}",
            },
        )
        group["params"].append(parameter)
    unused = set(config.learning_rate_multipliers) - used
    if unused:
        raise RunConfigError(f"optimisation.learning_rate_multipliers: no parameter has '{unused.pop()}' in its name.")
    if not groups:
        raise RunConfigError("Nothing to train: every parameter is frozen.")
    # One kernel for all of them; on a CPU results stay those of earlier runs.
    on_gpu = all(parameter.device.type == "cuda" for group in groups.values() for parameter in group["params"])
    return torch.optim.AdamW(
        list(groups.values()), lr=config.learning_rate, betas=tuple(config.betas), fused=on_gpu or None
    )


class ProgressSchedule:
    """Sets the learning rates from the progress of the run, which may be measured in steps or in time.

    Args:
        optimizer (`torch.optim.Optimizer`): Its groups' learning rates as they are now are the full ones.
        config ([`OptimisationConfig`]): `schedule`, `warmup_steps` and what goes with them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimisationConfig):
        self.optimizer = optimizer
        self.config = config
        self.full = [group["lr"] for group in optimizer.param_groups]

    def factor(self, step: int, progress: float) -> float:
        """Learning rate relative to the full one.

        Args:
            step (`int`): Optimizer steps done, for the warm-up.
            progress (`float`): From 0 at the start to 1 at the end.
        """
        config = self.config
        progress = min(max(progress, 0.0), 1.0)
        if config.schedule == "cosine":
            curve = (1 + math.cos(math.pi * progress)) / 2
            factor = config.final_fraction + (1 - config.final_fraction) * curve
        elif config.schedule == "step":
            factor = config.step_factor ** sum(progress >= fraction for fraction in config.step_fractions)
        else:
            factor = 1.0
        return factor * min(1.0, (step + 1) / max(config.warmup_steps, 1))

    def set(self, step: int, progress: float) -> float:
        """Sets the learning rates for the next step; gives that of the first group."""
        factor = self.factor(step, progress)
        for group, full in zip(self.optimizer.param_groups, self.full):
            group["lr"] = full * factor
        return self.optimizer.param_groups[0]["lr"]


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
