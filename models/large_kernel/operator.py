"""Large depthwise convolutions of one map: one operator, several exact backends.

`depthwise(x, kernels)` gives the "same"-padded depthwise convolution of a map with each of several
kernels, e.g. SLaK's 51 x 5, 5 x 51 and 5 x 5 (Liu et al. 2023, arXiv 2207.03620), and
`depthwise_sum` their sum. Which code computes it is chosen by device, dtype and kernel size:

    conv     forward convolutions of PyTorch in channels-last memory, the gradients too (conv.py)
    banded   matrix products with the Toeplitz matrices of the kernels (banded.py)
    dense    one matrix product per channel, for small maps (dense.py)
    triton   a fused CUDA kernel on matrix units (triton.py)
    torch    plain F.conv2d and its own gradient, in whatever layout the map has

All of them give the same sums up to rounding and accumulate in float32.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.fused import autocast_dtype, is_recorded
from models.large_kernel import banded, conv, dense, triton
from models.large_kernel.layout import to_channels_last
from models.layers import pad_to
from utils.log import print_once
from utils.registry import UserError

BACKENDS = {"conv": conv.BACKEND, "banded": banded.BACKEND, "dense": dense.BACKEND,
            "triton": triton.BACKEND}
CHOICES = ("auto", *BACKENDS, "torch")
OLD_NAMES = {"library": "torch"}
ACCEPTED = (*CHOICES, *OLD_NAMES)  # by the flag --large-kernel

# Smallest long edge for which cuDNN's depthwise kernels are left aside on a GPU; not measured.
LARGE_FOR_CUDNN = 9
# Longest edge of a kernel that no run announces as a large one.
LONGEST_ORDINARY = 9


class LargeKernelModule(nn.Module):
    """A module that calls the operator. `backend` is one of CHOICES; see `set_backend`."""

    backend = "auto"

    def kernels(self) -> list[Tensor]:
        """(C, 1, kh, kw) each."""
        raise NotImplementedError

    def in_any_layout(self, x: Tensor) -> Tensor:
        """What it gives, channels-last or contiguous, whichever costs less."""
        return self(x)


def large_kernel_modules(network: nn.Module) -> list[LargeKernelModule]:
    return [module for module in network.modules() if isinstance(module, LargeKernelModule)]


def set_backend(backend: str, *networks: nn.Module | None) -> None:
    """Let every large kernel of `networks` be computed by `backend`, one of ACCEPTED. Raises
    UserError for another than "auto" where there is none."""
    if backend in OLD_NAMES:
        print_once(f"--large-kernel {backend} is understood as {OLD_NAMES[backend]}.")
        backend = OLD_NAMES[backend]
    modules = [module for network in networks if network is not None
               for module in large_kernel_modules(network)]
    if backend != "auto" and not modules:
        raise UserError(f"--large-kernel {backend} has no effect: no network here has large "
                        "kernels. Leave it out.")
    for module in modules:
        module.backend = backend


def describe_choice(network: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Which backends the large kernels of `network` will get, for the end of a sentence, and why
    not the fused one on a GPU; empty for a network without large kernels. Raises UserError for a
    backend that cannot run there."""
    names = set()
    for module in large_kernel_modules(network):
        small, large = [choose(module.backend, device, dtype, module.kernels(), pixels)
                        for pixels in (dense.LARGEST_MAP, None)]
        if longest_edge(module.kernels()) > LONGEST_ORDINARY:
            names.add(large if small == large else
                      f"{large}, on maps of at most {dense.LARGEST_MAP} pixels by {small}")
    if not names:
        return ""
    text = f", large kernels by {' and '.join(sorted(names))}"
    if device.type == "cuda" and triton.BACKEND.why_not(device):
        text += f" ({triton.BACKEND.why_not(device)})"
    return text


def choose(backend: str, device: torch.device, dtype: torch.dtype,
           kernels: Sequence[Tensor], pixels: int | None = None) -> str:
    """The backend for a map of `dtype` and so many pixels (None: many) on `device`: the one asked
    for, or for "auto", and for "dense" on a large map, the one expected to be fastest. Raises
    UserError for one that cannot run there."""
    if device.type == "meta" or is_recorded():
        return "torch"
    is_small = pixels is not None and pixels <= dense.LARGEST_MAP
    if backend == "auto" or (backend == "dense" and not is_small):
        return fastest(device, dtype, longest_edge(kernels), is_small)
    if backend == "torch":
        return backend
    if backend not in BACKENDS:
        raise UserError(f"unknown large-kernel backend {backend!r}. Known: {', '.join(CHOICES)}.")
    reason = BACKENDS[backend].why_not(device)
    if reason:
        raise UserError(f"--large-kernel {backend} cannot run on {device}: {reason} Use auto.")
    return backend


