"""Large depthwise convolutions on matrix units in Triton, forward and backward, fused: the 51x5,
5x51 and 5x5 kernels of SLaK over one map in one launch.

A tall kernel is a sum of matrix products, one per column j of the kernel: out = sum_j T_j @ X_j
with X_j the map moved by j - kw // 2 columns and T_j[h, h'] = k[h' - h + kh // 2, j] a banded
Toeplitz matrix. A wide kernel is the same with rows and columns exchanged. "Long" is the axis along
which the kernel is long and the matrices act, "short" the one along which the map is moved. A
matrix's columns are (image, position along the short axis) pairs, so that a group of small maps
fills one.

Per output element, for those three kernels summed over 56 x 56 maps in 16 bits: 10 shifts x 64 (a
row of T) x 64^2 / 56^2 = 836 MACs on matrix units (the direct sum takes 535 on the others)
and 4 bytes of device memory, 2 read and 2 written. In the time of 4 bytes an H200 does some 370
(4.3 TB/s and 788 TFLOP/s, measured): matrix units and L1 are the limit, not device memory.

No result depends on the order in which programs run, and what cannot be computed raises
ValueError. Maps are float32 (exact products), bfloat16 or float16, summed in float32; results are
contiguous. Kernels may have any floating dtype; they are rounded to the map's.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import Tensor

from models.fused import (
    FLOATS,
    INTERPRETED,
    cdiv,
    dot,
    jit,
    next_power_of_2,
    on_device_of,
    three,
    tl,
    triton,
)
from models.large_kernel.backend import Backend
from models.large_kernel.layout import to_channels_last, to_contiguous
from models.large_kernel.tables import Table, gather, gather_gradient, make_table, tap_numbers

# Columns of an accumulator: 64 x 128 float32 over 4 warps are 64 registers of a thread, which
# leaves room for the operands and for several programs on one multiprocessor.
COLUMNS = 128
DEPTH = 64  # inner size of the products of the kernels' gradients, as of the others on 56 x 56 maps
# Bytes of shared memory: a stage holds 64 x 64 and 64 x 128 halves, 24 KiB; two stages in each of
# four programs fill 192 of the 227 KiB of a Hopper multiprocessor.
LAUNCH = dict(num_warps=4, num_stages=2)
MIN_PROGRAMS = 1056  # 8 on each of 132 multiprocessors; below, product_kernel splits the images


# On the device. Tall and wide kernels differ only in TALL: which axis is the long one and which
# stride goes with it.

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
                START: tl.constexpr, PLACES: tl.constexpr, FLIP: tl.constexpr,
                BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """acc[m, (image, short)] plus the branch's convolution of x at this program's tile, with the
    kernel turned by 180 degrees if FLIP: its blocks are the same in reversed order, transposed."""
    LONG: tl.constexpr = H if TALL else W
    STRIDE: tl.constexpr = W if TALL else 1
    AWAY: tl.constexpr = OFFSETS // 2
    channel, along = tl.program_id(1), tl.arange(0, BLOCK)
    long_tile, image, short = _place(H, W, TALL, BLOCK, GROUP)
    blocks += channel.to(tl.int64) * PLACES + START
    first = tl.maximum(AWAY - long_tile, 0)
    last = tl.minimum(AWAY + (LONG - 1) // BLOCK - long_tile, OFFSETS - 1)
    # One loop over tiles and shifts, not unrolled: it is pipelined like any matrix product.
    for step in range(first * SHIFTS, (last + 1) * SHIFTS):
        start, exists = _columns(x, image, short + step % SHIFTS - SHIFTS // 2, channel,
                                 num_images, num_channels, H, W, TALL)
        long = (long_tile + step // SHIFTS - AWAY) * BLOCK + along
        tile = tl.load(start[None, :] + (long * STRIDE)[:, None],
                       mask=(long < LONG)[:, None] & exists[None, :], other=0.0)
        if FLIP:
            toeplitz = tl.load(blocks + (OFFSETS * SHIFTS - 1 - step) * BLOCK * BLOCK
                               + along[None, :] * BLOCK + along[:, None])
        else:
            toeplitz = tl.load(blocks + step * BLOCK * BLOCK
                               + along[:, None] * BLOCK + along[None, :])
        acc = dot(toeplitz, tile, acc)
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


@jit(do_not_specialize=["num_images", "num_channels"])  # compiled once for any batch
def sum_kernel(out0, out1, out2, x0, x1, x2, blocks, bias, num_images, num_channels,
               H: tl.constexpr, W: tl.constexpr, SEPARATE: tl.constexpr, BIAS: tl.constexpr,
               FLIP: tl.constexpr, PLACES: tl.constexpr, START: tl.constexpr,
               TALL0: tl.constexpr, SHIFTS0: tl.constexpr, OFFSETS0: tl.constexpr,
               TALL1: tl.constexpr, SHIFTS1: tl.constexpr, OFFSETS1: tl.constexpr,
               TALL2: tl.constexpr, SHIFTS2: tl.constexpr, OFFSETS2: tl.constexpr,
               BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Up to three branches (no shifts: none), whose blocks begin at START, at one tile of one
    channel of GROUP images, summed in one accumulator, with the channel's bias if BIAS, or, if
    SEPARATE, each into a map of its own."""
    START1: tl.constexpr = START + OFFSETS0 * SHIFTS0 * BLOCK * BLOCK
    START2: tl.constexpr = START1 + OFFSETS1 * SHIFTS1 * BLOCK * BLOCK
    acc = tl.zeros((BLOCK, GROUP * BLOCK), tl.float32)
    acc = _add_branch(acc, x0, blocks, num_images, num_channels, H, W, TALL0, SHIFTS0, OFFSETS0,
                      START, PLACES, FLIP, BLOCK, GROUP)
    out = out0
    if SHIFTS1 > 0:
        acc = _end_branch(out, acc, num_images, num_channels, H, W, SEPARATE, TALL0, TALL1,
                          BLOCK, GROUP)
        acc = _add_branch(acc, x1, blocks, num_images, num_channels, H, W, TALL1, SHIFTS1,
                          OFFSETS1, START1, PLACES, FLIP, BLOCK, GROUP)
        out = out1
    if SHIFTS2 > 0:
        acc = _end_branch(out, acc, num_images, num_channels, H, W, SEPARATE, TALL1, TALL2,
                          BLOCK, GROUP)
        acc = _add_branch(acc, x2, blocks, num_images, num_channels, H, W, TALL2, SHIFTS2,
                          OFFSETS2, START2, PLACES, FLIP, BLOCK, GROUP)
        out = out2
    if BIAS:
        acc += tl.load(bias + tl.program_id(1)).to(tl.float32)
    _store(out, acc, num_images, num_channels, H, W, TALL2, BLOCK, GROUP)


