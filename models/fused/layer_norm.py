"""LayerNorm over the last axis in Triton, forward and backward, in one pass of memory each.

Rows are of bfloat16, float16 or float32; means and variances are float32 ones of values that stay
in registers. A row may be longer than what it holds: `width` true channels and then zeros, so that
it starts at a multiple of 16 bytes and matrix units take it (249 channels in rows of 256).

The backward pass computes the statistics again from the row, which it must read in any case.
No result depends on the order in which programs run.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fused import (
    autocast_dtype,
    cdiv,
    differentiable,
    has_kernels,
    is_recorded,
    jit,
    multiprocessors,
    next_power_of_2,
    on_device_of,
    tl,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 4096  # a row stays in the registers of one program
NUM_WARPS = 4
# Elements of a program's tile. Forward each thread has four loads of 16 bytes on their way; the
# backward pass holds four tiles in float32, so a tile is smaller.
FORWARD, BACKWARD = 4096, 2048
PROGRAMS = 4  # of the backward pass on one multiprocessor: each gives one row of partial sums


# On the device


@jit
def _statistics(x, true, eps, WIDTH: tl.constexpr):
    """Of each row: the values normalised, 0 where not true, and 1 / standard deviation."""
    centred = tl.where(true, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return centred * scale[:, None], scale


@jit
def _load(start, stride, row, column, num_rows, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows in float32, zeros behind WIDTH. They are loaded up to PADDED, which is a multiple of 16
    bytes where WIDTH may not be."""
    x = tl.load(start + row[:, None].to(tl.int64) * stride + column[None, :],
                mask=(row < num_rows)[:, None] & (column < PADDED)[None, :], other=0.0)
    return tl.where((column < WIDTH)[None, :], x.to(tl.float32), 0.0)


@jit(do_not_specialize=["num_rows"])  # compiled once for any batch
def forward_kernel(out, x, weight, bias, num_rows, eps, STRIDE: tl.constexpr,
                   WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr):
    """out (num_rows, PADDED); the rows of x lie STRIDE elements apart."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    true = column < WIDTH
    y, _ = _statistics(_load(x, STRIDE, row, column, num_rows, WIDTH, PADDED), true[None, :], eps,
                       WIDTH)
    y = (y * tl.load(weight + column, mask=true, other=0.0).to(tl.float32)[None, :]
         + tl.load(bias + column, mask=true, other=0.0).to(tl.float32)[None, :])
    tl.store(out + row[:, None].to(tl.int64) * PADDED + column[None, :],
             y.to(out.dtype.element_ty),
             mask=(row < num_rows)[:, None] & (column < PADDED)[None, :])


@jit(do_not_specialize=["num_rows"])  # compiled once for any batch
def backward_kernel(out, sums, gradient, x, weight, num_rows, eps, STRIDE: tl.constexpr,
                    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):
    """The gradient of x in out (num_rows, PADDED), and in sums (programs, 2, WIDTH) those of weight
    and bias by this program's rows. `gradient` has contiguous rows."""
    column = tl.arange(0, BLOCK)
    true = column < WIDTH
    scale = tl.load(weight + column, mask=true, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        given = _load(gradient, PADDED, row, column, num_rows, WIDTH, PADDED)
        y, inverse_std = _statistics(_load(x, STRIDE, row, column, num_rows, WIDTH, PADDED),
                                     true[None, :], eps, WIDTH)
        of_weight += given * y
        of_bias += given
        given *= scale
        # Away go the parts that would change the mean and the variance of the row.
        mean, along = tl.sum(given, 1) / WIDTH, tl.sum(given * y, 1) / WIDTH
        given = (given - mean[:, None] - y * along[:, None]) * inverse_std[:, None]
        tl.store(out + row[:, None].to(tl.int64) * PADDED + column[None, :],
                 tl.where(true[None, :], given, 0.0).to(out.dtype.element_ty),
                 mask=(row < num_rows)[:, None] & (column < PADDED)[None, :])
    sums += tl.program_id(0) * (2 * WIDTH) + column
    tl.store(sums, tl.sum(of_weight, 0), mask=true)
    tl.store(sums + WIDTH, tl.sum(of_bias, 0), mask=true)


# Launches


def tiling(x: Tensor, width: int, elements: int) -> dict[str, int]:
    """What both kernels want to know of rows (num_rows, padded)."""
    block = next_power_of_2(x.shape[1])
    rows = max(1, elements // block)
    return dict(WIDTH=width, PADDED=x.shape[1], ROWS=rows, BLOCK=block, num_warps=NUM_WARPS)


def as_rows(x: Tensor) -> Tensor:
    """(..., padded) -> (num_rows, padded), contiguous along the rows at least."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    rows = as_rows(x)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    forms = tiling(rows, len(weight), FORWARD)
    if len(rows):
        with on_device_of(x):
            forward_kernel[(cdiv(len(rows), forms["ROWS"]),)](
                out, rows, weight.contiguous(), bias.contiguous(), len(rows), eps,
                STRIDE=rows.stride(0), **forms)
    return out


def _layer_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor,
                         eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and, float32 (2, width), of weight and bias."""
    rows, width = as_rows(x), len(weight)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    forms = tiling(rows, width, BACKWARD)
    programs = min(PROGRAMS * multiprocessors(x), cdiv(len(rows), forms["ROWS"]))
    sums = x.new_empty((programs, 2, width), dtype=torch.float32)
    if programs:
        with on_device_of(x):
            backward_kernel[(programs,)](
                out, sums, gradient.contiguous(), rows, weight.contiguous(), len(rows), eps,
                STRIDE=rows.stride(0), **forms)
    return out, sums.sum(0)


_operator = torch.library.custom_op(
    "fused::layer_norm", _layer_norm, mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor")
_backward_operator = torch.library.custom_op(
    "fused::layer_norm_backward", _layer_norm_backward, mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@_backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, len(weight)), dtype=torch.float32)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _backward(call: Callable, ctx, gradient: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    of_x, sums = call(gradient, x, weight, ctx.eps)
    return of_x, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None


_fused = differentiable((_operator, _layer_norm), (_backward_operator, _layer_norm_backward),
                        _keep, _backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float,
               width: int | None = None) -> Tensor:
    """LayerNorm of the first `width` values of the last axis of x (..., padded), zeros behind them;
    weight and bias (width,). Statistics are float32 for halves, too. The result has the dtype of x
    or, where the kernels run under autocast, autocast's: what follows need not be cast."""
    padded = x.shape[-1]
    width = padded if width is None else width
    if weight.shape != (width,) or bias.shape != (width,) or not 0 < width <= padded:
        raise ValueError(f"expected weight and bias of {width} values, at least 1 and at most the "
                         f"{padded} of a row, got {tuple(weight.shape)} and {tuple(bias.shape)}.")
    if (x.dtype in DTYPES and padded <= WIDEST and has_kernels(x.device)
            and not is_recorded()):
        return _fused(x, weight, bias, eps, autocast_dtype(x))
    true = x if width == padded else x[..., :width]
    if x.device.type == "cuda" and x.dtype != weight.dtype:  # PyTorch's kernel takes one dtype only
        y = F.layer_norm(true.float(), (width,), weight.float(), bias.float(), eps).to(x.dtype)
    else:
        y = F.layer_norm(true, (width,), weight, bias, eps)
    return y if width == padded else F.pad(y, (0, padded - width))