def fastest(device: torch.device, dtype: torch.dtype, edge: int, is_small: bool) -> str:
    """On a CPU `conv`: PyTorch's forward pass and by far the fastest gradients
    (docs/performance.md). On a GPU matrix products, on small maps in half precision dense ones.
    Elsewhere, and in float64, `torch`."""
    if device.type == "cpu" and dtype != torch.float64:
        return "conv"
    if device.type == "cuda" and edge >= LARGE_FOR_CUDNN and dtype != torch.float64:
        if is_small and dtype != torch.float32:
            return "dense"
        if dtype == torch.float32 or triton.BACKEND.why_not(device):
            return "banded"
        return "triton"
    return "torch"


def longest_edge(kernels: Sequence[Tensor]) -> int:
    return max(max(kernel.shape[2:]) for kernel in kernels)


def depthwise(x: Tensor, kernels: Sequence[Tensor], backend: str = "auto") -> list[Tensor]:
    """The depthwise convolution of x (N, C, H, W) with each kernel (C, 1, kh, kw), odd edges, zeros
    around the map to keep its size; differentiable once in x and the kernels. Under autocast in
    its dtype, as F.conv2d. Kernels may have fewer channels; the map's others give zeros."""
    x = x.to(autocast_dtype(x))
    name = choose(backend, x.device, x.dtype, kernels, x.shape[2] * x.shape[3])
    if name == "torch":
        kernels = [pad_to(kernel.to(x.dtype), x.shape[1]) for kernel in kernels]
        return [F.conv2d(x, kernel, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2),
                         groups=x.shape[1]) for kernel in kernels]
    if not BACKENDS[name].takes_any_kernel:
        kernels = [fitted(kernel, x) for kernel in kernels]
    if torch.compiler.is_compiling():
        return _branches(x, list(kernels), name)
    if not torch.is_grad_enabled():
        return BACKENDS[name].outputs(x, kernels)
    return list(Branches.apply(name, x, *kernels))


def fitted(kernel: Tensor, x: Tensor) -> Tensor:
    """In the dtype and with the channels of x, cut to what it reaches."""
    return cropped(pad_to(kernel.to(x.dtype), x.shape[1]), *x.shape[2:])


