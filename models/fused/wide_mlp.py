"""What models/fused/mlp.py computes, for blocks of more channels than it takes:

    out = x + W2 gelu(W1 norm(y) + b1) + b2

The first product is a Triton kernel that makes the norm and the GELU on the way, the second one is
the library's.

The norm is a rank-one correction of a product: with mean m and standard deviation s of a row,
W1 norm(y) = (W1 y - m sum(W1)) / s. So y meets the matrix units as it is, its statistics and the
sums of the weights come from a small kernel, and nothing is rounded between norm and product.

Rounded to half are the hidden values, what is added to x, and the result; statistics, products and
sums are float32. No result depends on the order in which programs run.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fused import cdiv, dot, jit, multiprocessors, next_power_of_2, on_device_of, tl
from models.fused.gelu import gelu

try:  # Triton 3.4
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

WIDEST = 4096  # channels: a row stays in the registers of one program
FEWEST = 4096  # positions: fewer do not fill a GPU, and launches take longer than they save
# Elements of a program's tile of the statistics: each thread has four loads of 16 bytes on their
# way.
STATISTICS = 4096
TILE = dict(BLOCK_P=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)


# On the device


@jit(do_not_specialize=["num_rows"])  # compiled once for any batch
def statistics_kernel(moments, sums, y, weight, num_rows, eps, WIDTH: tl.constexpr,
                      PADDED: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
                      BLOCK: tl.constexpr):
    """Of rows y (num_rows, PADDED) 1 / s and - m / s, in moments (2, num_rows); of the rows of
    weight (HIDDEN, PADDED) the sums, by the programs behind."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    tile, tiles = tl.program_id(0), tl.cdiv(num_rows, ROWS)
    rows, count = y, num_rows
    if tile >= tiles:
        rows, count, tile = weight, HIDDEN, tile - tiles
    exists = row < count - tile * ROWS
    # Up to PADDED, which is a multiple of 16 bytes where WIDTH may not be.
    inside, true = (column < PADDED)[None, :], (column < WIDTH)[None, :]
    rows += tl.cast(tile, tl.int64) * (ROWS * PADDED)  # maps may pass 2^31 elements
    values = tl.load(rows + row[:, None] * PADDED + column[None, :],
                     mask=exists[:, None] & inside, other=0.0)
    values = tl.where(true, values.to(tl.float32), 0.0)
    total = tl.sum(values, 1)
    centred = tl.where(true, values - (total / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    place = tile * ROWS + row
    if tl.program_id(0) >= tiles:
        tl.store(sums + place, total, mask=exists)
    else:
        tl.store(moments + place, scale, mask=exists)
        tl.store(moments + num_rows + place, -total / WIDTH * scale, mask=exists)


@jit
def _store_hidden(out, acc, row, column, bias, sums, moments, num_rows, HIDDEN: tl.constexpr,
                  BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """gelu(acc / s - m / s sum + b), at row and column."""
    at, position = column + tl.arange(0, BLOCK_N), row + tl.arange(0, BLOCK_P)
    within, exists = at < HIDDEN, position < num_rows
    scale = tl.load(moments + position, mask=exists, other=0.0)[:, None]
    shift = tl.load(moments + num_rows + position, mask=exists, other=0.0)[:, None]
    total = tl.load(sums + at, mask=within, other=0.0)[None, :]
    added = tl.load(bias + at, mask=within, other=0.0).to(tl.float32)[None, :]
    out.store([row, column], gelu(acc * scale + (shift * total + added)).to(out.dtype))


@jit(do_not_specialize=["num_rows"])  # compiled once for any batch
def hidden_kernel(out, y, weight, bias, sums, moments, num_rows, PADDED: tl.constexpr,
                  HIDDEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr):
    """Descriptors, which give zeros outside: out (num_rows, HIDDEN), y (num_rows, PADDED) and
    weight (HIDDEN, PADDED). A program takes one tile after another; those that run together share
    rows."""
    PARTS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_P) * PARTS, tl.num_programs(0),
                         flatten=True):
        row, column = tile // PARTS * BLOCK_P, tile % PARTS * BLOCK_N
        acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        for start in range(0, PADDED, BLOCK_K):
            acc = dot(y.load([row, start]), weight.load([column, start]).T, acc)
        # Half by half, so that the columns' sums and biases take fewer registers.
        left, right = acc.reshape(BLOCK_P, 2, HALF).permute(0, 2, 1).split()
        _store_hidden(out, left, row, column, bias, sums, moments, num_rows, HIDDEN, BLOCK_P, HALF)
        _store_hidden(out, right, row, column + HALF, bias, sums, moments, num_rows, HIDDEN,
                      BLOCK_P, HALF)


# On the host. Rows are the positions of channels-last maps.


def statistics(y: Tensor, weight: Tensor, eps: float, width: int) -> tuple[Tensor, Tensor]:
    num_rows, channels = y.shape
    moments = y.new_empty((2, num_rows), dtype=torch.float32)
    sums = y.new_empty(len(weight), dtype=torch.float32)
    block = next_power_of_2(channels)
    rows = max(1, STATISTICS // block)
    statistics_kernel[(cdiv(num_rows, rows) + cdiv(len(weight), rows),)](
        moments, sums, y, weight, num_rows, eps, WIDTH=width, PADDED=channels, HIDDEN=len(weight),
        ROWS=rows, BLOCK=block, num_warps=4)
    return moments, sums


def hidden_values(y: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, sums: Tensor) -> Tensor:
    out = y.new_empty((len(y), len(weight)))
    p, n, k = TILE["BLOCK_P"], TILE["BLOCK_N"], TILE["BLOCK_K"]
    programs = min(multiprocessors(y), cdiv(len(y), p) * cdiv(len(weight), n))
    hidden_kernel[(programs,)](
        _blocks(out, p, n // 2), _blocks(y, p, k), _blocks(weight, n, k), bias, sums, moments,
        len(y), PADDED=y.shape[1], HIDDEN=len(weight), **TILE)
    return out


def _blocks(rows: Tensor, *shape: int) -> TensorDescriptor:
    """Of which the GPU's copy engine moves blocks, from addresses that are multiples of 16."""
    rows = rows if rows.data_ptr() % 16 == 0 else rows.clone()
    return TensorDescriptor.from_tensor(rows, list(shape))


def launch(x: Tensor, y: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
           eps: float, width: int) -> Tensor:
    """x and y (N, C, H, W), channels-last, as the result."""
    rows, weight1 = y.permute(0, 2, 3, 1), weight1.contiguous()
    with on_device_of(x):
        moments, sums = statistics(rows.reshape(-1, rows.shape[3]), weight1, eps, width)
        hidden = hidden_values(rows.reshape(-1, rows.shape[3]), weight1, bias1, moments, sums)
    return x + F.linear(hidden, weight2, bias2).view(rows.shape).permute(0, 3, 1, 2)


def suits(x: Tensor) -> bool:
    """Whether the products gain by it, on a device that suits models/fused/mlp.py."""
    num_positions = x.shape[0] * x.shape[2] * x.shape[3]
    return TensorDescriptor is not None and x.shape[1] <= WIDEST and num_positions >= FEWEST
