"""The two Triton kernels behind models/triton_kernels.py, which says what they compute and why,
and their launches.

A matrix's columns are (image, position along the short axis) pairs, so that a group of small maps
fills one. Tall and wide kernels differ only in TALL: which axis is the long one and which stride
goes with it.
"""
from __future__ import annotations  # tl is not there to annotate with where Triton is missing

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # optional; models/triton_kernels.py says so to who asks
    triton = None

# Columns of an accumulator: 64 x 128 float32 over 4 warps are 64 registers of a thread, which
# leaves room for the operands and for several programs on one multiprocessor.
COLUMNS = 128
DEPTH = 64  # inner size of the products of kernel_gradients, as of the others on 56 x 56 maps
# Bytes of shared memory: a stage holds 64 x 64 and 64 x 128 halves, 24 KiB; two stages in each of
# four programs fill 192 of the 227 KiB of a Hopper multiprocessor.
LAUNCH = dict(num_warps=4, num_stages=2)
MIN_PROGRAMS = 1056  # 8 on each of 132 multiprocessors; below, kernel_gradients splits the images

jit = triton.jit if triton else (lambda function: function)


@jit
def _dot(left, right, acc):
    if INTERPRETED:  # Triton 3.9's interpreter would multiply the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


INTERPRETED = triton and tl.constexpr(not isinstance(_dot, triton.JITFunction))


@jit
def _columns(x, image, short, channel, num_images, num_channels, H: tl.constexpr, W: tl.constexpr,
             TALL: tl.constexpr):
    """Pointers to where the lines across the short axis start in (num_images, num_channels, H, W),
    and which of them exist."""
    SHORT: tl.constexpr = W if TALL else H
    STRIDE: tl.constexpr = 1 if TALL else W
    start = (image.to(tl.int64) * num_channels + channel) * (H * W)  # maps may pass 2^31 elements
    return x + start + short * STRIDE, (short >= 0) & (short < SHORT) & (image < num_images)


