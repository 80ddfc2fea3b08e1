"""Sums of "same"-padded depthwise convolutions on matrix units, forward and backward, in Triton:
the 51x5, 5x51 and 5x5 kernels of SLaK (Liu et al. 2023, arXiv 2207.03620) over one map.

A tall kernel is a sum of matrix products, one per column j of the kernel: out = sum_j T_j @ X_j
with X_j the map moved by j - kw // 2 columns and T_j[h, h'] = k[h' - h + kh // 2, j] a banded
Toeplitz matrix. A wide kernel is the same with rows and columns exchanged. "Long" is the axis along
which the kernel is long and the matrices act, "short" the one along which the map is moved.

Per output element, for those three kernels summed over 56 x 56 maps in 16 bits: 10 shifts x 64 (a
row of T) x 64^2 / 56^2 = 836 multiply-adds on matrix units (the direct sum takes 535 on the others)
and 4 bytes of device memory, 2 read and 2 written. In the time of 4 bytes an H200 does some 370
(4.3 TB/s and 788 TFLOP/s, measured): matrix units and L1 are the limit, not device memory.

Nothing here records a graph, no result depends on the order in which programs run, and every
function raises ValueError for what it cannot compute. Maps (N, C, H, W) are float32 (exact
products), bfloat16 or float16, summed in float32; results are contiguous. Kernels are (C, 1, kh,
kw), odd, of any floating dtype; they are rounded to the map's.
"""
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from models.triton_device import INTERPRETED, Branch, launch_product, launch_sum, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device) -> str | None:
    """None if the functions below run on `device`, else one sentence that says why not."""
    if triton is None:
        return "Triton is not installed."
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return (f"Triton's kernels need a GPU, not the device '{device.type}'; "
                f"TRITON_INTERPRET=1, set before Triton is imported, runs them slowly without one.")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (f"The GPU's compute capability is {capability[0]}.{capability[1]}, and bfloat16 "
                f"matrix products need 8.0.")
    return None


# Kernels as matrices


def block_size(height: int, width: int, dtype: torch.dtype) -> int:
    """Edge of a tile. Exact float32 products run unrolled on the ordinary units; 32 keeps that
    code and its registers small."""
    largest = 32 if dtype == torch.float32 else 64
    return next(block for block in (16, 32, 64) if block >= min(max(height, width), largest))