@jit(do_not_specialize=["num_images", "num_channels", "images_per_program"])
def product_kernel(out, x, gradient, num_images, num_channels, images_per_program,
                   H: tl.constexpr, W: tl.constexpr, TALL: tl.constexpr, SHIFTS: tl.constexpr,
                   OFFSETS: tl.constexpr, START: tl.constexpr, PLACES: tl.constexpr,
                   BLOCK: tl.constexpr, GROUP: tl.constexpr, IMAGES: tl.constexpr):
    """Gradients of a branch's Toeplitz blocks in out (splits, C, PLACES): gradient[m, k]
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
        acc = dot(left, right, acc)
    out += (split.to(tl.int64) * num_channels + channel) * PLACES + START
    block = (offset * SHIFTS + shift) * BLOCK * BLOCK + across % BLOCK
    tl.store(out + block[None, :] + (along * BLOCK)[:, None], acc, mask=(shift < SHIFTS)[None, :])


# On the host


@dataclass(frozen=True)
class Form:
    """How a kernel acts as matrices: (OFFSETS, SHIFTS, BLOCK, BLOCK) Toeplitz blocks of a channel
    from START on, [m, m'] acting on the element m' of the tile that lies `offset - offsets // 2`
    tiles further, on a map moved by `shift - shifts // 2` along the short axis."""

    tall: bool
    offsets: int
    shifts: int
    start: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call's sizes decide. The blocks of all its kernels are one tensor (C, PLACES).
    `constants` are those of sum_kernel, for three kernels after the other."""

    forms: tuple[Form, ...]
    table: Table
    block: int
    constants: tuple[dict[str, int], ...]


def block_size(height: int, width: int, dtype: torch.dtype) -> int:
    """Edge of a tile. Exact float32 products run unrolled on the ordinary units; 32 keeps that
    code and its registers small."""
    largest = 32 if dtype == torch.float32 else 64
    return next(block for block in (16, 32, 64) if block >= min(max(height, width), largest))


@cache  # for ever: a CUDA graph goes on reading the table
def plan_of(shape: torch.Size, dtype: torch.dtype, device: torch.device,
            kernels: tuple[torch.Size, ...]) -> Plan:
    """For maps of this shape (C, H, W) and kernels of these. Of each only what such a map reaches
    is given blocks."""
    check(shape, dtype, kernels)
    height, width = shape[1:]
    sizes = [tuple(kernel[2:]) for kernel in kernels]
    block = block_size(height, width, dtype)
    here, forms, indices, start = torch.arange(block), [], [], 0
    for number, (kh, kw) in enumerate(sizes):
        rows, columns = min(kh, 2 * height - 1), min(kw, 2 * width - 1)
        tall = rows > columns
        reach, shifts = max(rows, columns) // 2, min(rows, columns)
        tiles = -(-(height if tall else width) // block)
        away = min(-(-reach // block), tiles - 1)
        offsets = 2 * away + 1
        # (offset, shift, m, m') -> position along the kernel's long axis, and across it
        along = (here - here[:, None]) + (torch.arange(-away, away + 1) * block).view(-1, 1, 1, 1)
        across = (torch.arange(shifts) - shifts // 2).view(-1, 1, 1)
        along, across = torch.broadcast_tensors(along, across)
        down, right = (along, across) if tall else (across, along)
        index = tap_numbers(sizes, number, down + kh // 2, right + kw // 2)
        forms.append(Form(tall, offsets, shifts, start))
        indices.append(index.flatten())
        start += index.numel()
    table = make_table(sizes, torch.cat(indices), device)
    same = dict(H=height, W=width, PLACES=start, BLOCK=block)
    return Plan(tuple(forms), table, block,
                tuple(same | constants(forms[i:i + 3]) for i in range(0, len(forms), 3)))


def plan_for(x: Tensor, kernels: Sequence[Tensor]) -> Plan:
    """Raises ValueError unless these kernels can meet the map."""
    return plan_of(x.shape[1:], x.dtype, x.device, tuple(kernel.shape for kernel in kernels))


def constants(forms: Sequence[Form]) -> dict[str, int]:
    """Of up to three branches for sum_kernel, which takes the last one's form for those missing."""
    result = dict(START=forms[0].start)
    for i in range(3):
        form = forms[min(i, len(forms) - 1)]
        result |= {f"TALL{i}": form.tall, f"OFFSETS{i}": form.offsets,
                   f"SHIFTS{i}": form.shifts if i < len(forms) else 0}
    return result


def check(shape: torch.Size, dtype: torch.dtype, kernels: Sequence[torch.Size]) -> None:
    if len(shape) != 3 or dtype not in FLOATS or shape[1] * shape[2] == 0:
        raise ValueError(f"expected a map (N, C, H, W) in float32, bfloat16 or float16, got (N, "
                         f"{', '.join(map(str, shape))}) in {dtype}.")
    for kernel in kernels:
        channels, one, height, width = kernel
        if channels > shape[0] or one != 1 or height % 2 == 0 or width % 2 == 0:
            raise ValueError(f"a map with {shape[0]} channels takes kernels ({shape[0]}, 1, odd, "
                             f"odd), got {tuple(kernel)}.")
    if not kernels:
        raise ValueError("expected at least one kernel, got none.")


def launch_sum(xs: Sequence[Tensor], plan: Plan, blocks: Tensor, *, separate: bool = False,
               flip: bool = False, bias: Tensor | None = None) -> list[Tensor]:
    """Sum of the convolutions of xs[i] with the kernel i, turned by 180 degrees if `flip`, and of
    the bias (C,): a map (N, C, H, W) for each launch, which takes three kernels. Or each
    convolution by itself if `separate`. The maps are contiguous."""
    num_images, num_channels, height, width = xs[0].shape
    group = min(COLUMNS // plan.block, next_power_of_2(num_images))
    tiles = cdiv(height, plan.block) * cdiv(width, plan.block)
    result = []
    with on_device_of(xs[0]):
        for i, form in enumerate(plan.constants):
            some = xs[3 * i:3 * i + 3]
            outs = [torch.empty_like(x) for x in (some if separate else some[:1])]
            sum_kernel[(cdiv(num_images, group) * tiles, num_channels)](
                *three(outs), *three(some), blocks, blocks if bias is None else bias, num_images,
                num_channels, SEPARATE=separate, BIAS=bias is not None, FLIP=flip, GROUP=group,
                **form, **LAUNCH)
            result += outs
            bias = None
    return result


def launch_products(x: Tensor, gradients: Sequence[Tensor], plan: Plan) -> Tensor:
    """Gradients (splits, C, PLACES) in float32 of the Toeplitz blocks, a launch for each kernel.
    The maps are contiguous."""
    num_images, num_channels, height, width = x.shape
    block, num_places = plan.block, len(plan.table.index)
    images = min(DEPTH // block, next_power_of_2(num_images))
    steps = cdiv(num_images, images)
    groups = [min(COLUMNS // block, next_power_of_2(form.shifts)) for form in plan.forms]
    programs = [form.offsets * cdiv(form.shifts, group)
                for form, group in zip(plan.forms, groups)]
    splits = max(1, min(MIN_PROGRAMS // (min(programs) * num_channels), steps))
    out = x.new_empty((splits, num_channels, num_places), dtype=torch.float32)
    with on_device_of(out):
        for gradient, form, group, number in zip(gradients, plan.forms, groups, programs):
            product_kernel[(number, num_channels, splits)](
                out, x, gradient, num_images, num_channels, cdiv(steps, splits) * images,
                H=height, W=width, TALL=form.tall, SHIFTS=form.shifts, OFFSETS=form.offsets,
                START=form.start, PLACES=num_places, BLOCK=block, GROUP=group, IMAGES=images,
                **LAUNCH)
    return out


class Triton(Backend):
    branches_format = torch.contiguous_format
    takes_any_kernel = True
    keeps_matrices = True

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

    def arranged(self, x: Tensor) -> Tensor:
        return to_contiguous(x)

    def matrices(self, x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
        """The Toeplitz blocks of all kernels, (C, PLACES)."""
        return [gather(kernels, plan_for(x, kernels).table, x.shape[1], x.dtype)]

    def total(self, x: Tensor, kernels: Sequence[Tensor], prepared: Sequence[Tensor],
              bias: Tensor) -> Tensor:
        """In one launch for up to three kernels."""
        plan, x = plan_for(x, kernels), to_contiguous(x)
        parts = launch_sum([x] * len(kernels), plan, *prepared, bias=bias)
        return reduce(torch.add, parts)

    def outputs(self, x: Tensor, kernels: Sequence[Tensor], matrices: Sequence[Tensor] = ()
                ) -> list[Tensor]:
        """In one launch for up to three kernels."""
        blocks, = matrices or self.matrices(x, kernels)
        xs = [to_contiguous(x)] * len(kernels)
        return launch_sum(xs, plan_for(x, kernels), blocks, separate=True)

    def input_gradient(self, gradients: Sequence[Tensor], kernels: Sequence[Tensor],
                       matrices: Sequence[Tensor] = ()) -> Tensor:
        """In one launch for up to three kernels, and one for the layout."""
        check_gradients(gradients[0], gradients, kernels)
        blocks, = matrices or self.matrices(gradients[0], kernels)
        parts = launch_sum([to_contiguous(gradient) for gradient in gradients],
                           plan_for(gradients[0], kernels), blocks, flip=True)
        return to_channels_last(reduce(torch.add, parts))

    def kernel_gradients(self, x: Tensor, gradients: Sequence[Tensor], kernels: Sequence[Tensor]
                         ) -> list[Tensor]:
        """In float32, in one launch for each kernel and one for all."""
        check_gradients(x, gradients, kernels)
        plan, gradients = plan_for(x, kernels), [to_contiguous(g) for g in gradients]
        products = launch_products(to_contiguous(x), gradients, plan)
        return gather_gradient(products, plan.table, len(kernels[0]))


def check_gradients(x: Tensor, gradients: Sequence[Tensor], kernels: Sequence[Tensor]) -> None:
    if len(gradients) != len(kernels):
        raise ValueError(f"expected one gradient for each kernel, got {len(gradients)} gradients "
                         f"for {len(kernels)} kernels.")
    for gradient in gradients:
        if gradient.shape != x.shape or gradient.dtype != x.dtype:
            raise ValueError(f"expected gradients like the map, {tuple(x.shape)} in {x.dtype}; got "
                             f"{tuple(gradient.shape)} in {gradient.dtype}.")


BACKEND = Triton()
