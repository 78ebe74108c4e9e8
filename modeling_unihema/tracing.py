"""Whether a graph is being made of what runs."""

import torch


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records what runs: nothing may then hang on values, or be kept."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


__all__ = ["is_traced"]
