"""What stands beside the products of a ConvNeXt block in training, in Triton, one pass of memory
each way: the bias and the exact GELU after the first product; the bias, the layer scale, stochastic
depth and the residual addition after the last.

Both products are given without their biases, whose gradients the backward passes here add up: a
program keeps float32 sums of its rows' columns in registers and writes them once. No result depends
on the order in which programs run.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.fused import (
    FLOATS,
    autocast_dtype,
    cdiv,
    has_kernels,
    is_traced,
    jit,
    multiprocessors,
    next_power_of_2,
    on_device_of,
    tl,
)
from models.fused.gelu import gelu, gelu_slope

# Of each kernel: the columns and the elements of a tile, and where a program takes one tile after
# another how many programs share a multiprocessor: each gives one row of partial sums.
GELU = dict(columns=256, elements=4096, num_warps=4)
GELU_BACKWARD = dict(columns=128, elements=1024, num_warps=2, programs=16)
ADD = dict(columns=128, elements=1024, num_warps=4)
ADD_BACKWARD = dict(columns=256, elements=2048, num_warps=4, programs=5)


# On the device. A tile is (rows, columns) of a matrix with C columns in memory, of which the first
# WIDTH are own and the others zeros.


@jit
def _columns(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's columns, its number among the programs with the same columns, and how many
    those are. Programs that run together share rows."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    return (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C),
            tl.program_id(0) // BLOCKS, tl.num_programs(0) // BLOCKS)


@jit
def _tile(number, column, num_rows, C: tl.constexpr, ROWS: tl.constexpr):
    """The rows of a tile, the places of its elements and which exist. Maps may pass 2^31."""
    row = number * ROWS + tl.arange(0, ROWS)
    return (row, row.to(tl.int64)[:, None] * C + column[None, :],
            (row < num_rows)[:, None] & (column < C)[None, :])


@jit
def _load(x, place, exists):
    return tl.load(x + place, mask=exists, other=0.0).to(tl.float32)


@jit
def _own(values, column, WIDTH: tl.constexpr):
    """Of a parameter (WIDTH,), 0 behind it, as a row."""
    return _load(values, column, column < WIDTH)[None, :]


@jit(do_not_specialize=["num_rows"])  # compiled once for any batch
def gelu_kernel(out, h, bias, num_rows, WIDTH: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
                BLOCK_C: tl.constexpr):
    column, number, _ = _columns(C, BLOCK_C)
    _, place, exists = _tile(number, column, num_rows, C, ROWS)
    x = _load(h, place, exists) + _own(bias, column, WIDTH)
    tl.store(out + place, gelu(x).to(out.dtype.element_ty), mask=exists)


@jit(do_not_specialize=["num_rows"])
def gelu_backward_kernel(out, sums, gradient, h, bias, num_rows, WIDTH: tl.constexpr,
                         C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The gradient of h, and in sums (programs, WIDTH) its columns' sums: that of the bias."""
    column, first, step = _columns(C, BLOCK_C)
    shift = _own(bias, column, WIDTH)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for number in range(first, tl.cdiv(num_rows, ROWS), step):
        _, place, exists = _tile(number, column, num_rows, C, ROWS)
        x = _load(h, place, exists) + shift
        found = _load(gradient, place, exists) * gelu_slope(x)
        if WIDTH < C:
            found = tl.where((column < WIDTH)[None, :], found, 0.0)
        total += found
        tl.store(out + place, found.to(out.dtype.element_ty), mask=exists)
    tl.store(sums + first * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)


@jit
def _factor(gamma, column, WIDTH: tl.constexpr, SCALED: tl.constexpr):
    """Of the branch's columns, 0 behind the own ones."""
    if SCALED:
        return _own(gamma, column, WIDTH)
    return (column < WIDTH)[None, :].to(tl.float32)


