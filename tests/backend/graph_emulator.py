"""A CUDA graph for the CPU: records the operators that a step calls, and calls them again.

Like the real one it runs nothing of the step's Python again, runs nothing while it records, writes
into the same tensors at every replay, and refuses whatever would have to wait for a device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = "operation not permitted when stream is capturing"


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Runs operators and writes them down; `undo` makes as if they had not run."""

    def __init__(self, generators: Sequence[Generator]):
        super().__init__()
        self.calls, self.generators = [], generators
        self.states = [generator.get_state() for generator in generators]
        self.made, self.before = set(), {}  # storages by address; all stay alive in `calls`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError(REFUSED)
        if (drawn := kwargs.get("generator")) is not None:  # another object around the same state
            states = [generator.get_state() for generator in self.generators]
            if not any(torch.equal(drawn.get_state(), state) for state in states):
                raise RuntimeError(f"{REFUSED}: a generator is not registered")
        for tensor in tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made | self.before.keys():
                self.before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        for tensor in tensors(out):
            self.made.add(tensor.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for own, new in zip(tensors(out), tensors(again), strict=True):
                if own.data_ptr() != new.data_ptr():
                    own.copy_(new)


class Emulated:
    """In the place of `graphs.Cuda`; counts what it is asked for."""

    def __init__(self, device: torch.device, generators: Sequence[Generator]):
        self.generators = generators
        self.eager = self.captures = self.replays = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.eager += 1
        yield

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.captures += 1
        captures = patch("l2l_ref.guard.capturing", lambda x: True)
        with captures, Tape(self.generators) as tape:
            outputs = function()
        tape.undo()

        def replay() -> Any:
            self.replays += 1
            tape.replay()
            return outputs

        return replay