@jit
def _place(H: tl.constexpr, W: tl.constexpr, TALL: tl.constexpr, BLOCK: tl.constexpr,
           GROUP: tl.constexpr):
    """This program's tile along the long axis, and the images and short positions of its columns.
    Programs of one channel are neighbours and share its Toeplitz blocks in L2."""
    COLUMN_TILES: tl.constexpr = (W + BLOCK - 1) // BLOCK
    TILES: tl.constexpr = COLUMN_TILES * ((H + BLOCK - 1) // BLOCK)
    tile = tl.program_id(0) % TILES
    if TALL:
        long_tile, short_tile = tile // COLUMN_TILES, tile % COLUMN_TILES
    else:
        long_tile, short_tile = tile % COLUMN_TILES, tile // COLUMN_TILES
    across = tl.arange(0, GROUP * BLOCK)
    image = tl.program_id(0) // TILES * GROUP + across // BLOCK
    return long_tile, image, short_tile * BLOCK + across % BLOCK


@jit
def _add_branch(acc, x, blocks, num_images, num_channels, H: tl.constexpr, W: tl.constexpr,
                TALL: tl.constexpr, SHIFTS: tl.constexpr, OFFSETS: tl.constexpr,
                BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """acc[m, (image, short)] plus the branch's convolution of x at this program's tile."""
    LONG: tl.constexpr = H if TALL else W
    STRIDE: tl.constexpr = W if TALL else 1
    AWAY: tl.constexpr = OFFSETS // 2
    channel, along = tl.program_id(1), tl.arange(0, BLOCK)
    long_tile, image, short = _place(H, W, TALL, BLOCK, GROUP)
    blocks += channel.to(tl.int64) * (OFFSETS * SHIFTS * BLOCK * BLOCK)
    first = tl.maximum(AWAY - long_tile, 0)
    last = tl.minimum(AWAY + (LONG - 1) // BLOCK - long_tile, OFFSETS - 1)
    # One loop over tiles and shifts, not unrolled: it is pipelined like any matrix product.
    for step in range(first * SHIFTS, (last + 1) * SHIFTS):
        start, exists = _columns(x, image, short + step % SHIFTS - SHIFTS // 2, channel,
                                 num_images, num_channels, H, W, TALL)
        long = (long_tile + step // SHIFTS - AWAY) * BLOCK + along
        tile = tl.load(start[None, :] + (long * STRIDE)[:, None],
                       mask=(long < LONG)[:, None] & exists[None, :], other=0.0)
        toeplitz = tl.load(blocks + step * BLOCK * BLOCK + along[:, None] * BLOCK + along[None, :])
        acc = _dot(toeplitz, tile, acc)
    return acc


@jit
def _store(out, acc, num_images, num_channels, H: tl.constexpr, W: tl.constexpr,
           TALL: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    LONG: tl.constexpr = H if TALL else W
    STRIDE: tl.constexpr = W if TALL else 1
    long_tile, image, short = _place(H, W, TALL, BLOCK, GROUP)
    long = long_tile * BLOCK + tl.arange(0, BLOCK)
    start, exists = _columns(out, image, short, tl.program_id(1), num_images, num_channels, H, W,
                             TALL)
    tl.store(start[None, :] + (long * STRIDE)[:, None], acc.to(out.dtype.element_ty),
             mask=(long < LONG)[:, None] & exists[None, :])


@jit
def _end_branch(out, acc, num_images, num_channels, H: tl.constexpr, W: tl.constexpr,
                SEPARATE: tl.constexpr, TALL: tl.constexpr, NEXT_TALL: tl.constexpr,
                BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """What the next branch starts from: nothing once this one is stored, or the sum so far."""
    if SEPARATE:
        _store(out, acc, num_images, num_channels, H, W, TALL, BLOCK, GROUP)
        acc = tl.zeros((BLOCK, GROUP * BLOCK), tl.float32)
    elif TALL != NEXT_TALL:  # (long, (image, short)) of a tall branch as that of a wide one
        acc = tl.permute(tl.reshape(acc, (BLOCK, GROUP, BLOCK)), (2, 1, 0))
        acc = tl.reshape(acc, (BLOCK, GROUP * BLOCK))
    return acc


@jit
def sum_kernel(out0, out1, out2, x0, x1, x2, blocks0, blocks1, blocks2, bias, num_images,
               num_channels, H: tl.constexpr, W: tl.constexpr, SEPARATE: tl.constexpr,
               BIAS: tl.constexpr,
               TALL0: tl.constexpr, SHIFTS0: tl.constexpr, OFFSETS0: tl.constexpr,
               TALL1: tl.constexpr, SHIFTS1: tl.constexpr, OFFSETS1: tl.constexpr,
               TALL2: tl.constexpr, SHIFTS2: tl.constexpr, OFFSETS2: tl.constexpr,
               BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Up to three branches (no shifts: none) at one tile of one channel of GROUP images, summed in
    one accumulator, with the channel's bias if BIAS, or, if SEPARATE, each into a map of its
    own."""
    acc = tl.zeros((BLOCK, GROUP * BLOCK), tl.float32)
    acc = _add_branch(acc, x0, blocks0, num_images, num_channels, H, W, TALL0, SHIFTS0, OFFSETS0,
                      BLOCK, GROUP)
    out = out0
    if SHIFTS1 > 0:
        acc = _end_branch(out, acc, num_images, num_channels, H, W, SEPARATE, TALL0, TALL1,
                          BLOCK, GROUP)
        acc = _add_branch(acc, x1, blocks1, num_images, num_channels, H, W, TALL1, SHIFTS1,
                          OFFSETS1, BLOCK, GROUP)
        out = out1
    if SHIFTS2 > 0:
        acc = _end_branch(out, acc, num_images, num_channels, H, W, SEPARATE, TALL1, TALL2,
                          BLOCK, GROUP)
        acc = _add_branch(acc, x2, blocks2, num_images, num_channels, H, W, TALL2, SHIFTS2,
                          OFFSETS2, BLOCK, GROUP)
        out = out2
    if BIAS:
        acc += tl.load(bias + tl.program_id(1)).to(tl.float32)
    _store(out, acc, num_images, num_channels, H, W, TALL2, BLOCK, GROUP)


@jit
def product_kernel(out, x, gradient, num_images, num_channels, images_per_program,
                   H: tl.constexpr, W: tl.constexpr, TALL: tl.constexpr, SHIFTS: tl.constexpr,
                   OFFSETS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
                   IMAGES: tl.constexpr):
    """Gradients of Toeplitz blocks, out (splits, C, OFFSETS, SHIFTS, BLOCK, BLOCK): gradient[m, k]
    x[m', k moved by the shift] summed over k = (image, short); GROUP shifts in a program."""
    LONG: tl.constexpr = H if TALL else W
    STRIDE: tl.constexpr = W if TALL else 1
    LONG_TILES: tl.constexpr = (LONG + BLOCK - 1) // BLOCK
    SHORT_TILES: tl.constexpr = ((W if TALL else H) + BLOCK - 1) // BLOCK
    channel, split, along = tl.program_id(1), tl.program_id(2), tl.arange(0, BLOCK)
    offset = tl.program_id(0) % OFFSETS
    across, inner = tl.arange(0, GROUP * BLOCK), tl.arange(0, IMAGES * BLOCK)
    shift = tl.program_id(0) // OFFSETS * GROUP + across // BLOCK
    end = tl.minimum(num_images, (split + 1) * images_per_program)
    acc = tl.zeros((BLOCK, GROUP * BLOCK), tl.float32)
    for step in range((images_per_program + IMAGES - 1) // IMAGES * (LONG_TILES * SHORT_TILES)):
        image = (split * images_per_program + step // (LONG_TILES * SHORT_TILES) * IMAGES
                 + inner // BLOCK)
        short = step % SHORT_TILES * BLOCK + inner % BLOCK
        long = step // SHORT_TILES % LONG_TILES * BLOCK + along
        start, exists = _columns(gradient, image, short, channel, end, num_channels, H, W, TALL)
        left = tl.load(start[None, :] + (long * STRIDE)[:, None],
                       mask=(long < LONG)[:, None] & exists[None, :], other=0.0)
        # (m, k) of the gradient, (k, (shift, m')) of the map
        start, exists = _columns(x, image[:, None], short[:, None] + shift[None, :] - SHIFTS // 2,
                                 channel, end, num_channels, H, W, TALL)
        long = ((step // SHORT_TILES % LONG_TILES + offset - OFFSETS // 2) * BLOCK
                + across % BLOCK)[None, :]
        right = tl.load(start + long * STRIDE, mask=exists & (long >= 0) & (long < LONG),
                        other=0.0)
        acc = _dot(left, right, acc)
    block = ((split.to(tl.int64) * num_channels + channel) * OFFSETS + offset) * SHIFTS + shift
    tl.store(out + (block * BLOCK * BLOCK + across % BLOCK)[None, :] + (along * BLOCK)[:, None],
             acc, mask=(shift < SHIFTS)[None, :])


# Launches


class Branch(NamedTuple):
    """One kernel as matrices: (C, offsets, shifts, BLOCK, BLOCK) Toeplitz blocks, [m, m'] acting
    on the element m' of the tile that lies `offset - offsets // 2` tiles further."""

    tall: bool
    blocks: Tensor


def launch_sum(xs: Sequence[Tensor], branches: Sequence[Branch], *, separate: bool = False,
               bias: Tensor | None = None) -> list[Tensor]:
    """Sum of the convolutions of xs[i] with branches[i] and of the bias (C,), one map (N, C, H, W),
    or each convolution by itself, a map per branch. The maps are contiguous, three at most: Triton
    3.2 takes no tuple of pointers."""
    num_images, num_channels, height, width = xs[0].shape
    outs = [torch.empty_like(xs[0]) for _ in (branches if separate else branches[:1])]
    block, unused = branches[0].blocks.shape[-1], 3 - len(branches)
    forms = {}
    for i, branch in enumerate([*branches, *[branches[-1]] * unused]):
        offsets, shifts = branch.blocks.shape[1:3]
        forms |= {f"TALL{i}": branch.tall, f"OFFSETS{i}": offsets,
                  f"SHIFTS{i}": shifts if i < len(branches) else 0}
    blocks = [branch.blocks for branch in branches]
    group = min(COLUMNS // block, triton.next_power_of_2(max(num_images, 1)))
    tiles = triton.cdiv(height, block) * triton.cdiv(width, block)
    with torch.cuda.device_of(xs[0]):
        sum_kernel[(triton.cdiv(num_images, group) * tiles, num_channels)](
            *outs, *outs[-1:] * (3 - len(outs)), *xs, *xs[-1:] * unused, *blocks,
            *blocks[-1:] * unused, blocks[0] if bias is None else bias, num_images, num_channels,
            H=height, W=width, SEPARATE=separate, BIAS=bias is not None, **forms, BLOCK=block,
            GROUP=group, **LAUNCH)
    return outs


def launch_product(x: Tensor, gradient: Tensor, tall: bool, form: tuple[int, int, int]) -> Tensor:
    """Gradients (C, offsets, shifts, block, block) of a branch's Toeplitz blocks; `form` is
    (offsets, shifts, block) and the maps are contiguous."""
    num_images, num_channels, height, width = x.shape
    offsets, shifts, block = form
    group = min(COLUMNS // block, triton.next_power_of_2(shifts))
    images = min(DEPTH // block, triton.next_power_of_2(max(num_images, 1)))
    programs = offsets * triton.cdiv(shifts, group)
    steps = triton.cdiv(num_images, images)
    splits = max(1, min(MIN_PROGRAMS // (programs * num_channels), steps))
    out = x.new_empty((splits, num_channels, offsets, shifts, block, block), dtype=torch.float32)
    with torch.cuda.device_of(out):
        product_kernel[(programs, num_channels, splits)](
            out, x, gradient, num_images, num_channels, triton.cdiv(steps, splits) * images,
            H=height, W=width, TALL=tall, SHIFTS=shifts, OFFSETS=offsets, BLOCK=block,
            GROUP=group, IMAGES=images, **LAUNCH)
    return out.sum(0)
