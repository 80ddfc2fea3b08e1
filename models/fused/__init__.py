"""Layers as single GPU kernels in Triton, each beside the plain PyTorch layer that it equals."""
import torch
from torch import Tensor

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


# TRITON_INTERPRET=1, set before Triton is imported, runs kernels slowly on a CPU.
INTERPRETED = triton is not None and not isinstance(_nothing, triton.JITFunction)


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there, bfloat16 included: compute capability 8.0."""
    if triton is None:
        return False
    if device.type != "cuda":
        return INTERPRETED and device.type == "cpu"
    return torch.cuda.get_device_capability(device) >= (8, 0)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of x."""
    device = x.device.type
    is_on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on and x.dtype != torch.float64 else x.dtype
