"""CUDA graphs: the launches of a function recorded once, then handed to the GPU as one.

A training step of a ConvNet is a thousand launches and more. Where the host needs longer to make
them than the GPU to compute them, the GPU waits; a replayed graph costs the host one launch.
"""
import copy
import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.log import print_from_any
from utils.registry import UserError, one_line

# Eager calls before the recording: they make tables, load kernels, and compile what is to be. In
# the last one it is looked at what a graph cannot hold.
WARM_UPS = 3


class Captured:
    """Calls functions; where it `is_on`, a function on a GPU by a CUDA graph from the fourth call.

    `captured(function, *inputs)` is `function(*inputs)`: nested tuples, lists and dictionaries of
    tensors in and out, always the same function of the same networks. Calls of other shapes than
    the first's are eager. What a replayed call gives is overwritten by the next one.

    The function must make the same launches whatever the values. What the host decides in it is
    decided once. If it draws random numbers on the host or waits for the GPU, which is noticed, or
    if the memory is too small for a graph, that is said and all calls are eager.

    `parameters`: those whose gradients the function adds to. A replay adds what the launches would.
    `when_given_up` is called when all calls are eager from then on.
    """

    device_type = "cuda"

    def __init__(self, what: str = "", parameters: Iterable[Tensor] = (), *,
                 is_on: bool = False, when_given_up: Callable[[], None] = lambda: None) -> None:
        self.what, self.is_on, self.when_given_up = what, is_on, when_given_up
        self.parameters = list(parameters)
        self.form: list[tuple] = []  # of the inputs
        self.calls = 0
        self.stream: Any = None  # that is recorded
        self.replay: Callable[[], None] | None = None
        # What the graph reads and writes: the tensors of the call that was recorded.
        self.inputs: list[Tensor] = []
        self.outputs: Any = None
        self.gradients: list[Tensor | None] = []

    def __deepcopy__(self, memo: dict) -> "Captured":
        """Without `when_given_up`, which is about the original."""
        return type(self)(self.what, copy.deepcopy(self.parameters, memo), is_on=self.is_on)

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
            if self.calls < WARM_UPS:
                return self._on_stream(lambda: function(*inputs))
            if self.calls == WARM_UPS:
                return self._last_warm_up(lambda: function(*inputs))
            self._record(lambda: function(*inputs), given)
            if self.replay is None:
                return function(*inputs)
        for kept, new in zip(self.inputs, given):
            if kept.data_ptr() != new.data_ptr():  # it is the same for the outputs of a graph
                kept.copy_(new)
        self._replay()
        return self.outputs

    def _last_warm_up(self, call: Callable[[], Any]) -> Any:
        before = _random_states()
        result, waited = self._watched(call)
        if _random_states() != before:
            self._give_up("it draws random numbers on the host")
        elif waited:
            self._give_up("it waits for the GPU")
        return result

    def _record(self, call: Callable[[], Any], inputs: list[Tensor]) -> None:
        held = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None  # so that gradients are written, not added
        try:
            self.replay, self.outputs = self._capture(call)
            self.inputs = inputs
            self.gradients = [parameter.grad for parameter in self.parameters]
        except torch.OutOfMemoryError:
            self._give_up("the GPU's memory is too small for a graph beside the rest")
        except RuntimeError as error:  # after which CUDA is not to be relied on
            raise UserError(f"{self.what} cannot be recorded as a CUDA graph "
                            f"({one_line(error.__context__ or error)[:300]}). Set "
                            "--no-cuda-graphs.") from error
        finally:
            for parameter, gradient in zip(self.parameters, held):
                parameter.grad = gradient

    def _give_up(self, reason: str) -> None:
        self.is_on = False
        self.when_given_up()
        print_from_any(f"CUDA graphs: {self.what} is launched eagerly, for {reason}")

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

    def _watched(self, call: Callable[[], Any]) -> tuple[Any, bool]:
        """What the call gives, and whether it made the host wait for the GPU."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self._on_stream(call)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = ["synchronizing CUDA op" in str(one.message) for one in told]
        for one, is_of_ours in zip(told, waits):
            if not is_of_ours:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return result, any(waits)

    def _capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A graph's `replay`, and where it writes what the call gives. Computes nothing yet."""
        graph = torch.cuda.CUDAGraph()
        # A recording that fails would leave its stream the current one. Other threads, as a
        # loader's, may meanwhile do what the recording one must not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(
                graph, stream=self.stream, capture_error_mode="thread_local"):
            outputs = call()
        return graph.replay, outputs


def _random_states() -> tuple:
    """Of the host's generators, to be compared."""
    _, numbers, place, *_ = np.random.get_state()
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), numbers.tobytes(), place)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []
