"""A step of a training loop as a CUDA graph: hundreds of small kernels become one launch."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from l2l_ref.errors import InputError

EAGER_CALLS = 3  # they make what is made lazily: `.grad`, an optimizer's state, cuBLAS's workspace


@dataclass
class Graphed:
    """A step that is called again and again: on a GPU captured once, then replayed.

    On a CPU a call is a call. On a GPU the first `EAGER_CALLS` run as they are, the next is
    captured, and from then on a call copies its inputs and launches the graph. Each is a real step,
    provided that the step keeps its state in tensors that it changes in place, reads no number of
    Python's that changes (the graph keeps what it saw), and never waits for the device (`.item()`).
    """

    step: Callable[..., Any]  # tensors -> a tensor, a tuple of tensors, or None
    device: torch.device
    generators: Sequence[Generator] = ()  # there, that it draws from beside torch's default one
    capture: bool = True  # False calls `step` every time, as one must that waits for the device

    def __post_init__(self) -> None:
        self.eager_calls = 0
        self.graphs = graphs_of(self.device, self.generators) if self.capture else None
        self.inputs: list[Tensor] = []
        self.replay: Callable[[], Any] | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """What `step(*inputs)` returns: after the capture the same tensors, so copy what is kept.

        Raises:
            InputError: a step that cannot be captured; inputs of another shape than those it was
                captured with.
        """
        if self.graphs is None:
            return self.step(*inputs)
        if self.replay is None and self.eager_calls < EAGER_CALLS:
            self.eager_calls += 1
            with self.graphs.beside():
                return self.step(*inputs)
        if self.replay is None:
            self.inputs = [x.clone() for x in inputs]
            try:
                self.replay = self.graphs.capture(lambda: self.step(*self.inputs))
            except RuntimeError as error:  # ending a capture that failed raises once more
                raise InputError(
                    f"the step cannot be captured as a CUDA graph ({error.__context__ or error}): "
                    "mend that, or give capture=False (run.py: --no-graphs)"
                ) from error
        for own, x in zip(self.inputs, inputs, strict=True):
            if own.shape != x.shape:
                raise InputError(
                    f"an input has shape {list(x.shape)} but the step was captured with "
                    f"{list(own.shape)}: give batches of one size, or capture=False"
                )
            own.copy_(x)
        return self.replay()


class Cuda:
    """What capturing takes from CUDA. A test puts something else in its place."""

    def __init__(self, device: torch.device, generators: Sequence[Generator]):
        self.stream, self.generators = side_stream(device), generators

    @contextmanager
    def beside(self) -> Iterator[None]:
        """The stream that will capture, in turn with the current one: what is made lazily belongs
        to a stream, and the default one cannot capture."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Records what `function` launches, runs none of it, and returns what does."""
        device = self.stream.device
        graph = torch.cuda.CUDAGraph()
        # Generators put their offsets on the current device. The outer stream is what a capture
        # that failed returns to: torch before 2.15 stays on the side stream.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            for generator in self.generators:
                with warnings.catch_warnings():  # later versions find generators by themselves
                    warnings.simplefilter("ignore")
                    graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=self.stream):
                outputs = function()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: cuBLAS keeps some MB for every stream that it has met."""
    return torch.cuda.Stream(device)


def graphs_of(device: torch.device, generators: Sequence[Generator]) -> Cuda | None:
    """What captures on a device; None where calls are cheap enough."""
    return Cuda(device, generators) if device.type == "cuda" else None
