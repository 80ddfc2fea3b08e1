"""LayerNorm over the last axis in Triton, forward and backward, in one pass of memory each.

Rows are of bfloat16, float16 or float32; means and variances are float32 ones of values that stay
in registers. A row may be longer than what it holds: `width` true channels and then zeros, so that
it starts at a multiple of 16 bytes and matrix units take it (249 channels in rows of 256).

The rows of a map may be written in the order of its patches, so that a convolution whose kernel is
as large as its stride is a matrix product of what is written; their gradients are read so.

The backward pass computes the statistics again from the row, which it must read in any case.
No result depends on the order in which programs run.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fused import (
    FLOATS,
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
def _load(start, row, exists, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
          PADDED: tl.constexpr):
    """Rows in float32, zeros behind WIDTH. They are loaded up to PADDED, which is a multiple of 16
    bytes where WIDTH may not be."""
    x = tl.load(start + row[:, None].to(tl.int64) * STRIDE + column[None, :],
                mask=exists[:, None] & (column < PADDED)[None, :], other=0.0)
    return tl.where((column < WIDTH)[None, :], x.to(tl.float32), 0.0)


@jit
def _place(row, num_rows, H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr):
    """Where the rows of maps of H x W stand in the order of their patches, and whether they do."""
    exists = row < num_rows
    if PATCH > 1:
        DOWN: tl.constexpr = H // PATCH
        ACROSS: tl.constexpr = W // PATCH
        y, x = row // W % H, row % W
        exists = exists & (y < DOWN * PATCH) & (x < ACROSS * PATCH)
        patch = (row // (H * W) * DOWN + y // PATCH) * ACROSS + x // PATCH
        row = patch * (PATCH * PATCH) + y % PATCH * PATCH + x % PATCH
    return row, exists


@jit(do_not_specialize=["num_rows"])  # compiled once for any batch
def forward_kernel(out, x, weight, bias, num_rows, eps, STRIDE: tl.constexpr,
                   WIDTH: tl.constexpr, PADDED: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
                   PATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out (patches, PATCH * PATCH, PADDED); the rows of x lie STRIDE elements apart."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    true = column < WIDTH
    values = _load(x, row, row < num_rows, column, STRIDE, WIDTH, PADDED)
    y, _ = _statistics(values, true[None, :], eps, WIDTH)
    y = (y * tl.load(weight + column, mask=true, other=0.0).to(tl.float32)[None, :]
         + tl.load(bias + column, mask=true, other=0.0).to(tl.float32)[None, :])
    row, exists = _place(row, num_rows, H, W, PATCH)
    tl.store(out + row[:, None].to(tl.int64) * PADDED + column[None, :],
             y.to(out.dtype.element_ty), mask=exists[:, None] & (column < PADDED)[None, :])


@jit(do_not_specialize=["num_rows"])  # compiled once for any batch
def backward_kernel(out, sums, gradient, x, weight, num_rows, eps, STRIDE: tl.constexpr,
                    WIDTH: tl.constexpr, PADDED: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
                    PATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of x in out (num_rows, PADDED), and in sums (programs, 2, WIDTH) those of weight
    and bias by this program's rows. `gradient` is contiguous, in the order of the output."""
    column = tl.arange(0, BLOCK)
    true = column < WIDTH
    scale = tl.load(weight + column, mask=true, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        place, is_given = _place(row, num_rows, H, W, PATCH)
        given = _load(gradient, place, is_given, column, PADDED, WIDTH, PADDED)
        y, inverse_std = _statistics(
            _load(x, row, row < num_rows, column, STRIDE, WIDTH, PADDED), true[None, :], eps, WIDTH)
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


def tiling(x: Tensor, width: int, patch: int, elements: int) -> dict[str, int]:
    """What both kernels want to know of x (..., padded)."""
    block = next_power_of_2(x.shape[-1])
    down, across = x.shape[1:3] if patch > 1 else (1, 1)
    return dict(WIDTH=width, PADDED=x.shape[-1], H=down, W=across, PATCH=patch,
                ROWS=max(1, elements // block), BLOCK=block, num_warps=NUM_WARPS)


def as_rows(x: Tensor) -> Tensor:
    """(..., padded) -> (num_rows, padded), contiguous along the rows at least."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _shape(x: Tensor, patch: int) -> Sequence[int]:
    """Of the result for x (..., padded) or, in patches, (N, H, W, padded)."""
    if patch == 1:
        return x.shape
    return x.shape[0], x.shape[1] // patch, x.shape[2] // patch, patch * patch * x.shape[3]


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
                patch: int) -> Tensor:
    rows = as_rows(x)
    out = torch.empty(_shape(x, patch), dtype=dtype, device=x.device)
    forms = tiling(x, len(weight), patch, FORWARD)
    if len(rows):
        with on_device_of(x):
            forward_kernel[(cdiv(len(rows), forms["ROWS"]),)](
                out, rows, weight.contiguous(), bias.contiguous(), len(rows), eps,
                STRIDE=rows.stride(0), **forms)
    return out


def _layer_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, eps: float,
                         patch: int) -> tuple[Tensor, Tensor]:
    """The gradients of x and, float32 (2, width), of weight and bias."""
    rows, width = as_rows(x), len(weight)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    forms = tiling(x, width, patch, BACKWARD)
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
    schema="(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype, int patch) -> "
           "Tensor")
_backward_operator = torch.library.custom_op(
    "fused::layer_norm_backward", _layer_norm_backward, mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor weight, float eps, int patch) -> (Tensor, Tensor)")


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
      patch: int) -> Tensor:
    return x.new_empty(_shape(x, patch), dtype=dtype)


@_backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, eps: float,
      patch: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, len(weight)), dtype=torch.float32)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, _, ctx.patch = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _backward(call: Callable, ctx, gradient: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    of_x, sums = call(gradient, x, weight, ctx.eps, ctx.patch)
    return of_x, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None, None


_fused = differentiable((_operator, _layer_norm), (_backward_operator, _layer_norm_backward),
                        _keep, _backward)


def in_patches(x: Tensor, size: int) -> Tensor:
    """(N, H, W, C) -> (N, H // size, W // size, size * size * C): each patch of size x size as one
    row, positions before channels. What fills no patch is left out."""
    num_images, down, across, channels = len(x), x.shape[1] // size, x.shape[2] // size, x.shape[3]
    x = x[:, :down * size, :across * size].reshape(num_images, down, size, across, size, channels)
    return x.transpose(2, 3).reshape(num_images, down, across, size * size * channels)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, width: int | None = None,
               patch: int = 1) -> Tensor:
    """LayerNorm of the first `width` values of the last axis of x (..., padded), zeros behind them;
    weight and bias (width,). Statistics are float32 for halves, too. The result has the dtype of x
    or, where the kernels run under autocast, autocast's: what follows need not be cast. `patch`:
    the result is given as by `in_patches` of that size, for x (N, H, W, padded)."""
    padded = x.shape[-1]
    width = padded if width is None else width
    if weight.shape != (width,) or bias.shape != (width,) or not 0 < width <= padded:
        raise ValueError(f"expected weight and bias of {width} values, at least 1 and at most the "
                         f"{padded} of a row, got {tuple(weight.shape)} and {tuple(bias.shape)}.")
    if (x.dtype in FLOATS and padded <= WIDEST and has_kernels(x.device)
            and not is_recorded()):
        return _fused(x, weight, bias, eps, autocast_dtype(x), patch)
    true = x if width == padded else x[..., :width]
    if x.device.type == "cuda" and x.dtype != weight.dtype:  # PyTorch's kernel takes one dtype only
        y = F.layer_norm(true.float(), (width,), weight.float(), bias.float(), eps).to(x.dtype)
    else:
        y = F.layer_norm(true, (width,), weight, bias, eps)
    y = y if width == padded else F.pad(y, (0, padded - width))
    return y if patch == 1 else in_patches(y, patch)
