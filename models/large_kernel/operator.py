"""Large depthwise convolutions of one map: one operator, several exact implementations.

`depthwise(x, kernels)` gives the "same"-padded depthwise convolution of a map with each of several
kernels, e.g. SLaK's 51 x 5, 5 x 51 and 5 x 5 (Liu et al. 2023, arXiv 2207.03620), and
`depthwise_sum` their sum. Which code computes it is chosen by device, dtype and kernel size:

    conv     forward convolutions of the library in channels-last memory, the gradients too
    banded   matrix products with the Toeplitz matrices of the kernels (models/banded.py)
    triton   a fused CUDA kernel on matrix units (models/triton.py)
    library  F.conv2d and its own gradient, in whatever layout the map has

All of them give the same sums up to rounding and accumulate in float32.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.large_kernel import banded, conv, triton
from utils.registry import UserError

# Smallest long edge for which cuDNN's depthwise kernels are left aside on a GPU; not measured.
LARGE_FOR_CUDNN = 9


class Backend(NamedTuple):
    """Functions on a map (N, C, H, W) and kernels (C, 1, kh, kw), cut to the map's reach."""

    why_not: Callable[[torch.device], str | None]  # None: runs there; else a sentence
    prepare: Callable  # (kernels, height, width, dtype) -> tensors that a frozen network keeps
    total: Callable  # (x, kernels, prepared, bias) -> sum of the convolutions
    outputs: Callable  # (x, kernels) -> a map per kernel
    input_gradient: Callable  # (a gradient per kernel, kernels) -> gradient of x
    kernel_gradients: Callable  # (x, a gradient per kernel, sizes) -> a gradient per kernel
    memory_format: torch.memory_format  # of every map that it gives


BACKENDS = {
    "conv": Backend(
        conv.why_not, conv.prepare, conv.total, conv.outputs,
        conv.input_gradient, conv.kernel_gradients, torch.channels_last),
    "banded": Backend(
        banded.why_not, banded.prepare, banded.total, banded.outputs, banded.input_gradient,
        banded.kernel_gradients, torch.channels_last),
    "triton": Backend(
        triton.why_not, triton.prepare, triton.total,
        triton.outputs, triton.input_gradient, triton.kernel_gradients,
        torch.contiguous_format),
}
CHOICES = ("auto", *BACKENDS, "library")


class LargeKernelModule(nn.Module):
    """A module that calls the operator. `implementation` is one of CHOICES; see `use`."""

    implementation = "auto"

    def kernels(self) -> list[Tensor]:
        """(C, 1, kh, kw) each."""
        raise NotImplementedError


def use(implementation: str, *networks: nn.Module | None) -> None:
    """Let every large kernel of `networks` be computed by `implementation`. Raises UserError for
    another than "auto" where there is none."""
    found = [module for network in networks if network is not None
             for module in network.modules() if isinstance(module, LargeKernelModule)]
    if implementation != "auto" and not found:
        raise UserError(f"--large-kernel {implementation} has no effect: no network here has large "
                        "kernels. Leave it out.")
    for module in found:
        module.implementation = implementation


