"""BatchNorm over the whole batch when several processes share it, on any device (torch's SyncBatchNorm needs a GPU)."""

import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of all processes' images, with gradients between them.

    Every process has to take part in every forward pass. In evaluation it is an ordinary BatchNorm.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to the same, normalised."""
        if not self.training:
            return super().forward(states)
        exact = states.float()
        count = all_reduce(exact.new_tensor(float(exact.numel() // exact.shape[1])))
        mean = all_reduce(exact.sum((0, 2, 3))) / count
        centred = exact - mean[:, None, None]
        # In a second round: the difference of two large sums would lose what is left of the variance.
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)))
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(states.dtype)

    @torch.no_grad()
    def _remember(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def share_batch_norms(model: nn.Module) -> None:
    """Makes the BatchNorms of a model shared ones, in place: parameters, statistics, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            module.__class__ = SharedBatchNorm2d


__all__ = ["SharedBatchNorm2d", "share_batch_norms"]
