"""Device, precision and processes of a run, through Accelerate; and BatchNorm over the whole batch that processes share."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from torch import nn
from torch.distributed.nn.functional import all_reduce

from unihema.errors import RunConfigError
from unihema.training.run.config import OptimisationConfig


# The other processes wait this long for the one that evaluates.
EVALUATION_LIMIT = timedelta(hours=6)


def make_accelerator(
    settings: OptimisationConfig, trackers: Sequence[str] = (), folder: str | Path | None = None
) -> Accelerator:
    """The Accelerator of a run, also of a second run in one process with other settings.

    Args:
        settings ([`OptimisationConfig`]): Device, precision and accumulation.
        trackers (`Sequence[str]`): Names of Accelerate's trackers.
        folder (`str` or `Path`, *optional*): Where they write.

    Raises:
        RunConfigError: A GPU that PyTorch does not see. A tracker that Accelerate does not know or that is not installed.
    """

    def make() -> Accelerator:
        return Accelerator(
            cpu=_on_cpu(settings.device),
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulation,
            log_with=list(trackers) or None,
            project_dir=folder,
            kwargs_handlers=[
                # A task uses its own parts only, so every batch leaves some parameters without a gradient.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=EVALUATION_LIMIT),
            ],
        )

    kind, _, number = settings.device.partition(":")
    there = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= there:
        raise RunConfigError(
            f"optimisation.device={settings.device!r}: PyTorch sees {there} GPUs. Install a PyTorch with CUDA and a driver, or "
            "train on 'cpu'."
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RunConfigError("optimisation.device='mps': PyTorch sees no GPU of Apple's. Train on 'auto'.")
    if number:
        # Accelerate takes the current one, and with several processes a GPU for each.
        torch.cuda.set_device(int(number))
    found = [tracker.value for tracker in get_available_trackers()]
    if missing := [name for name in trackers if name not in found]:
        raise RunConfigError(
            f"logging.trackers: {missing[0]!r} is not there; Accelerate finds {', '.join(found) or 'none'}. "
            f"Install it (pip install {missing[0]}), or take it out."
        )
    try:
        return make()
    except ValueError:
        # Accelerate keeps the precision and device of the first run in a process, as in a notebook, for good.
        state = AcceleratorState()
        if state.num_processes > 1:
            raise
        # Private: Accelerate has no public way to forget it.
        state._reset_state(reset_partial_state=True)  # noqa: SLF001
        return make()


def join_processes(device: str) -> PartialState:
    """Joins the other processes of a run, where a launcher started several.

    Args:
        device (`str`): `optimisation.device` of the run.
    """
    return PartialState(cpu=_on_cpu(device))


def _on_cpu(device: str) -> bool:
    """Whether Accelerate has to be told to compute on the CPU. Without a GPU it takes each of several processes for one alone."""
    return device == "cpu" or (device == "auto" and _launched() and not torch.cuda.is_available())


@contextmanager
def matrix_products(tf32: bool | None, device: torch.device) -> Iterator[None]:
    """Within, float32 matrix products and convolutions on a GPU use TF32, or do not.

    Args:
        tf32 (`bool`, *optional*): Which; as PyTorch is set where not given.
        device (`torch.device`): Where they are computed. On a CPU nothing is set.
    """
    if tf32 is None or device.type != "cuda":
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


class Agreement:
    """What all processes of a run agree on, over their hosts: no device is waited for.

    Args:
        processes (`int`): How many there are.
    """

    def __init__(self, processes: int):
        self.processes = processes
        # GPUs talk through NCCL, which knows no tensors of the host.
        apart = processes > 1 and torch.distributed.get_backend() != "gloo"
        self.group = torch.distributed.new_group(backend="gloo", timeout=EVALUATION_LIMIT) if apart else None

    def largest(self, *values: float) -> list[float]:
        """The largest of each value among the processes, which must stop, fail and slow down together."""
        if self.processes == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, self.group)
        return own.tolist()


def is_main_process() -> bool:
    """Whether this process is the one that writes; also before it has joined the others."""
    if _several():
        return torch.distributed.get_rank() == 0
    return not _launched() or int(os.environ.get("RANK") or 0) == 0


def wait_for_everyone() -> None:
    """Returns when every process has come here."""
    if _several():
        torch.distributed.barrier()


def _launched() -> bool:
    """Whether a launcher started several processes of this run."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of all processes' images, with gradients between them, on any device
    (torch's SyncBatchNorm needs a GPU).

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
