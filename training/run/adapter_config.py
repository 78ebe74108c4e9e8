"""Settings of a run that trains an adapter instead of the model."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class AdapterConfig:
    """An adapter for `model.initial_checkpoint`, whose own weights stay as they are.

    Args:
        method (`"none"`, `"lora"`, `"dora"` or `"ia3"`): Kind of adapter; `"none"` trains the model itself.
        rank (`int`): Width of the change of each layer, for LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).
        alpha (`float`): The change is scaled by `alpha / rank`.
        dropout (`float`): Dropout before the change.
        target_modules (`str`, *optional*): Pattern of the names of the layers to change, see
            `unihema.training.adapters.TARGETS`; the attention and feed-forward layers that the tasks run when not given.
        heads (`list[str]`, *optional*): Names of modules that are trained and saved whole; those with the classes of the
            tasks when not given.
        labels (`list[str]`, *optional*): Classes, in their order; those of the training data when not given.
        start_from (`dict[str, str]`): New class -> the base's class that it starts from. Other classes start from the
            base's class of the same name, else from the coarser one that they are a kind of.
        base_name (`str`, *optional*): What the adapter calls its base; the checkpoint's folder when not given.
    """

    method: Literal["none", "lora", "dora", "ia3"] = "none"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | None = None
    heads: list[str] | None = None
    labels: list[str] | None = None
    start_from: dict[str, str] = field(default_factory=dict)
    base_name: str | None = None


__all__ = ["AdapterConfig"]
