"""Max pooling of channels-last maps in Triton, forward and backward: windows of k x k pixels, of
which those outside the map count for nothing, as nn.MaxPool2d.

PyTorch keeps eight bytes for each value taken, where it stood, and reads them for every window that
a pixel lies in. Here it is one byte, the number of the pixel within its window, and each pass moves
little more than its maps. No result depends on the order in which programs run.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.fused import (
    FLOATS,
    cdiv,
    has_kernels,
    is_traced,
    jit,
    next_power_of_2,
    on_device_of,
    tl,
)

LARGEST = 15  # pixels of a window's edge: their numbers must fit into a byte
POSITIONS, CHANNELS = 64, 32  # of a program's tile


# On the device. A tile is (positions, channels); a position is a pixel of an image of the batch.

@jit
def _place(num_positions, WIDTH: tl.constexpr, AREA: tl.constexpr, C: tl.constexpr,
           BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's positions, their images, rows and columns, its channels, and which exist."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    position = (tl.program_id(0) // BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    channel = (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    within = position % AREA
    return (position.to(tl.int64), position // AREA, within // WIDTH, within % WIDTH, channel,
            (position < num_positions) & (channel < C))


@jit(do_not_specialize=["num_positions"])  # compiled once for any batch
def forward_kernel(out, taken, x, num_positions, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
                   OUT_H: tl.constexpr, OUT_W: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
                   PADDING: tl.constexpr, STORES: tl.constexpr, BLOCK_P: tl.constexpr,
                   BLOCK_C: tl.constexpr):
    """One tile of out and, if STORES, of taken (N, OUT_H, OUT_W, C), from x (N, H, W, C)."""
    position, image, row, column, channel, exists = _place(
        num_positions, OUT_W, OUT_H * OUT_W, C, BLOCK_P, BLOCK_C)
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    number = tl.full((BLOCK_P, BLOCK_C), 255, tl.int32)  # none yet
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            h, w = row * STRIDE - PADDING + i, column * STRIDE - PADDING + j
            inside = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            start = (image.to(tl.int64) * (H * W) + h * W + w) * C
            value = tl.load(x + start + channel, mask=inside, other=0.0).to(tl.float32)
            # The first of equal ones, and NaN before all, as in PyTorch.
            better = inside & ((value > best) | (value != value) | (number == 255))
            best, number = tl.where(better, value, best), tl.where(better, i * K + j, number)
    tl.store(out + position * C + channel, best.to(out.dtype.element_ty), mask=exists)
    if STORES:
        tl.store(taken + position * C + channel, number.to(tl.uint8), mask=exists)


@jit(do_not_specialize=["num_positions"])  # compiled once for any batch
def backward_kernel(out, gradient, taken, num_positions, C: tl.constexpr, H: tl.constexpr,
                    W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr, K: tl.constexpr,
                    STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK_P: tl.constexpr,
                    BLOCK_C: tl.constexpr):
    """One tile of out (N, H, W, C): the gradients of the windows that took the pixel."""
    position, image, row, column, channel, exists = _place(num_positions, W, H * W, C, BLOCK_P,
                                                           BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for a in tl.static_range((K + STRIDE - 1) // STRIDE):
        for b in tl.static_range((K + STRIDE - 1) // STRIDE):
            h, w = (row + PADDING) // STRIDE - a, (column + PADDING) // STRIDE - b
            i, j = row + PADDING - h * STRIDE, column + PADDING - w * STRIDE
            inside = (exists & (h >= 0) & (h < OUT_H) & (w >= 0) & (w < OUT_W) & (i < K) & (j < K))
            start = (image.to(tl.int64) * (OUT_H * OUT_W) + h * OUT_W + w) * C + channel
            number = tl.load(taken + start, mask=inside, other=255).to(tl.int32)
            value = tl.load(gradient + start, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(number == i * K + j, value, 0.0)
    tl.store(out + position * C + channel, total.to(out.dtype.element_ty), mask=exists)


# On the host


def forms(maps: Tensor, x_shape: torch.Size, out_shape: torch.Size, window: tuple[int, int, int]
          ) -> tuple[int, int, dict[str, int]]:
    """Of a kernel over the positions of `maps`: its programs, these positions, and the rest."""
    block = min(CHANNELS, next_power_of_2(x_shape[1]))
    num_positions = maps.numel() // x_shape[1]
    return cdiv(num_positions, POSITIONS) * cdiv(x_shape[1], block), num_positions, dict(
        C=x_shape[1], H=x_shape[2], W=x_shape[3], OUT_H=out_shape[2], OUT_W=out_shape[3],
        K=window[0], STRIDE=window[1], PADDING=window[2], BLOCK_P=POSITIONS, BLOCK_C=block,
        num_warps=4)


def pooled(x: Tensor, *window: int, keeps: bool = False) -> tuple[Tensor, Tensor]:
    """The maxima and, if it `keeps` them, where they stood in their windows."""
    kernel_size, stride, padding = window
    height, width = [(size + 2 * padding - kernel_size) // stride + 1 for size in x.shape[2:]]
    out = torch.empty((len(x), x.shape[1], height, width), dtype=x.dtype, device=x.device,
                      memory_format=torch.channels_last)
    taken = torch.empty_like(out, dtype=torch.uint8) if keeps else out
    programs, num_positions, form = forms(out, x.shape, out.shape, window)
    if programs:
        with on_device_of(x):
            forward_kernel[(programs,)](out, taken, x, num_positions, STORES=keeps, **form)
    return out, taken


class MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *window: int) -> Tensor:
        out, taken = pooled(x, *window, keeps=True)
        ctx.save_for_backward(taken)
        ctx.shape, ctx.window = x.shape, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        taken, = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        out = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device,
                          memory_format=torch.channels_last)
        programs, num_positions, form = forms(out, ctx.shape, gradient.shape, ctx.window)
        if programs:
            with on_device_of(out):
                backward_kernel[(programs,)](out, gradient, taken, num_positions, **form)
        return out, None, None, None


def max_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """F.max_pool2d(x, kernel_size, stride, padding) of (N, C, H, W); differentiable once where a
    kernel computes it, which is on a GPU for channels-last maps."""
    if (x.dtype in FLOATS and has_kernels(x.device) and kernel_size <= LARGEST
            and x.is_contiguous(memory_format=torch.channels_last)
            and 2 * padding <= kernel_size <= min(x.shape[2:]) + 2 * padding
            and not is_traced()):
        if torch.is_grad_enabled() and x.requires_grad:
            return MaxPool.apply(x, kernel_size, stride, padding)
        return pooled(x, kernel_size, stride, padding)[0]
    return F.max_pool2d(x, kernel_size, stride, padding)
