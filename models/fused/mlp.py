"""The MLP of a ConvNeXt block in Triton, for inference in half precision:

    out = x + W2 gelu(W1 norm(y) + b1) + b2,    norm: LayerNorm without weight and bias

at every position over its channels. Here in one kernel; blocks of more channels than it takes are
left to models/fused/wide_mlp.py. The hidden values, four times the map, never leave the chip:
y, x and out are all that meets device memory. A program holds a tile of positions normalised in
shared memory and their sums in registers, and takes the hidden channels in chunks, whose weights
come from L2.

Rounded to half are the normalised values, the hidden ones and the result; statistics, products and
sums are float32. No result depends on the order in which programs run.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from models.fused import (
    HALVES,
    autocast_dtype,
    cdiv,
    dot,
    has_kernels,
    is_recorded,
    jit,
    multiprocessors,
    next_power_of_2,
    on_device_of,
    tl,
    wide_mlp,
)
from models.fused.gelu import gelu

WIDEST = 256  # channels in memory: wider sums do not fit into registers; see wide_mlp.py
# For maps of at most so many channels: how many programs a Hopper multiprocessor takes, and their
# tiles, the fastest of 32 on an H100. Its 227 KiB of shared memory and 65,536 registers hold two
# programs of 96 KiB and 128 threads, or one of 192 KiB and 256, with 255 registers in a thread.
TILES = {128: (2, dict(BLOCK_P=128, BLOCK_H=64, num_warps=4, num_stages=2)),
         256: (1, dict(BLOCK_P=128, BLOCK_H=64, num_warps=8, num_stages=2))}


# On the device


@jit
def _load(pointers, mask, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


@jit
def _normalised(y, tile, num_positions, eps, PIXELS: tl.constexpr, Y_LAST: tl.constexpr,
                WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr,
                BLOCK_P: tl.constexpr):
    """(BLOCK_P, BLOCK_C) of a tile's positions, 0 behind WIDTH channels."""
    row, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    if Y_LAST:
        y += tl.cast(tile, tl.int64) * (BLOCK_P * PADDED)
        place = (row * PADDED)[:, None] + channel[None, :]
    else:
        position = tile * BLOCK_P + row
        place = ((position // PIXELS).to(tl.int64) * (PADDED * PIXELS) + position % PIXELS)[:, None]
        place += (channel * PIXELS)[None, :]
    exists = (row < num_positions - tile * BLOCK_P)[:, None]
    # Up to PADDED, which is a multiple of 16 bytes where WIDTH may not be.
    values = tl.load(y + place, mask=exists & (channel < PADDED)[None, :], other=0.0)
    true = (channel < WIDTH)[None, :]
    wide = tl.where(true, values.to(tl.float32), 0.0)
    centred = tl.where(true, wide - (tl.sum(wide, 1) / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return (centred * scale[:, None]).to(values.dtype)


@jit(do_not_specialize=["num_positions"])  # compiled once for any batch
def forward_kernel(out, x, y, weight1, bias1, weight2, bias2, num_positions, eps,
                   PIXELS: tl.constexpr, Y_LAST: tl.constexpr, WIDTH: tl.constexpr,
                   PADDED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
                   BLOCK_H: tl.constexpr):
    """x and out (num_positions, PADDED), dense. y the same if Y_LAST, else (images, PADDED,
    PIXELS). Weights (4 PADDED, PADDED) and (PADDED, 4 PADDED), zeros behind WIDTH channels."""
    HIDDEN: tl.constexpr = 4 * PADDED
    WHOLE: tl.constexpr = PADDED == BLOCK_C and HIDDEN % BLOCK_H == 0
    row, channel, part = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    inside = channel < PADDED
    into = weight1 + part[None, :] * PADDED + channel[:, None]  # (BLOCK_C, BLOCK_H), transposed
    back = weight2 + channel[None, :] * HIDDEN + part[:, None]
    place = row[:, None] * PADDED + channel[None, :]
    # Carried by the loop: so `a` is an operand of the products in shared memory, not in registers.
    a = _normalised(y, tl.program_id(0), num_positions, eps, PIXELS, Y_LAST, WIDTH, PADDED,
                    BLOCK_C, BLOCK_P)
    for tile in range(tl.program_id(0), tl.cdiv(num_positions, BLOCK_P), tl.num_programs(0)):
        moved = tl.cast(tile, tl.int64) * (BLOCK_P * PADDED)  # maps may pass 2^31 elements
        exists = (row < num_positions - tile * BLOCK_P)[:, None] & inside[None, :]
        acc = (tl.load(x + moved + place, mask=exists, other=0.0).to(tl.float32)
               + tl.load(bias2 + channel, mask=inside, other=0.0).to(tl.float32)[None, :])
        for start in range(0, HIDDEN, BLOCK_H):
            within = start + part < HIDDEN
            first = _load(into + start * PADDED, inside[:, None] & within[None, :], WHOLE)
            shift = _load(bias1 + start + part, within, WHOLE).to(tl.float32)
            second = _load(back + start, within[:, None] & inside[None, :], WHOLE)
            h = dot(a, first, tl.zeros((BLOCK_P, BLOCK_H), tl.float32))
            acc = dot(gelu(h + shift[None, :]).to(a.dtype), second, acc)
        tl.store(out + moved + place, acc.to(out.dtype.element_ty), mask=exists)
        a = _normalised(y, tile + tl.num_programs(0), num_positions, eps, PIXELS, Y_LAST, WIDTH,
                        PADDED, BLOCK_C, BLOCK_P)


# On the host


def launch(x: Tensor, y: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
           eps: float, width: int) -> Tensor:
    layout = torch.channels_last
    x, channels, pixels = x.contiguous(memory_format=layout), x.shape[1], x.shape[2] * x.shape[3]
    if channels > WIDEST or not y.is_contiguous():
        y = y.contiguous(memory_format=layout)
    if channels > WIDEST:
        return wide_mlp.launch(x, y, weight1, bias1, weight2, bias2, eps, width)
    out = torch.empty_like(x, memory_format=layout)
    num_positions = len(x) * pixels
    at_once, tiles = TILES[128 if channels <= 128 else 256]
    programs = min(at_once * multiprocessors(x), cdiv(num_positions, tiles["BLOCK_P"]))
    if programs:
        with on_device_of(x):
            forward_kernel[(programs,)](
                out, x, y, weight1.contiguous(), bias1, weight2.contiguous(), bias2, num_positions,
                eps, PIXELS=pixels, Y_LAST=y.is_contiguous(memory_format=layout), WIDTH=width,
                PADDED=channels, BLOCK_C=max(16, next_power_of_2(channels)), **tiles)
    return out


# An operator of PyTorch's own kind: opaque to torch.compile, which would otherwise trace into it.
_compiled = torch.library.custom_op(
    "fused::mlp", launch, mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
           "float eps, SymInt width) -> Tensor")


@_compiled.register_fake
def _(x: Tensor, *others) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.compiler.assume_constant_result
def suits(device: torch.device) -> bool:
    """The tiles are made for compute capability 9.0: others have less shared memory, or matrix
    units of another kind."""
    return has_kernels(device) and (device.type != "cuda" or torch.version.cuda is not None
                                    and torch.cuda.get_device_capability(device) == (9, 0))


def can_fuse(x: Tensor, weight: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether `mlp` takes such a map (N, C, H, W) and such a first weight. Not where x or one of
    the block's parameters wants a gradient, or what records ordinary layers calls."""
    channels = x.shape[1]
    if is_recorded():
        return False
    if torch.is_grad_enabled() and any(value.requires_grad for value in (x, *parameters)):
        return False
    return (x.dtype in HALVES and x.dtype == weight.dtype == autocast_dtype(x)
            and channels % 8 == 0 and weight.shape == (4 * channels, channels) and suits(x.device)
            and (channels <= WIDEST or wide_mlp.suits(x)))


def mlp(x: Tensor, y: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
        eps: float, width: int) -> Tensor:
    """x + weight2 gelu(weight1 norm(y) + bias1) + bias2 over the channels of (N, C, H, W), the
    LayerNorm over the first `width`, behind which the weights hold zeros. Channels-last; y may be
    contiguous as well. For what `can_fuse` takes."""
    call = _compiled if torch.compiler.is_compiling() else launch
    return call(x, y, weight1, bias1, weight2, bias2, eps, width)
