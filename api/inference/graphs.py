"""A model on an NVIDIA GPU recorded as CUDA graphs: the processor launches one graph instead of a thousand operators.

A graph is recorded for each size of a batch when it comes a second time. No image is padded further for it, so a replayed
result is that of the same operators launched one by one, and an image that has a size of its own costs no recording.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


# Graphs that are kept, those used last. All share one pool of memory, which is as large as the largest needs, and their results.
MOST_GRAPHS = 16
# Sizes that are remembered as seen once.
MOST_SIZES = 1024


@dataclass
class _Graph:
    inputs: tuple[torch.Tensor | None, ...]
    output: Any
    replay: Callable[[], None]
    # What the operators were launched for, and what they read, which must not go while they can.
    state: tuple[Hashable, ...]
    kept: list[Any]


class Recorder:
    """Runs computations of one model, from recorded graphs where it can.

    What a graph gives lies in memory that the next call overwrites: keep [`Recorder.held`] until it is read.

    Args:
        model (`nn.Module`): The model whose weights are read.
        record (`Callable`, *optional*): Runs a computation and gives its output, and what fills this output anew from the same
            inputs; a CUDA graph when missing.
    """

    def __init__(
        self, model: torch.nn.Module, record: Callable[[Callable[[], Any]], tuple[Any, Callable]] | None = None
    ):
        self.model = model
        self._record = record or _CudaGraphs()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._works = True
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of an analyzer, or one in another process, records its own.
        return Recorder, (self.model,)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which no other thread's call overwrites what a call gave."""
        with self._lock:
            yield

    def forget(self) -> None:
        """Gives back the memory of all graphs."""
        with self._lock:
            self._graphs.clear()

    def __call__(self, name: Hashable, compute: Callable[..., Any], *inputs: torch.Tensor | None) -> Any:
        """What `compute` gives of these inputs.

        Args:
            name (`Hashable`): With the inputs' sizes and dtypes it says which operators `compute` launches.
            compute (`Callable`): A function of tensors that reads nothing back to the host.
            inputs (`torch.Tensor` or `None`): Its arguments, on the model's device.
        """
        with self._lock:
            sizes = (None if given is None else (tuple(given.shape), given.dtype) for given in inputs)
            key = (name, *sizes, *_surroundings())
            graph = self._graphs.get(key)
            if graph is None:
                return self._record_at_second(key, compute, inputs)
            for own, given in zip(graph.inputs, inputs, strict=True):
                if own is not None:
                    own.copy_(given, non_blocking=True)
            graph.replay()
            # Looked at while the device works.
            if graph.state != _state(self.model):
                # A model that changes with every call is not recorded with every call.
                del self._graphs[key]
                self._seen.pop(key, None)
                return self._record_at_second(key, compute, inputs)
            self._graphs.move_to_end(key)
            return graph.output

    def _record_at_second(self, key: Hashable, compute: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        if key not in self._seen or not self._works:
            self._seen[key] = None
            if len(self._seen) > MOST_SIZES:
                self._seen.popitem(last=False)
            return self._launch(compute, inputs)
        own = tuple(None if given is None else given.clone() for given in inputs)
        state = _state(self.model)
        try:
            output, replay = self._record(lambda: compute(*own))
        except RuntimeError as error:
            # Of a backbone that reads something back to the host, or without memory for another graph.
            self._works = False
            self._graphs.clear()
            first = " ".join(str(error).split("\n", 1)[0].split())[:200]
            warnings.warn(
                f"No CUDA graph can be recorded of this model, which is slower without: {first}", stacklevel=2
            )
            return compute(*inputs)
        kept = [*self.model.modules(), *(tensor.detach() for tensor in _tensors(self.model))]
        self._graphs[key] = _Graph(own, output, replay, state, kept)
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return output

    def _launch(self, compute: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """The operators one by one; without memory for them, the graphs go first."""
        try:
            return compute(*inputs)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self._graphs.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return compute(*inputs)


class _CudaGraphs:
    """Records on the device at hand, in one pool of memory: graphs are never replayed at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        # Libraries set themselves up at a first call on a stream, which cannot be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()
        # Recording computes nothing.
        graph.replay()
        return output, graph.replay


def _surroundings() -> tuple[Hashable, ...]:
    """What around a model decides which operators it launches."""
    return (
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _state(model: torch.nn.Module) -> tuple[Hashable, ...]:
    """What of a model decides which operators it launches, and where they read; they read values anew."""
    modules = tuple(
        # Private: nothing public tells that a hook was added.
        (id(module), type(module), id(vars(module).get("forward")), module.training)
        + (*module._forward_hooks, *module._forward_pre_hooks, *_adapters(module))  # noqa: SLF001
        for module in model.modules()
    )
    return *modules, *((tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) for tensor in _tensors(model))


def _adapters(module: torch.nn.Module) -> tuple[Hashable, ...]:
    """How a layer of PEFT is used."""
    if not hasattr(module, "merged_adapters"):
        return ()
    scaling = tuple(getattr(module, "scaling", {}).items())
    return tuple(module.active_adapters), tuple(module.merged_adapters), module.disable_adapters, scaling


__all__ = ["Recorder"]