def describe_choice(network: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Which implementations the large kernels of `network` will get, for the end of a sentence, and
    why not the fused one on a GPU; empty for a network without large kernels."""
    modules = [module for module in network.modules() if isinstance(module, LargeKernelModule)]
    names = sorted({choose(module.implementation, device, dtype, module.kernels())
                    for module in modules})
    if not names:
        return ""
    reason = triton.why_not(device) if device.type == "cuda" else None
    return f", large kernels by {' and '.join(names)}" + (f" ({reason})" if reason else "")


def choose(implementation: str, device: torch.device, dtype: torch.dtype,
           kernels: Sequence[Tensor]) -> str:
    """The implementation for a map of `dtype` on `device`: the one asked for, or for "auto" the one
    expected to be fastest. Raises UserError for one that cannot run there."""
    if device.type == "meta":
        return "library"
    if implementation == "auto":
        return _automatic(device, dtype, max(max(kernel.shape[2:]) for kernel in kernels))
    if implementation == "library":
        return implementation
    if implementation not in BACKENDS:
        raise UserError(f"unknown large-kernel implementation {implementation!r}. Known: "
                        f"{', '.join(CHOICES)}.")
    reason = BACKENDS[implementation].why_not(device)
    if reason:
        raise UserError(f"--large-kernel {implementation} cannot run on {device}: {reason} Use "
                        "auto.")
    return implementation


def _automatic(device: torch.device, dtype: torch.dtype, edge: int) -> str:
    """On a CPU `conv`: the library's forward pass and by far the fastest gradients
    (docs/performance.md). On a GPU matrix products. Elsewhere, and in float64, the library."""
    if device.type == "cpu" and dtype != torch.float64:
        return "conv"
    if device.type == "cuda" and edge >= LARGE_FOR_CUDNN and dtype != torch.float64:
        has_triton = dtype != torch.float32 and not triton.why_not(device)
        return "triton" if has_triton else "banded"
    return "library"


def depthwise(x: Tensor, kernels: Sequence[Tensor], implementation: str = "auto") -> list[Tensor]:
    """The depthwise convolution of x (N, C, H, W) with each kernel (C, 1, kh, kw), odd edges, zeros
    around the map to keep its size; differentiable once in x and the kernels. Under autocast in
    its dtype, as F.conv2d."""
    x, kernels = _cast(x, kernels)
    name = choose(implementation, x.device, x.dtype, kernels)
    if name == "library":
        return [_library(x, kernel) for kernel in kernels]
    return _branches(x, [cropped(kernel, *x.shape[2:]) for kernel in kernels], name)


class Prepared:
    """What an implementation precomputed from kernels that do not change, for the latest kind of
    map."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """To be called when the kernels changed."""
        self.key: tuple = ()
        self.kernels: list[Tensor] = []
        self.tensors: list[Tensor] = []

    def __deepcopy__(self, memo: dict) -> "Prepared":
        return Prepared()

    def update(self, name: str, x: Tensor, kernels: Sequence[Tensor]) -> None:
        """Prepare for such a map unless that is done."""
        key = (name, x.device, x.dtype, *x.shape[2:])
        if key != self.key:
            self.kernels = [cropped(kernel, *x.shape[2:]).to(x.dtype).contiguous()
                            for kernel in kernels]
            self.tensors = BACKENDS[name].prepare(self.kernels, *x.shape[2:], x.dtype)
            self.key = key


def depthwise_sum(x: Tensor, kernels: Sequence[Tensor], bias: Tensor, prepared: Prepared,
                  implementation: str = "auto") -> Tensor:
    """Sum of `depthwise` plus a bias (C,). The kernels must not change between calls with the same
    `prepared`."""
    needs_gradient = torch.is_grad_enabled() and (
        any(value.requires_grad for value in (x, bias, *kernels)))
    x, (bias,) = _cast(x, [bias])
    name = choose(implementation, x.device, x.dtype, kernels)
    if needs_gradient or name == "library":
        total = sum(depthwise(x, kernels, name))
        return total + bias.view(-1, 1, 1)
    prepared.update(name, x, kernels)
    return _total(x, prepared.kernels, prepared.tensors, bias, name)


def cropped(kernel: Tensor, height: int, width: int) -> Tensor:
    """The taps that a map of that size can reach: a row of 14 pixels meets 27 of 47."""
    rows, columns = kernel.shape[2:]
    top, left = max(0, rows // 2 - height + 1), max(0, columns // 2 - width + 1)
    return kernel[:, :, top:rows - top, left:columns - left]


def _library(x: Tensor, kernel: Tensor) -> Tensor:
    padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    return F.conv2d(x, kernel, padding=padding, groups=x.shape[1])


def _cast(x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """To the dtype of autocast where it is on, else the others to that of x."""
    dtype = x.dtype
    if (x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
            and dtype != torch.float64):
        dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), [other.to(dtype) for other in others]


# Operators of PyTorch's own kind: opaque to torch.compile, which would otherwise trace into them.

@torch.library.custom_op("large_kernel::branches", mutates_args=(),
                         schema="(Tensor x, Tensor[] kernels, str name) -> Tensor[]")
def _branches(x: Tensor, kernels: Sequence[Tensor], name: str) -> list[Tensor]:
    return BACKENDS[name].outputs(x, kernels)


@_branches.register_fake
def _(x: Tensor, kernels: Sequence[Tensor], name: str) -> list[Tensor]:
    return [_empty(x, name) for _ in kernels]


@torch.library.custom_op(
    "large_kernel::branches_backward", mutates_args=(),
    schema="(Tensor x, Tensor[] kernels, Tensor[] gradients, str name, bool of_input, "
           "bool of_kernels) -> Tensor[]")
def _branches_backward(x: Tensor, kernels: Sequence[Tensor], gradients: Sequence[Tensor],
                       name: str, of_input: bool, of_kernels: bool) -> list[Tensor]:
    found = BACKENDS[name]
    result = [found.input_gradient(gradients, kernels)] if of_input else []
    if of_kernels:
        sizes = [tuple(kernel.shape[2:]) for kernel in kernels]
        result += [gradient.to(x.dtype).contiguous()
                   for gradient in found.kernel_gradients(x, gradients, sizes)]
    return result


@_branches_backward.register_fake
def _(x: Tensor, kernels: Sequence[Tensor], gradients: Sequence[Tensor], name: str,
      of_input: bool, of_kernels: bool) -> list[Tensor]:
    return [_empty(x, name)] * of_input + [torch.empty(k.shape, dtype=x.dtype, device=x.device)
                                           for k in kernels] * of_kernels


def _keep(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, kernels, ctx.name = inputs
    ctx.save_for_backward(x, *kernels)


def _backward(ctx, gradients: Sequence[Tensor]) -> tuple:
    x, *kernels = ctx.saved_tensors
    of_input, of_kernels = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
    found = _branches_backward(x, kernels, list(gradients), ctx.name, of_input, of_kernels)
    return (found.pop(0) if of_input else None), (found or [None] * len(kernels)), None


_branches.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op(
    "large_kernel::total", mutates_args=(),
    schema="(Tensor x, Tensor[] kernels, Tensor[] prepared, Tensor bias, str name) -> Tensor")
def _total(x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor], bias: Tensor,
           name: str) -> Tensor:
    return BACKENDS[name].total(x, kernels, prepared, bias)


@_total.register_fake
def _(x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor], bias: Tensor,
      name: str) -> Tensor:
    return _empty(x, name)


def _empty(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x, memory_format=BACKENDS[name].memory_format)
