"""Layers, and groups of layers, as GPU kernels in Triton. What a kernel does not take, or what is
recorded for other programs, is left to PyTorch's layers, as everything is on a CPU.

Tiles and limits were chosen by single trials on an H100 or H200, which no command repeats."""
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # optional; plain layers run without it
    triton = tl = None


def jit(function=None, **options):
    """triton.jit, or without Triton nothing."""
    if triton is None:
        return (lambda function: function) if function is None else function
    return triton.jit(function, **options)


@jit
def _nothing():
    pass


HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)

# TRITON_INTERPRET=1, set before Triton is imported, runs kernels slowly on a CPU.
INTERPRETED = triton is not None and not isinstance(_nothing, triton.JITFunction)
_IS_INTERPRETED = triton and tl.constexpr(INTERPRETED)  # as kernels may read it


@jit
def dot(left, right, acc):
    """left @ right + acc on matrix units; in float32 exact products."""
    if _IS_INTERPRETED:  # Triton 3.9's interpreter would multiply the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there, bfloat16 included: compute capability 8.0."""
    if triton is None:
        return False
    if device.type != "cuda":
        return INTERPRETED and device.type == "cpu"
    return _properties(device).major >= 8


@lru_cache(maxsize=64)
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that x lies on; elsewhere 1."""
    return _properties(x.device).multi_processor_count if x.is_cuda else 1


def autocast_dtype(x: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of x."""
    device = x.device.type
    is_on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on and x.dtype != torch.float64 else x.dtype


def is_recorded() -> bool:
    """Whether torch.export or the tracer, not the user, calls: what is recorded for other programs
    must hold ordinary layers, none of ours. An export with strict=True is taken for torch.compile:
    `torch.compiler.is_exporting` cannot tell them apart in every version."""
    is_exported = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return is_exported or torch.jit.is_tracing()


def is_traced() -> bool:
    """Whether torch.compile, which joins ordinary layers by itself, torch.export or the tracer
    calls."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


# Launches. A launch costs the host 20 to 70 microseconds: what surrounds it should cost little.


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up; Triton's own takes 5 microseconds."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def three(values: Sequence) -> list:
    """Up to three values, the last one repeated: Triton 3.2 takes no tuple of pointers."""
    return [*values, *[values[-1]] * (3 - len(values))]


_HERE = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager:
    """In which kernels for x are launched: Triton takes the current GPU."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


# Operators


def flat(values: Sequence) -> list:
    """The values, and those of the sequences among them."""
    return [part for value in values
            for part in (value if isinstance(value, (list, tuple)) else (value,))]


def differentiable(forward: tuple[Callable, Callable], gradient: tuple[Callable, Callable],
                   keep: Callable, backward: Callable) -> Callable:
    """A function, once differentiable. `forward` and `gradient` are pairs of a custom operator and
    of the plain function behind it. torch.compile and tracers, which would otherwise look into
    these functions, get the operators; calls from Python do without them, for each costs the host
    up to 0.3 ms.

    `keep(ctx, inputs, output)` and `backward(gradient, ctx, *gradients)` are those of
    `register_autograd`, the latter with the one of the pair `gradient` that it is to call."""
    operator, function = forward
    operator.register_autograd(partial(backward, gradient[0]), setup_context=keep)

    # Autograd must see every tensor, so `values` are the inputs one by one, and in the end all of
    # them as they were given.
    def forward_of_all(ctx, *values):
        output = function(*values[-1])
        keep(ctx, values[-1], output)
        return output

    def backward_of_all(ctx, *gradients):
        return *flat(backward(gradient[1], ctx, *gradients)), None

    name = "fused_" + function.__name__.strip("_")
    graph = type(name, (torch.autograd.Function,), dict(
        forward=staticmethod(forward_of_all),
        backward=staticmethod(once_differentiable(backward_of_all))))

    def call(*inputs):
        if is_traced():
            return operator(*inputs)
        values = flat(inputs)
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad
                                           for value in values):
            return graph.apply(*values, inputs)
        return function(*inputs)

    return call