class Prepared:
    """What a backend precomputed from kernels that do not change, for every kind of map met: a CUDA
    graph goes on reading it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """To be called when the kernels changed."""
        self.kinds: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}

    def __deepcopy__(self, memo: dict) -> "Prepared":
        return Prepared()

    def of(self, name: str, x: Tensor, kernels: Sequence[Tensor]
           ) -> tuple[list[Tensor], list[Tensor]]:
        """For such a map: the kernels, and what `total` takes beside them."""
        key = (name, x.device, x.dtype, *x.shape[1:])
        if key not in self.kinds:
            kernels = list(kernels)
            if not BACKENDS[name].takes_any_kernel:
                kernels = [fitted(kernel, x).contiguous() for kernel in kernels]
            self.kinds[key] = kernels, BACKENDS[name].prepare(x, kernels)
        return self.kinds[key]


def depthwise_sum(x: Tensor, kernels: Sequence[Tensor], bias: Tensor, prepared: Prepared,
                  backend: str = "auto", *, any_layout: bool = False) -> Tensor:
    """Sum of `depthwise` plus a bias (C,). The kernels must not change between calls with the same
    `prepared`. The backends' is channels-last or, with `any_layout`, contiguous where that is what
    the backend makes."""
    needs_gradient = torch.is_grad_enabled() and (
        any(value.requires_grad for value in (x, bias, *kernels)))
    x = x.to(autocast_dtype(x))
    bias = pad_to(bias.to(x.dtype), x.shape[1])
    name = choose(backend, x.device, x.dtype, kernels, x.shape[2] * x.shape[3])
    if needs_gradient or name == "torch":
        return sum(depthwise(x, kernels, name)) + bias.view(-1, 1, 1)
    kernels, tensors = prepared.of(name, x, kernels)
    total = _total if torch.compiler.is_compiling() else _total_eagerly
    return total(x, kernels, tensors, bias, name, any_layout)


def cropped(kernel: Tensor, height: int, width: int) -> Tensor:
    """The taps that a map of that size can reach: a row of 14 pixels meets 27 of 47."""
    rows, columns = kernel.shape[2:]
    top, left = max(0, rows // 2 - height + 1), max(0, columns // 2 - width + 1)
    return kernel[:, :, top:rows - top, left:columns - left]


class Branches(torch.autograd.Function):
    """The operator called eagerly: a tenth of the host's time of the compiled one's."""

    @staticmethod
    def forward(ctx, name: str, x: Tensor, *kernels: Tensor) -> tuple[Tensor, ...]:
        backend = BACKENDS[name]
        x, matrices = backend.arranged(x), backend.matrices(x, kernels)
        ctx.name, ctx.num_kernels = name, len(kernels)
        ctx.save_for_backward(x, *kernels, *(matrices if backend.keeps_matrices else ()))
        return tuple(backend.outputs(x, kernels, matrices))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple:
        x, *kernels = ctx.saved_tensors
        kernels, matrices = kernels[:ctx.num_kernels], kernels[ctx.num_kernels:]
        of_x, found = BACKENDS[ctx.name].backward(
            x, gradients, kernels, matrices, of_input=ctx.needs_input_grad[1],
            of_kernels=any(ctx.needs_input_grad[2:]))
        if found is None:
            return None, of_x, *[None] * len(kernels)
        return None, of_x, *[gradient.to(kernel.dtype).contiguous()
                             for gradient, kernel in zip(found, kernels)]


# The same as operators of PyTorch's own kind: opaque to torch.compile, which would otherwise trace
# into them.

@torch.library.custom_op("large_kernel::branches", mutates_args=(),
                         schema="(Tensor x, Tensor[] kernels, str name) -> Tensor[]")
def _branches(x: Tensor, kernels: Sequence[Tensor], name: str) -> list[Tensor]:
    return BACKENDS[name].outputs(x, kernels)


@_branches.register_fake
def _(x: Tensor, kernels: Sequence[Tensor], name: str) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=BACKENDS[name].branches_format) for _ in kernels]


@torch.library.custom_op(
    "large_kernel::branches_backward", mutates_args=(),
    schema="(Tensor x, Tensor[] kernels, Tensor[] gradients, str name, bool of_input, "
           "bool of_kernels) -> Tensor[]")
def _branches_backward(x: Tensor, kernels: Sequence[Tensor], gradients: Sequence[Tensor],
                       name: str, of_input: bool, of_kernels: bool) -> list[Tensor]:
    of_x, found = BACKENDS[name].backward(x, gradients, kernels, of_input=of_input,
                                          of_kernels=of_kernels)
    result = [of_x] if of_input else []
    if of_kernels:
        # Cloned: an operator's outputs may not share memory, and these are parts of one tensor.
        result += [gradient.to(kernel.dtype).clone(memory_format=torch.contiguous_format)
                   for gradient, kernel in zip(found, kernels)]
    return result


@_branches_backward.register_fake
def _(x: Tensor, kernels: Sequence[Tensor], gradients: Sequence[Tensor], name: str,
      of_input: bool, of_kernels: bool) -> list[Tensor]:
    result = []
    if of_input:
        result.append(_empty(x, name))
    if of_kernels:
        result += [torch.empty_like(kernel, memory_format=torch.contiguous_format)
                   for kernel in kernels]
    return result


def _keep(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, kernels, ctx.name = inputs
    ctx.save_for_backward(x, *kernels)


def _backward(ctx, gradients: Sequence[Tensor]) -> tuple:
    x, *kernels = ctx.saved_tensors
    of_input, of_kernels = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
    found = _branches_backward(x, kernels, list(gradients), ctx.name, of_input, of_kernels)
    of_x = found.pop(0) if of_input else None
    return of_x, found if of_kernels else [None] * len(kernels), None


_branches.register_autograd(_backward, setup_context=_keep)


def _total_eagerly(x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor], bias: Tensor,
                   name: str, any_layout: bool) -> Tensor:
    y = BACKENDS[name].total(x, kernels, prepared, bias)
    return y if any_layout else to_channels_last(y)


_total = torch.library.custom_op(
    "large_kernel::total", _total_eagerly, mutates_args=(),
    schema="(Tensor x, Tensor[] kernels, Tensor[] prepared, Tensor bias, str name, "
           "bool any_layout) -> Tensor")


@_total.register_fake
def _(x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor], bias: Tensor,
      name: str, any_layout: bool) -> Tensor:
    layout = BACKENDS[name].branches_format if any_layout else torch.channels_last
    return torch.empty_like(x, memory_format=layout)


def _empty(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x, memory_format=BACKENDS[name].memory_format)
