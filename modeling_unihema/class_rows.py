"""Layers with one row a class, whose copies in an adapter may have other classes than the model."""

import torch
from torch import nn


# Where PEFT keeps an adapter's own copy of a module (`modules_to_save`).
_ADAPTER_COPY = ".modules_to_save."


class _ClassRows(nn.Module):
    """What [`ClassLinear`] and [`ClassEmbedding`] have in common."""

    _count_name: str

    def set_rows(self, sources: list[int | None], fresh: torch.Tensor | None = None) -> None:
        """Gives the layer other rows.

        Args:
            sources (`list[int | None]`): For each new row the old one it starts from; `None`: a row that starts from the
                mean of the old ones, or from its row of `fresh`.
            fresh (`torch.Tensor`, *optional*): `[len(sources), width]`; biases of such rows are 0.
        """
        for name, value in list(self.named_parameters(recurse=False)):
            new = value.new_empty(len(sources), *value.shape[1:])
            for row, source in enumerate(sources):
                if source is not None:
                    new[row] = value.detach()[source]
                elif fresh is None:
                    new[row] = value.detach().mean(0)
                else:
                    new[row] = fresh[row] if value.ndim > 1 else 0.0
            setattr(self, name, nn.Parameter(new, requires_grad=value.requires_grad))
        setattr(self, self._count_name, len(sources))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and _ADAPTER_COPY in f".{prefix}" and len(weight) != len(self.weight):
            self.set_rows([0] * len(weight))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ClassLinear(_ClassRows, nn.Linear):
    """A linear layer with one output a class."""

    _count_name = "out_features"


class ClassEmbedding(_ClassRows, nn.Embedding):
    """An embedding with one row a class."""

    _count_name = "num_embeddings"


__all__ = ["ClassEmbedding", "ClassLinear"]
