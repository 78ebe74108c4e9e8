"""AdamW with a learning rate for each group of parameters, and its schedule over the progress of a run."""

import math

import torch
from torch import nn

from unihema.errors import RunConfigError
from unihema.training.run.config import OptimisationConfig


BACKBONE = "visual_backbone"


def make_optimizer(model: nn.Module, config: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

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
    return torch.optim.AdamW(list(groups.values()), lr=config.learning_rate, betas=tuple(config.betas))


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
