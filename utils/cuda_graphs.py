"""CUDA graphs: the launches of a function recorded once, then handed to the GPU as one.

A training step of a ConvNet is a thousand launches and more. Where the host needs longer to make
them than the GPU to compute them, the GPU waits; a replayed graph costs the host one launch.
"""
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from utils.log import print_once
from utils.registry import one_line

# Calls before the recording: they make tables, load kernels, and compile what is to be compiled.
WARM_UPS = 3


class Captured:
    """Calls functions; where it `is_on`, a function on a GPU by a CUDA graph from the fourth call.

    `captured(function, *inputs)` is `function(*inputs)`: nested tuples, lists and dictionaries of
    tensors in and out, always the same function. Calls of other shapes than the first's are made
    directly. What a replayed call gives is overwritten by the next one. The function must make the
    same launches whatever the values: no decision and no random number of the host's, which would
    be repeated for ever. Where it draws such a number, or where CUDA cannot record it, that is
    said, and calls are made directly.

    `parameters`: those whose gradients the function adds to. A replay adds the same, to the bit.
    """

    device_type = "cuda"

    def __init__(self, what: str = "", parameters: Iterable[Tensor] = (), *,
                 is_on: bool = False) -> None:
        self.what, self.is_on = what, is_on
        self.parameters = list(parameters)
        self.form: list[tuple] = []  # of the inputs
        self.calls = 0
        self.stream: Any = None  # that is recorded
        self.replay: Callable[[], None] | None = None
        # What the graph reads and writes: the tensors of the call that was recorded.
        self.inputs: list[Tensor] = []
        self.outputs: Any = None
        self.gradients: list[Tensor | None] = []

    def __call__(self, function: Callable, *inputs: Any) -> Any:
        given = tensors_of(inputs)
        if not self.is_on or given[0].device.type != self.device_type:
            return function(*inputs)
        form = [(tensor.shape, tensor.dtype) for tensor in given]
        self.form = self.form or form
        if form != self.form:
            return function(*inputs)
        if self.replay is None:
            self.calls += 1
            if self.calls <= WARM_UPS:
                return self._warm_up(lambda: function(*inputs))
            self._record(lambda: function(*inputs), given)
            if self.replay is None:
                return function(*inputs)
        for kept, new in zip(self.inputs, given):
            if kept.data_ptr() != new.data_ptr():  # it is the same for the outputs of a graph
                kept.copy_(new)
        self._replay()
        return self.outputs

    def _warm_up(self, call: Callable[[], Any]) -> Any:
        before = torch.get_rng_state(), random.getstate()
        result = self._on_stream(call)
        if not torch.equal(torch.get_rng_state(), before[0]) or random.getstate() != before[1]:
            self._give_up("it draws random numbers on the host")
        return result

    def _record(self, call: Callable[[], Any], inputs: list[Tensor]) -> None:
        held = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None  # so that gradients are written, not added
        try:
            self.replay, self.outputs = self._capture(call)
        except RuntimeError as error:
            self._give_up(one_line(error).partition(" CUDA kernel errors might")[0])
        self.inputs = inputs
        self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, held):
            parameter.grad = gradient

    def _give_up(self, reason: str) -> None:
        self.is_on = False
        print_once(f"CUDA graphs: {self.what} is launched part by part, for {reason}")

    def _replay(self) -> None:
        """Add the gradients to those that are there."""
        held = [parameter.grad for parameter in self.parameters]
        # Those of the replay before will be written over.
        own = [i for i, (old, new) in enumerate(zip(held, self.gradients))
               if old is not None and old is new]
        if own:
            copies = [torch.empty_like(held[i]) for i in own]
            torch._foreach_copy_(copies, [held[i] for i in own])
            for i, gradient in zip(own, copies):
                held[i] = gradient
        self.replay()
        both = [(old, new) for old, new in zip(held, self.gradients)
                if old is not None and new is not None]
        if both:
            torch._foreach_add_(*map(list, zip(*both)))
        for parameter, old, new in zip(self.parameters, held, self.gradients):
            parameter.grad = new if old is None else old

    def _on_stream(self, call: Callable[[], Any]) -> Any:
        """On the stream that will be recorded: libraries keep workspaces for each stream."""
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def _capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A graph's `replay`, and where it writes what the call gives. Computes nothing yet. Raises
        RuntimeError where CUDA cannot record it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, as a loader's, may meanwhile do what a recording thread must not.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            outputs = call()
        return graph.replay, outputs


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []
