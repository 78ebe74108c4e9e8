"""What a sum of losses is divided by, so that several processes together learn what one would from all their samples."""

import torch


def average_over_processes(*counts: int | torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Each count averaged over the processes of a distributed run, at least 1; in one exchange, in which every process
    takes part.

    A process's loss is its own sum over this count; since gradients are averaged between processes, that is the sum over
    all samples divided by all that is counted.

    Args:
        *counts (`int` or `torch.Tensor`): Cells, tokens or images of this process's part of the batch.
        device (`torch.device`): Of the loss.

    Returns:
        `tuple[torch.Tensor, ...]`: float32 scalars.
    """
    values = torch.stack([torch.as_tensor(count, dtype=torch.float32, device=device) for count in counts])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return tuple(values.clamp(min=1))


__all__ = ["average_over_processes"]