def geometry(size: tuple[int, int], height: int, width: int, block: int) -> tuple[bool, int, int]:
    """Whether a kernel is tall, how many tiles it reaches to either side on such maps, and by how
    much the line of differences m' - m + offset * block outgrows the kernel at either end
    (negative where the kernel is the larger)."""
    tall, reach = size[0] > size[1], max(size) // 2
    tiles = -(-(height if tall else width) // block)
    away = min(-(-reach // block), tiles - 1)
    return tall, away, (away + 1) * block - 1 - reach


def in_middle(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The kernel zero-padded or cut down to this size around its centre."""
    rows, columns = (size[0] - kernel.shape[2]) // 2, (size[1] - kernel.shape[3]) // 2
    return F.pad(kernel, (columns, columns, rows, rows))


def covering(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Both edges of the smallest kernel that holds all these; tall if all are."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def merged(kernels: Sequence[Tensor]) -> list[Tensor]:
    """One or two kernels with the same sum of convolutions: that of the tall ones, of the others.
    A 5x5 kernel is then free beside a 5x51 one."""
    groups = [[k for k in kernels if (k.shape[2] > k.shape[3]) == tall] for tall in (True, False)]
    return [sum(in_middle(k.float(), covering([k.shape[2:] for k in group])) for k in group)
            for group in groups if group]


def as_branch(kernel: Tensor, height: int, width: int, dtype: torch.dtype) -> Branch:
    block = block_size(height, width, dtype)
    tall, away, margin = geometry(kernel.shape[2:], height, width, block)
    lines = kernel[:, 0].transpose(1, 2) if tall else kernel[:, 0]  # (C, shifts, long edge)
    # Window s of a line is row m = block - 1 - s % block of the tile at offset s // block - away.
    windows = F.pad(lines.to(dtype), (margin, margin)).unfold(2, block, 1)
    blocks = windows.unflatten(2, (2 * away + 1, block)).flip(3)
    return Branch(tall, blocks.transpose(1, 2).contiguous())


def diagonals(blocks: Tensor, margin: int) -> Tensor:
    """(C, shifts, long edge) sums over what `as_branch` makes of the same element of a kernel."""
    block = blocks.shape[-1]
    rows = blocks.permute(0, 2, 3, 1, 4).flatten(3).flip(2)  # (C, shifts, reversed m, (offset, m'))
    # Padded by `block` and read in rows one shorter, row i lies i further right: diagonals align.
    skewed = F.pad(rows, (0, block)).flatten(2)[..., :-block].unflatten(2, (block, -1))
    return F.pad(skewed.sum(2), (-margin, -margin))


@torch.no_grad()
def prepare(kernels: Sequence[Tensor], height: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Toeplitz blocks for `total` on maps of this size and dtype. They do not follow later changes
    of the kernels."""
    return [as_branch(kernel, height, width, dtype).blocks for kernel in merged(kernels)]


def check(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError unless kernels of these shapes can meet the map."""
    if x.dim() != 4 or x.dtype not in DTYPES or x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"expected a map (N, C, H, W) in float32, bfloat16 or float16, got "
                         f"{tuple(x.shape)} in {x.dtype}.")
    for shape in shapes:
        if len(shape) != 4 or shape[:2] != (x.shape[1], 1) or 0 in (shape[2] % 2, shape[3] % 2):
            raise ValueError(f"a map with {x.shape[1]} channels takes kernels ({x.shape[1]}, 1, "
                             f"odd, odd), got {tuple(shape)}.")
    if not shapes:
        raise ValueError("expected at least one kernel, got none.")


def check_pairs(gradients: Sequence[Tensor], kernels: Sequence) -> None:
    if not gradients or len(gradients) != len(kernels):
        raise ValueError(f"expected one gradient for each kernel, got {len(gradients)} gradients "
                         f"for {len(kernels)} kernels.")


# Public functions


@torch.no_grad()
def total(x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor] | None = None,
          bias: Tensor | None = None) -> Tensor:
    """Sum over kernels of the convolutions of x, and of a bias (C,), in one launch. Kernels of one
    orientation are added up (in float32) before they meet the map. `prepared`: what `prepare` made
    for such maps."""
    check(x, [kernel.shape for kernel in kernels])
    blocks = prepare(kernels, *x.shape[2:], x.dtype) if prepared is None else prepared
    talls = sorted({kernel.shape[2] > kernel.shape[3] for kernel in kernels}, reverse=True)
    branches = [Branch(tall, values) for tall, values in zip(talls, blocks)]
    return launch_sum([x.contiguous()] * len(branches), branches, bias=bias)[0]


@torch.no_grad()
def outputs(x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
    """Each convolution of x by itself, in one launch for three kernels."""
    check(x, [kernel.shape for kernel in kernels])
    branches = [as_branch(kernel, *x.shape[2:], x.dtype) for kernel in kernels]
    x = x.contiguous()
    parts = [branches[i:i + 3] for i in range(0, len(branches), 3)]
    return [y for part in parts for y in launch_sum([x] * len(part), part, separate=True)]


@torch.no_grad()
def input_gradient(gradients: Sequence[Tensor], kernels: Sequence[Tensor]) -> Tensor:
    """Gradient of the input from that of each output: the sum of convolutions of gradients[i] with
    kernels[i] turned by 180 degrees. One launch for up to three; the same tensor given several
    times counts as one and is read once."""
    check_pairs(gradients, kernels)
    terms = []
    for gradient in {id(g): g for g in gradients}.values():
        check(gradient, [kernel.shape for kernel in kernels])
        flipped = [k.flip(2, 3) for g, k in zip(gradients, kernels) if g is gradient]
        shape, dtype, values = gradient.shape[2:], gradient.dtype, gradient.contiguous()
        terms += [(values, as_branch(kernel, *shape, dtype)) for kernel in merged(flipped)]
    parts = [zip(*terms[i:i + 3]) for i in range(0, len(terms), 3)]
    return reduce(torch.add, [launch_sum(*part)[0] for part in parts])


@torch.no_grad()
def kernel_gradients(x: Tensor, gradients: Sequence[Tensor],
                     sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Float32 gradients (C, 1, *sizes[i]) of kernels from that of each output. Kernels of one
    orientation with the same tensor as gradient share a launch: the smaller's is the middle of
    the larger's."""
    check_pairs(gradients, sizes)
    x, block, whole = x.contiguous(), block_size(*x.shape[2:], x.dtype), {}
    keys = [(id(gradient), height > width) for gradient, (height, width) in zip(gradients, sizes)]
    for key, gradient in zip(keys, gradients):
        if key not in whole:
            size = covering([size for other, size in zip(keys, sizes) if other == key])
            check(gradient, [(x.shape[1], 1, *size)])
            if gradient.shape != x.shape or gradient.dtype != x.dtype:
                raise ValueError(f"expected gradients like the map, {tuple(x.shape)} in {x.dtype}; "
                                 f"got {tuple(gradient.shape)} in {gradient.dtype}.")
            tall, away, margin = geometry(size, *x.shape[2:], block)
            form = (2 * away + 1, min(size), block)
            lines = diagonals(launch_product(x, gradient.contiguous(), tall, form), margin)
            whole[key] = (lines.transpose(1, 2) if tall else lines).unsqueeze(1)
    return [in_middle(whole[key], size).contiguous() for key, size in zip(keys, sizes)]
