"""Small depthwise convolutions of channels-last maps in Triton, forward and backward: odd square
kernels of 3 to 9, stride 1, zeros around the map to keep its size.

A column of a map is an (image, position along the width) pair, so that small maps fill a tile, too.
A program takes a few neighbouring columns of some channels and walks down their rows. A row is
loaded once for each of the k columns of the kernel and added to the k rows of the output that it
reaches, which stay in registers: k loads (mostly from L1) for k^2 MACs. A thread has two
channels and not more, because it keeps their k^2 weights in registers, too.

For 7 x 7 in 16 bits an H100 needs 1.3 times as long for the MACs in float32 (about 30 T a
second) as for the 4 bytes of device memory of each output element.

No result depends on the order in which programs run. Maps are bfloat16 or float16, summed in
float32; weights and biases may have any floating dtype.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fused import (
    HALVES,
    INTERPRETED,
    autocast_dtype,
    cdiv,
    differentiable,
    has_kernels,
    is_recorded,
    jit,
    multiprocessors,
    on_device_of,
    tl,
)

SIZES = (3, 5, 7, 9)
NUM_WARPS = 4
CHANNELS = 32  # of a tile: 64 bytes, two sectors of memory; 96 channels leave no rest
UNROLL = 2  # rows: fewer moves between registers, 150 instructions instead of 170 for 98 products
AHEAD = 0  # rows that are brought to L2 early; 0: none. 4 costs 5 % more instructions
# Programs that stay on one multiprocessor, by kernel: registers decide. All run at once, so that
# each loads its weights or reduces its sums for several tiles.
PROGRAMS = {3: 8, 5: 5, 7: 3, 9: 2}
HAS_TUPLES = hasattr(tl, "tuple")  # of tensors, inside kernels: Triton 3.3


# On the device. Rows of tensors are tuples, unrolled: registers cannot be indexed.

@jit
def _columns(tile, num_columns, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
             COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program's tile of columns x channels: offsets in row 0 of an (N, H, W, C) map,
    positions along the width, channels, and which of them exist."""
    column = (tile * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    across, inside = column % W, tl.minimum(column, num_columns - 1)
    offset = (inside // W).to(tl.int64) * (H * W * C) + inside % W * C + channel
    return offset, across, channel, (column < num_columns) & (channel < C)


@jit
def _load_row(start, across, exists, C: tl.constexpr, W: tl.constexpr, K: tl.constexpr):
    """The K neighbours along the width of every column, from left to right."""
    result = ()
    for j in tl.static_range(K):
        inside = exists & (across + (j - K // 2) >= 0) & (across + (j - K // 2) < W)
        result = result + (tl.load(start + (j - K // 2) * C, mask=inside, other=0.0),)
    return result


@jit
def _fetch(start):
    """Let these values come from device memory to L2, some rows before they are loaded."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$2]; mov.u32 $0, 0; mov.u32 $1, 0;", "=r,=r,l,l",
                              [start.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=2)


@jit
def _as_float(values, K: tl.constexpr):
    result = ()
    for j in tl.static_range(K):
        result = result + (values[j].to(tl.float32),)
    return result


@jit(do_not_specialize=["num_columns", "num_tiles"])  # compiled once for any batch
def convolution_kernel(out, x, taps, bias, num_columns, num_tiles, C: tl.constexpr,
                       H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr,
                       BIAS: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
                       COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """out and x (N, H, W, C), taps (K * K, C), bias (C,); with FLIP the taps from last to first."""
    offset, across, channel, exists = _columns(0, num_columns, C, H, W, COLUMNS, BLOCK_C)
    # Every column loads its channels' taps, to have them in the registers where they are needed.
    tap = taps + channel + tl.zeros((COLUMNS, 1), tl.int32)
    weights = ()
    for t in tl.static_range(K * K):
        weights = weights + (tl.load(tap + (K * K - 1 - t if FLIP else t) * C,
                                     mask=channel < C, other=0.0).to(tl.float32),)
    start = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    if BIAS:
        start += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        offset, across, channel, exists = _columns(tile, num_columns, C, H, W, COLUMNS, BLOCK_C)
        target = out + offset
        sums = ()  # of the rows r - K // 2 to r + K // 2 of the output
        for _ in tl.static_range(K):
            sums = sums + (start,)
        row = _load_row(x + offset, across, exists, C, W, K)
        for r in tl.range(H, loop_unroll_factor=UNROLL):
            # The next row is on its way while this one is computed.
            following = _load_row(x + offset + tl.minimum(r + 1, H - 1) * (W * C), across, exists,
                                  C, W, K)
            if AHEAD > 0 and C % BLOCK_C == 0:
                _fetch(x + offset + tl.minimum(r + AHEAD, H - 1) * (W * C))
            values = _as_float(row, K)
            moved = ()
            for i in tl.static_range(K):
                total = sums[i]
                for j in tl.static_range(K):
                    total += values[j] * weights[(K - 1 - i) * K + j]
                moved = moved + (total,)
            tl.store(target + (r - K // 2) * (W * C), moved[0].to(out.dtype.element_ty),
                     mask=exists & (r >= K // 2))
            sums = moved[1:] + (start,)
            row = following
        for i in tl.static_range(K // 2):
            tl.store(target + (H - K // 2 + i) * (W * C), sums[i].to(out.dtype.element_ty),
                     mask=exists & (H - K // 2 + i >= 0))


@jit(do_not_specialize=["num_columns", "num_tiles"])  # compiled once for any batch
def gradient_kernel(out, x, gradient, num_columns, num_tiles, C: tl.constexpr, H: tl.constexpr,
                    W: tl.constexpr, K: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
                    COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of x times gradient over this program's tiles for every tap, and of the gradient: out
    (programs, K * K + 1, C)."""
    nothing = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums = sums + (nothing,)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        offset, across, channel, exists = _columns(tile, num_columns, C, H, W, COLUMNS, BLOCK_C)
        window = ()  # rows r - K // 2 to r + K // 2 of the gradient, the last yet to be loaded
        for i in tl.static_range(K - 1):
            window = window + (tl.load(
                gradient + offset + (i - K // 2) * (W * C),
                mask=exists & (i >= K // 2) & (i - K // 2 < H), other=0.0).to(tl.float32),)
        last = tl.load(gradient + offset + K // 2 * (W * C), mask=exists & (K // 2 < H), other=0.0)
        row = _load_row(x + offset, across, exists, C, W, K)
        for r in tl.range(H, loop_unroll_factor=UNROLL):
            window = window + (last.to(tl.float32),)
            last = tl.load(gradient + offset + (r + 1 + K // 2) * (W * C),
                           mask=exists & (r + 1 + K // 2 < H), other=0.0)
            following = _load_row(x + offset + tl.minimum(r + 1, H - 1) * (W * C), across, exists,
                                  C, W, K)
            if AHEAD > 0 and C % BLOCK_C == 0:
                _fetch(x + offset + tl.minimum(r + AHEAD, H - 1) * (W * C))
                _fetch(gradient + offset + tl.minimum(r + AHEAD + K // 2, H - 1) * (W * C))
            values = _as_float(row, K)
            longer = ()
            for t in tl.static_range(K * K):
                longer = longer + (sums[t] + values[t % K] * window[K - 1 - t // K],)
            sums = longer + (sums[K * K] + window[K // 2],)
            window = window[1:]
            row = following
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for t in tl.static_range(K * K + 1):
        tl.store(out + (tl.program_id(0) * (K * K + 1) + t) * C + channel,
                 tl.sum(sums[t], 0), mask=channel < C)


# Launches. Maps are (N, C, H, W) in channels-last memory.


def tiling(x: Tensor, size: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, number of tiles of columns, and what the kernels want to know of shapes."""
    num_images, channels, height, width = x.shape
    columns = 2 * 32 * NUM_WARPS // CHANNELS  # two channels for each thread
    tiles, blocks = cdiv(num_images * width, columns), cdiv(channels, CHANNELS)
    programs = max(1, min(PROGRAMS[size] * multiprocessors(x) // blocks, tiles))
    return (programs, blocks), tiles, dict(C=channels, H=height, W=width, K=size, UNROLL=UNROLL,
                                           AHEAD=0 if INTERPRETED else AHEAD,
                                           COLUMNS=columns, BLOCK_C=CHANNELS, num_warps=NUM_WARPS)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, flip: bool = False) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        return out
    taps = torch.empty(weight[0].numel(), len(weight), device=x.device)  # (k * k, C) float32
    taps.copy_(weight.flatten(1).t())
    grid, tiles, forms = tiling(x, weight.shape[2])
    with on_device_of(x):
        convolution_kernel[grid](out, x, taps, taps if bias is None else bias,
                                 len(x) * x.shape[3], tiles, FLIP=flip, BIAS=bias is not None,
                                 **forms)
    return out


def gradients(x: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Of the taps and, in the last row, of the bias: (size * size + 1, C), float32."""
    x, gradient = [value.contiguous(memory_format=torch.channels_last) for value in (x, gradient)]
    grid, tiles, forms = tiling(x, size)
    sums = x.new_empty((grid[0] if x.numel() else 0, size * size + 1, x.shape[1]),
                       dtype=torch.float32)
    if x.numel():
        with on_device_of(x):
            gradient_kernel[grid](sums, x, gradient, len(x) * x.shape[3], tiles, **forms)
    return sums.sum(0)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolve(x, weight, bias)


def _depthwise_backward(gradient: Tensor, x: Tensor, weight: Tensor, of_input: bool,
                        of_weight: bool) -> list[Tensor]:
    """The gradient of x if `of_input`, those of taps and bias (k * k + 1, C) if `of_weight`."""
    result = []
    if of_input:
        result.append(convolve(gradient, weight, None, flip=True))
    if of_weight:
        result.append(gradients(x, gradient, weight.shape[2]))
    return result


_operator = torch.library.custom_op("fused::depthwise", _depthwise, mutates_args=(),
                                    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_backward_operator = torch.library.custom_op(
    "fused::depthwise_backward", _depthwise_backward, mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor weight, bool of_input, bool of_weight) -> Tensor[]")


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, of_input: bool,
      of_weight: bool) -> list[Tensor]:
    result = []
    if of_input:
        result.append(torch.empty_like(x, memory_format=torch.channels_last))
    if of_weight:
        result.append(x.new_empty((weight[0].numel() + 1, len(weight)), dtype=torch.float32))
    return result


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(call: Callable, ctx, gradient: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    of_input, of_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
    found = call(gradient, x, weight, of_input, of_weight)
    of_x = found[0] if of_input else None
    if not of_weight:
        return of_x, None, None
    sums = found[-1]
    of_bias = None if ctx.bias_dtype is None else sums[-1].to(ctx.bias_dtype)
    return of_x, sums[:-1].t().reshape(weight.shape).to(weight.dtype), of_bias


_fused = differentiable((_operator, _depthwise), (_backward_operator, _depthwise_backward),
                        _keep, _backward)


# For networks


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The depthwise convolution of x (N, C, H, W) with an odd square kernel, weight (C, 1, k, k),
    and a bias (C,), zeros around the map to keep its size; once differentiable. Under autocast in
    its dtype, as F.conv2d, which computes what the kernels cannot: other dtypes and sizes, other
    devices, maps that are not channels-last."""
    channels, size = x.shape[1], weight.shape[-1]
    if weight.shape != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(f"expected a weight ({channels}, 1, k, k) with an odd k for a map "
                         f"{tuple(x.shape)}, got {tuple(weight.shape)}.")
    dtype = autocast_dtype(x)
    if (HAS_TUPLES and size in SIZES and dtype in HALVES and has_kernels(x.device)
            and not is_recorded() and x.is_contiguous(memory_format=torch.channels_last)):
        return _fused(x.to(dtype), weight, bias)
    return F.conv2d(x, weight, bias, padding=size // 2, groups=channels)
