"""Large depthwise convolutions on matrix units in Triton, forward and backward, fused: the 51x5,
5x51 and 5x5 kernels of SLaK over one map in one launch.

A tall kernel is a sum of matrix products, one per column j of the kernel: out = sum_j T_j @ X_j
with X_j the map moved by j - kw // 2 columns and T_j[h, h'] = k[h' - h + kh // 2, j] a banded
Toeplitz matrix. A wide kernel is the same with rows and columns exchanged. "Long" is the axis along
which the kernel is long and the matrices act, "short" the one along which the map is moved. A
matrix's columns are (image, position along the short axis) pairs, so that a group of small maps
fills one.

Per output element, for those three kernels summed over 56 x 56 maps in 16 bits: 10 shifts x 64 (a
row of T) x 64^2 / 56^2 = 836 multiply-adds on matrix units (the direct sum takes 535 on the others)
and 4 bytes of device memory, 2 read and 2 written. In the time of 4 bytes an H200 does some 370
(4.3 TB/s and 788 TFLOP/s, measured): matrix units and L1 are the limit, not device memory.

No result depends on the order in which programs run, and what cannot be computed raises
ValueError. Maps are float32 (exact products), bfloat16 or float16, summed in float32; results are
contiguous. Kernels may have any floating dtype; they are rounded to the map's.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.large_kernel.backend import Backend

try:
    import triton
    import triton.language as tl
except ImportError:  # optional; `why_not` says so to who asks
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Columns of an accumulator: 64 x 128 float32 over 4 warps are 64 registers of a thread, which
# leaves room for the operands and for several programs on one multiprocessor.
COLUMNS = 128
DEPTH = 64  # inner size of the products of kernel_gradients, as of the others on 56 x 56 maps
# Bytes of shared memory: a stage holds 64 x 64 and 64 x 128 halves, 24 KiB; two stages in each of
# four programs fill 192 of the 227 KiB of a Hopper multiprocessor.
LAUNCH = dict(num_warps=4, num_stages=2)
MIN_PROGRAMS = 1056  # 8 on each of 132 multiprocessors; below, kernel_gradients splits the images

jit = triton.jit if triton else (lambda function: function)


# On the device. Tall and wide kernels differ only in TALL: which axis is the long one and which
# stride goes with it.

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


def three(values: Sequence) -> list:
    """Up to three values, the last one repeated: Triton 3.2 takes no tuple of pointers."""
    return [*values, *[values[-1]] * (3 - len(values))]


def launch_sum(xs: Sequence[Tensor], branches: Sequence[Branch], *, separate: bool = False,
               bias: Tensor | None = None) -> list[Tensor]:
    """Sum of the convolutions of xs[i] with branches[i] and of the bias (C,), one map (N, C, H, W),
    or each convolution by itself, a map per branch. The maps are contiguous, three at most."""
    num_images, num_channels, height, width = xs[0].shape
    outs = [torch.empty_like(xs[0]) for _ in (branches if separate else branches[:1])]
    blocks = [branch.blocks for branch in branches]
    block = blocks[0].shape[-1]
    forms = {}
    for i, branch in enumerate(three(branches)):
        offsets, shifts = branch.blocks.shape[1:3]
        forms |= {f"TALL{i}": branch.tall, f"OFFSETS{i}": offsets,
                  f"SHIFTS{i}": shifts if i < len(branches) else 0}
    group = min(COLUMNS // block, triton.next_power_of_2(max(num_images, 1)))
    tiles = triton.cdiv(height, block) * triton.cdiv(width, block)
    with torch.cuda.device_of(xs[0]):
        sum_kernel[(triton.cdiv(num_images, group) * tiles, num_channels)](
            *three(outs), *three(xs), *three(blocks), blocks[0] if bias is None else bias,
            num_images, num_channels, H=height, W=width, SEPARATE=separate,
            BIAS=bias is not None, **forms, BLOCK=block, GROUP=group, **LAUNCH)
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
    tall, reach = is_tall(size), max(size) // 2
    tiles = -(-(height if tall else width) // block)
    away = min(-(-reach // block), tiles - 1)
    return tall, away, (away + 1) * block - 1 - reach


def is_tall(size: Sequence[int]) -> bool:
    return size[0] > size[1]


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
    result = []
    for tall in (True, False):
        group = [kernel.float() for kernel in kernels if is_tall(kernel.shape[2:]) == tall]
        if group:
            size = covering([kernel.shape[2:] for kernel in group])
            result.append(sum(in_middle(kernel, size) for kernel in group))
    return result


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


def kernel_gradient(x: Tensor, gradient: Tensor, size: tuple[int, int]) -> Tensor:
    """Float32 (C, 1, *size) in one launch."""
    check(gradient, [(x.shape[1], 1, *size)])
    if gradient.shape != x.shape or gradient.dtype != x.dtype:
        raise ValueError(f"expected gradients like the map, {tuple(x.shape)} in {x.dtype}; got "
                         f"{tuple(gradient.shape)} in {gradient.dtype}.")
    block = block_size(*x.shape[2:], x.dtype)
    tall, away, margin = geometry(size, *x.shape[2:], block)
    form = (2 * away + 1, min(size), block)
    lines = diagonals(launch_product(x, gradient.contiguous(), tall, form), margin)
    return (lines.transpose(1, 2) if tall else lines).unsqueeze(1)


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


class Triton(Backend):
    memory_format = torch.contiguous_format

    def why_not(self, device: torch.device) -> str | None:
        if triton is None:
            return "Triton is not installed."
        if INTERPRETED:
            return None
        if device.type != "cuda":
            return (f"Triton's kernels need a GPU, not the device '{device.type}'; "
                    "TRITON_INTERPRET=1, set before Triton is imported, runs them slowly without "
                    "one.")
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return (f"The GPU's compute capability is {capability[0]}.{capability[1]}, and "
                    "bfloat16 matrix products need 8.0.")
        return None

    def prepare(self, kernels: Sequence[Tensor], height: int, width: int,
                dtype: torch.dtype) -> list[Tensor]:
        """Toeplitz blocks of the tall kernels' sum and of the others'."""
        return [as_branch(kernel, height, width, dtype).blocks for kernel in merged(kernels)]

    def total(self, x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor],
              bias: Tensor) -> Tensor:
        """In one launch. Kernels of one orientation were added up before they meet the map."""
        check(x, [kernel.shape for kernel in kernels])
        talls = sorted({is_tall(kernel.shape[2:]) for kernel in kernels}, reverse=True)
        branches = [Branch(tall, blocks) for tall, blocks in zip(talls, prepared)]
        return launch_sum([x.contiguous()] * len(branches), branches, bias=bias)[0]

    def outputs(self, x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
        """In one launch for three kernels."""
        check(x, [kernel.shape for kernel in kernels])
        branches = [as_branch(kernel, *x.shape[2:], x.dtype) for kernel in kernels]
        x, result = x.contiguous(), []
        for i in range(0, len(branches), 3):
            part = branches[i:i + 3]
            result += launch_sum([x] * len(part), part, separate=True)
        return result

    def input_gradient(self, gradients: Sequence[Tensor], kernels: Sequence[Tensor]) -> Tensor:
        """One launch for up to three kernels. The same tensor given several times counts as one and
        is read once."""
        check_pairs(gradients, kernels)
        maps, branches = [], []
        for gradient in {id(g): g for g in gradients}.values():
            check(gradient, [kernel.shape for kernel in kernels])
            flipped = [k.flip(2, 3) for g, k in zip(gradients, kernels) if g is gradient]
            found = [as_branch(kernel, *gradient.shape[2:], gradient.dtype)
                     for kernel in merged(flipped)]
            maps += [gradient.contiguous()] * len(found)
            branches += found
        parts = [launch_sum(maps[i:i + 3], branches[i:i + 3])[0] for i in range(0, len(maps), 3)]
        return reduce(torch.add, parts)

    def kernel_gradients(self, x: Tensor, gradients: Sequence[Tensor],
                         sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """In float32. Kernels of one orientation with the same tensor as gradient share a launch:
        the smaller's is the middle of the larger's."""
        check_pairs(gradients, sizes)
        x, whole = x.contiguous(), {}
        keys = [(id(gradient), is_tall(size)) for gradient, size in zip(gradients, sizes)]
        for key, gradient in zip(keys, gradients):
            if key not in whole:
                size = covering([size for other, size in zip(keys, sizes) if other == key])
                whole[key] = kernel_gradient(x, gradient, size)
        return [in_middle(whole[key], size).contiguous() for key, size in zip(keys, sizes)]


BACKEND = Triton()
