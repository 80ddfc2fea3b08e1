"""Transposed copies at the speed of a copy: between channels-last and contiguous maps, and to and
from the (channel, pixel, image) order of `dense`.

PyTorch's own copy takes 5 to 7 times as long on a GPU (0.33 and 0.23 ms where a copy takes 0.049,
one H200): it reads or writes single elements far apart. Here a program moves a tile of 64 x 64,
reads it along the one axis and writes it along the other.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from models.fused import FLOATS, cdiv, has_kernels, jit, on_device_of, three, tl

TILE = 64  # 64 two-byte elements are a line of 128 bytes of the cache


@jit
def transpose_kernel(out0, out1, out2, x0, x1, x2, bias, x_outers, x_rows, rows, columns, x_outer,
                     x_row, out_outer, out_column, BIAS: tl.constexpr, UNIT: tl.constexpr,
                     TILE: tl.constexpr):
    """out[z, r, c] = x[z, r, c] (+ bias[r]), zero from x_outers and from x_rows on, of the map that
    axis 1 of the grid says: x is dense in c, out in r. The other sizes and strides are in units of
    UNIT elements, which tells the compiler how wide an access may be."""
    out, x = out0, x0
    if tl.program_id(1) == 1:
        out, x = out1, x1
    if tl.program_id(1) == 2:
        out, x = out2, x2
    rows, columns, x_outer, x_row = rows * UNIT, columns * UNIT, x_outer * UNIT, x_row * UNIT
    out_outer, out_column = out_outer * UNIT, out_column * UNIT
    row_tiles, column_tiles = tl.cdiv(rows, TILE), tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    outer = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    row = tile // column_tiles * TILE + tl.arange(0, TILE)
    column = tile % column_tiles * TILE + tl.arange(0, TILE)
    # Maps may pass 2^31 elements.
    value = tl.load(x + outer * x_outer + row.to(tl.int64)[:, None] * x_row + column[None, :],
                    mask=((row < x_rows) & (outer < x_outers))[:, None]
                    & (column < columns)[None, :], other=0.0)
    if BIAS:
        added = tl.load(bias + row, mask=row < x_rows, other=0.0).to(tl.float32)
        value = value.to(tl.float32) + added[:, None]
    tl.store(out + outer * out_outer + row[:, None] + column.to(tl.int64)[None, :] * out_column,
             value.to(out.dtype.element_ty),
             mask=(row < rows)[:, None] & (column < columns)[None, :])


def copy_transposed(outs: Sequence[Tensor], xs: Sequence[Tensor], bias: Tensor | None = None
                    ) -> None:
    """Each of outs (Z or more, R or more, C) becomes its x (Z, R, C), plus bias (R,), and zeros
    behind it. All outs have the same shape and strides, all xs the same shape. Any strides; fast
    where the last axis of x and the middle one of out are dense, and up to three maps of the same
    strides in one launch."""
    x, out = xs[0], outs[0]
    if len(xs) > 3 or any(other.stride() != x.stride() for other in xs):
        for out, x in zip(outs, xs):
            copy_transposed([out], [x], bias)
        return
    if (not has_kernels(x.device) or x.stride(2) != 1 or out.stride(1) != 1 or x.numel() == 0
            or x.dtype not in FLOATS or out.dtype not in FLOATS):
        for out, x in zip(outs, xs):
            if out.shape != x.shape:
                out = out.zero_()[:x.shape[0], :x.shape[1]]
            out.copy_(x if bias is None else x + bias.view(-1, 1))
        return
    outers, rows, columns = out.shape
    sizes = rows, columns, x.stride(0), x.stride(1), out.stride(0), out.stride(2)
    unit = gcd(8, *sizes)
    with on_device_of(x):
        transpose_kernel[(outers * cdiv(rows, TILE) * cdiv(columns, TILE), len(xs))](
            *three(outs), *three(xs), x if bias is None else bias, x.shape[0], x.shape[1],
            *[size // unit for size in sizes], BIAS=bias is not None, UNIT=unit, TILE=TILE,
            num_warps=4)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def to_contiguous(x: Tensor) -> Tensor:
    """x.contiguous() of a map (N, C, H, W)."""
    if x.is_contiguous() or not has_kernels(x.device) or not is_channels_last(x):
        return x.contiguous()
    num_images, channels, height, width = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    copy_transposed([out.view(num_images, channels, height * width).transpose(1, 2)],
                    [x.permute(0, 2, 3, 1).view(num_images, height * width, channels)])
    return out


def to_channels_last(x: Tensor) -> Tensor:
    """x.contiguous(memory_format=torch.channels_last) of a map (N, C, H, W)."""
    if is_channels_last(x) or not has_kernels(x.device) or not x.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    num_images, channels, height, width = x.shape
    out = torch.empty_like(x, memory_format=torch.channels_last)
    copy_transposed(
        [out.permute(0, 2, 3, 1).view(num_images, height * width, channels).transpose(1, 2)],
        [x.view(num_images, channels, height * width)])
    return out