@jit
def _share(kept, scale, row, num_rows, PIXELS: tl.constexpr):
    """The factor of each row's branch, (ROWS, 1): 0 where its image drops the branch."""
    is_kept = tl.load(kept + row // PIXELS, mask=row < num_rows, other=0)
    return tl.where(is_kept != 0, scale, 0.0)[:, None]


@jit(do_not_specialize=["num_rows"])
def add_kernel(out, x, y, bias, gamma, kept, scale, num_rows, WIDTH: tl.constexpr,
               PIXELS: tl.constexpr, SCALED: tl.constexpr, DROPS: tl.constexpr, C: tl.constexpr,
               ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    column, number, _ = _columns(C, BLOCK_C)
    row, place, exists = _tile(number, column, num_rows, C, ROWS)
    branch = ((_load(y, place, exists) + _own(bias, column, WIDTH))
              * _factor(gamma, column, WIDTH, SCALED))
    if DROPS:
        branch *= _share(kept, scale, row, num_rows, PIXELS)
    tl.store(out + place, (_load(x, place, exists) + branch).to(out.dtype.element_ty), mask=exists)


@jit(do_not_specialize=["num_rows"])
def add_backward_kernel(out, sums, gradient, y, bias, gamma, kept, scale, num_rows,
                        WIDTH: tl.constexpr, PIXELS: tl.constexpr, SCALED: tl.constexpr,
                        DROPS: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
                        BLOCK_C: tl.constexpr):
    """The gradient of y; in sums (programs, 1 + SCALED, WIDTH) those of bias and gamma by this
    program's rows."""
    column, first, step = _columns(C, BLOCK_C)
    shift, factor = _own(bias, column, WIDTH), _factor(gamma, column, WIDTH, SCALED)
    of_bias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    of_gamma = of_bias
    for number in range(first, tl.cdiv(num_rows, ROWS), step):
        row, place, exists = _tile(number, column, num_rows, C, ROWS)
        given = _load(gradient, place, exists)
        if DROPS:
            given *= _share(kept, scale, row, num_rows, PIXELS)
        if SCALED:
            of_gamma += given * (_load(y, place, exists) + shift)
        given *= factor
        of_bias += given
        tl.store(out + place, given.to(out.dtype.element_ty), mask=exists)
    sums += first * ((1 + SCALED) * WIDTH) + column
    tl.store(sums, tl.sum(of_bias, 0), mask=column < WIDTH)
    if SCALED:
        tl.store(sums + WIDTH, tl.sum(of_gamma, 0), mask=column < WIDTH)


# Launches


def tiling(x: Tensor, *, columns: int, elements: int, num_warps: int,
           programs: int | None = None) -> tuple[dict[str, int], int, int]:
    """For the rows (..., C) of x: what every kernel wants to know, how many programs share its
    columns, and how many there are in all. `programs`: on a multiprocessor; None: one a tile."""
    channels = x.shape[-1]
    block = min(columns, next_power_of_2(channels))
    form = dict(C=channels, ROWS=max(1, elements // block), BLOCK_C=block, num_warps=num_warps)
    blocks, number = cdiv(channels, block), cdiv(x.numel() // channels, form["ROWS"])
    if programs is not None:
        number = min(number, max(1, programs * multiprocessors(x) // blocks))
    return form, number, number * blocks


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, bias: Tensor) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h, bias)
        out = torch.empty_like(h)
        form, _, programs = tiling(h, **GELU)
        if programs:
            with on_device_of(h):
                gelu_kernel[(programs,)](out, h, bias, h.numel() // h.shape[-1], WIDTH=len(bias),
                                         **form)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        h, bias = ctx.saved_tensors
        out = torch.empty_like(h)
        form, rows, programs = tiling(h, **GELU_BACKWARD)
        sums = h.new_empty((rows, len(bias)), dtype=torch.float32)
        if programs:
            with on_device_of(h):
                gelu_backward_kernel[(programs,)](
                    out, sums, gradient.contiguous(), h, bias, h.numel() // h.shape[-1],
                    WIDTH=len(bias), **form)
        return out, sums.sum(0).to(bias.dtype)


def bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """GELU(h + bias) of (..., C), in the dtype of h; bias (width,), width at most C. What h holds
    behind its first `width` columns are zeros, and so is what is given. Where `can_fuse`."""
    return _BiasGelu.apply(h, bias)


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, bias: Tensor, gamma: Tensor | None,
                kept: Tensor | None, scale: float) -> Tensor:
        y, x = y.contiguous(), x.contiguous(memory_format=torch.channels_last)
        dtype = torch.promote_types(x.dtype, y.dtype)
        if gamma is not None:
            dtype = torch.promote_types(dtype, gamma.dtype)
        ctx.x_dtype, ctx.y_dtype, ctx.scale = x.dtype, y.dtype, scale
        ctx.save_for_backward(None if gamma is None else y, bias, gamma, kept)
        out = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
        form, _, programs = tiling(y, **ADD)
        if programs:
            with on_device_of(x):
                add_kernel[(programs,)](out, x, y, *_branch(y, bias, gamma, kept, scale), **form)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, bias, gamma, kept = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        rows = gradient.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C), free
        out = torch.empty_like(rows, dtype=ctx.y_dtype, memory_format=torch.contiguous_format)
        form, number, programs = tiling(rows, **ADD_BACKWARD)
        sums = rows.new_empty((number, 1 if gamma is None else 2, len(bias)), dtype=torch.float32)
        if programs:
            with on_device_of(rows):
                add_backward_kernel[(programs,)](
                    out, sums, gradient, out if y is None else y,
                    *_branch(rows, bias, gamma, kept, ctx.scale), **form)
        of_bias, *of_gamma = sums.sum(0).unbind()
        return (gradient.to(ctx.x_dtype), out, of_bias.to(bias.dtype),
                of_gamma[0].to(gamma.dtype) if of_gamma else None, None, None)


def _branch(y: Tensor, bias: Tensor, gamma: Tensor | None, kept: Tensor | None,
            scale: float) -> tuple:
    """What the kernels take of the branch beside the maps."""
    images, height, width, channels = y.shape
    return (bias, bias if gamma is None else gamma, bias if kept is None else kept, scale,
            images * height * width, len(bias), height * width, gamma is not None, kept is not None)


def add_branch(x: Tensor, y: Tensor, bias: Tensor, gamma: Tensor | None, kept: Tensor | None,
               keep_prob: float) -> Tensor:
    """x + kept / keep_prob * gamma * (y + bias): x (N, C, H, W), channels-last, y (N, H, W, C),
    bias and gamma (width,), width at most C, behind which y holds zeros. gamma None: 1. `kept`
    (N, ...), bool: whose branches stay; None: all, unscaled. Float32 inside; in the widest dtype of
    x, y and gamma. Where `can_fuse`."""
    return _AddBranch.apply(x, y, bias, gamma, kept, 1 / keep_prob)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_x: Tensor, of_cast: Tensor) -> tuple[Tensor, None]:
        return of_x + of_cast, None  # one pass, where a cast of the second would be another


def fork(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, and x in autocast's dtype for the branch that begins here."""
    dtype = autocast_dtype(x)
    return (x, x) if dtype == x.dtype else _Fork.apply(x, dtype)


def can_fuse(x: Tensor) -> bool:
    """Whether the above is for a block whose input is x (N, C, H, W), in rows of 16 bytes."""
    return (not is_traced() and torch.is_grad_enabled() and x.requires_grad
            and x.dtype in FLOATS and has_kernels(x.device)
            and x.shape[1] % 8 == 0 and x.is_contiguous(memory_format=torch.channels_last))
