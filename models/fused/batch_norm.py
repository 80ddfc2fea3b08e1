"""The sum of the BatchNorms of up to three maps, which ends the branches of SLaK's blocks, in
Triton: one pass over all maps for the statistics, one for the normalized sum, and two backward.

Three maps thus move 18 times the bytes of one in a training step: 3 + 4 forward, 4 + 7 backward.
One module after another moves 32 times. Between the passes a small launch adds up what the programs
found; no result depends on the order in which they run.

Maps (N, C, H, W), all contiguous or all channels-last, are bfloat16, float16 or float32; statistics
are float32. The sum is channels-last, as the LayerNorm and the pointwise layers after it read it.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.fused import (
    cdiv,
    differentiable,
    has_kernels,
    jit,
    next_power_of_2,
    on_device_of,
    three,
    tl,
)
from models.layers import batch_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 1056  # 8 on each of a Hopper GPU's 132 multiprocessors share the positions
COMBINE = dict(BLOCK_T=128, BLOCK_C=8, num_warps=4)  # chunks and channels of the small kernels


# On the device. A tile is (positions, channels); a position is one pixel of one image, counted
# through the batch. LAST: channels-last memory.

@jit
def _start(position, C: tl.constexpr, HW: tl.constexpr, LAST: tl.constexpr):
    """Index of channel 0 at a position. Maps may pass 2^31 elements."""
    start = position.to(tl.int64) * C
    if not LAST:
        start = (position // HW).to(tl.int64) * (C * HW) + position % HW
    return start


@jit
def _indices(position, channel, C: tl.constexpr, HW: tl.constexpr, LAST: tl.constexpr):
    return _start(position, C, HW, LAST)[:, None] + (channel * (1 if LAST else HW))[None, :]


@jit
def _place(C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's tile. Those that run together share the rows of a channels-last map in L2."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    return (tl.program_id(0) // BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P),
            tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))


@jit
def _load(x, indices, inside):
    return tl.load(x + indices, mask=inside, other=0.0).to(tl.float32)


@jit
def _moments(partial, x, num_positions, chunk, C: tl.constexpr, HW: tl.constexpr,
             LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations from it of a chunk of positions, partial (2, C). Sums are
    of the differences from the chunk's first element: a mean far from zero cancels nothing."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, exists = tl.program_id(1) * chunk, channel < C
    end = tl.minimum(first + chunk, num_positions)
    shift = _load(x, _start(first, C, HW, LAST) + channel * (1 if LAST else HW), exists)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = total
    for start in range(first, end, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = (position < end)[:, None] & exists[None, :]
        here = _load(x, _indices(position, channel, C, HW, LAST), inside)
        away = tl.where(inside, here - shift[None, :], 0.0)
        total += away
        square += away * away
    total, square, count = tl.sum(total, 0), tl.sum(square, 0), (end - first).to(tl.float32)
    tl.store(partial + channel, shift + total / count, mask=exists)
    tl.store(partial + C + channel, square - total * total / count, mask=exists)


@jit
def moments_kernel(partial, x0, x1, x2, num_positions, chunk, C: tl.constexpr, HW: tl.constexpr,
                   MAPS: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr,
                   BLOCK_C: tl.constexpr):
    """Moments of one chunk of one map in a program, partial (chunks, MAPS, 2, C)."""
    which = tl.program_id(2)
    partial += (tl.program_id(1) * MAPS + which) * (2 * C)
    if which == 0:
        _moments(partial, x0, num_positions, chunk, C, HW, LAST, BLOCK_P, BLOCK_C)
    elif which == 1:
        _moments(partial, x1, num_positions, chunk, C, HW, LAST, BLOCK_P, BLOCK_C)
    else:
        _moments(partial, x2, num_positions, chunk, C, HW, LAST, BLOCK_P, BLOCK_C)


@jit
def statistics_kernel(statistics, partial, num_chunks, chunk, num_positions, eps, C,
                      MAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of one map, from the moments of its chunks (Chan, Golub and LeVeque 1983): mean, unbiased
    variance and 1 / std, statistics (3, MAPS, C)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, which = channel < C, tl.program_id(1)
    partial += which * 2 * C + channel
    shift = tl.load(partial, mask=exists, other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    square = total
    for start in range(0, num_chunks, BLOCK_T):
        number = start + tl.arange(0, BLOCK_T)
        inside = (number < num_chunks)[:, None] & exists[None, :]
        count = tl.minimum(num_positions - number * chunk, chunk).to(tl.float32)[:, None]
        here = partial[None, :] + (number * (MAPS * 2 * C))[:, None]
        mean = tl.load(here, mask=inside, other=0.0)
        away = tl.where(inside, mean - shift[None, :], 0.0)
        total += count * away
        square += tl.load(here + C, mask=inside, other=0.0) + count * away * away
    total, square, count = tl.sum(total, 0), tl.sum(square, 0), num_positions.to(tl.float32)
    square = tl.maximum(square - total * total / count, 0.0)
    statistics += which * C + channel
    tl.store(statistics, shift + total / count, mask=exists)
    tl.store(statistics + MAPS * C, square / tl.maximum(count - 1, 1.0), mask=exists)
    tl.store(statistics + 2 * MAPS * C, 1.0 / tl.sqrt(square / count + eps), mask=exists)


@jit
def _add_normalized(acc, x, indices, inside, mean, rstd, weight, bias, channel, OWN: tl.constexpr):
    own = channel < OWN
    scale = (_load(rstd, channel, own) * _load(weight, channel, own))[None, :]
    away = _load(x, indices, inside) - _load(mean, channel, own)[None, :]
    return acc + away * scale + _load(bias, channel, own)[None, :]


@jit
def normalize_kernel(out, x0, x1, x2, statistics, weight0, weight1, weight2, bias0, bias1, bias2,
                     num_positions, OWN: tl.constexpr, C: tl.constexpr, HW: tl.constexpr,
                     MAPS: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr,
                     BLOCK_C: tl.constexpr):
    """One tile of the sum of (x - mean) / std * weight + bias, channels-last. The OWN first
    channels have weights; the others become zeros."""
    position, channel = _place(C, BLOCK_P, BLOCK_C)
    inside = (position < num_positions)[:, None] & (channel < C)[None, :]
    indices = _indices(position, channel, C, HW, LAST)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    mean, rstd = statistics, statistics + 2 * MAPS * C
    acc = _add_normalized(acc, x0, indices, inside, mean, rstd, weight0, bias0, channel, OWN)
    if MAPS > 1:
        acc = _add_normalized(acc, x1, indices, inside, mean + C, rstd + C, weight1, bias1,
                              channel, OWN)
    if MAPS > 2:
        acc = _add_normalized(acc, x2, indices, inside, mean + 2 * C, rstd + 2 * C, weight2, bias2,
                              channel, OWN)
    indices = _indices(position, channel, C, HW, True)
    tl.store(out + indices, acc.to(out.dtype.element_ty), mask=inside)


@jit
def products_kernel(partial, gradient, x0, x1, x2, statistics, num_positions, chunk,
                    C: tl.constexpr, HW: tl.constexpr, MAPS: tl.constexpr, LAST: tl.constexpr,
                    GRADIENT_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over a chunk of positions of the gradient and of its product with each x - mean,
    partial (chunks, 1 + MAPS, C)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, exists = tl.program_id(1) * chunk, channel < C
    end = tl.minimum(first + chunk, num_positions)
    mean0 = _load(statistics, channel, exists)[None, :]
    mean1 = _load(statistics + (1 % MAPS) * C, channel, exists)[None, :]
    mean2 = _load(statistics + (2 % MAPS) * C, channel, exists)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    product0, product1, product2 = total, total, total
    for start in range(first, end, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = (position < end)[:, None] & exists[None, :]
        indices = _indices(position, channel, C, HW, LAST)
        g = _load(gradient, _indices(position, channel, C, HW, GRADIENT_LAST), inside)
        total += g  # 0 outside
        product0 += g * (_load(x0, indices, inside) - mean0)
        if MAPS > 1:
            product1 += g * (_load(x1, indices, inside) - mean1)
        if MAPS > 2:
            product2 += g * (_load(x2, indices, inside) - mean2)
    partial += tl.program_id(1) * ((1 + MAPS) * C) + channel
    tl.store(partial, tl.sum(total, 0), mask=exists)
    tl.store(partial + C, tl.sum(product0, 0), mask=exists)
    if MAPS > 1:
        tl.store(partial + 2 * C, tl.sum(product1, 0), mask=exists)
    if MAPS > 2:
        tl.store(partial + 3 * C, tl.sum(product2, 0), mask=exists)


@jit
def gradients_kernel(gradients, means, partial, statistics, num_chunks, num_positions, C,
                     MAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """From the sums of the chunks: gradients (2, MAPS, C) of the weights and of the biases, and
    means (1 + MAPS, C) over the positions of the gradient and of its product with each normalized
    map. One row of partial in a program."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, row = channel < C, tl.program_id(1)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, num_chunks, BLOCK_T):
        number = start + tl.arange(0, BLOCK_T)
        inside = (number < num_chunks)[:, None] & exists[None, :]
        total += tl.load(partial + (number * ((1 + MAPS) * C))[:, None]
                         + (row * C + channel)[None, :], mask=inside, other=0.0)
    total = tl.sum(total, 0)
    if row > 0:
        total *= tl.load(statistics + (2 * MAPS + row - 1) * C + channel, mask=exists, other=0.0)
        tl.store(gradients + (row - 1) * C + channel, total, mask=exists)
    else:
        for i in tl.static_range(MAPS):
            tl.store(gradients + (MAPS + i) * C + channel, total, mask=exists)
    tl.store(means + row * C + channel, total / num_positions.to(tl.float32), mask=exists)


@jit
def _store_input_gradient(out, x, indices, inside, g, mean, rstd, weight, product, channel,
                          OWN: tl.constexpr):
    own = channel < OWN
    rstd = _load(rstd, channel, own)
    away = _load(x, indices, inside) - _load(mean, channel, own)[None, :]
    result = g - away * (rstd * _load(product, channel, own))[None, :]
    result *= (rstd * _load(weight, channel, own))[None, :]
    tl.store(out + indices, result.to(out.dtype.element_ty), mask=inside)


@jit
def input_gradients_kernel(out0, out1, out2, gradient, x0, x1, x2, statistics, means, weight0,
                           weight1, weight2, num_positions, GRADIENT_LAST: tl.constexpr,
                           OWN: tl.constexpr, C: tl.constexpr, HW: tl.constexpr,
                           MAPS: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr,
                           BLOCK_C: tl.constexpr):
    """One tile of the gradients of all maps, in the maps' layout."""
    position, channel = _place(C, BLOCK_P, BLOCK_C)
    inside = (position < num_positions)[:, None] & (channel < C)[None, :]
    indices = _indices(position, channel, C, HW, LAST)
    g = _load(gradient, _indices(position, channel, C, HW, GRADIENT_LAST), inside)
    g -= _load(means, channel, channel < OWN)[None, :]
    mean, rstd, product = statistics, statistics + 2 * MAPS * C, means + C
    _store_input_gradient(out0, x0, indices, inside, g, mean, rstd, weight0, product, channel, OWN)
    if MAPS > 1:
        _store_input_gradient(out1, x1, indices, inside, g, mean + C, rstd + C, weight1,
                              product + C, channel, OWN)
    if MAPS > 2:
        _store_input_gradient(out2, x2, indices, inside, g, mean + 2 * C, rstd + 2 * C, weight2,
                              product + 2 * C, channel, OWN)


# Launches

def constants(maps: Sequence[Tensor], other: Tensor) -> dict[str, int]:
    """Of a kernel for `maps` and `other`, channels-last unless contiguous. A thread takes 16 bytes
    along the contiguous axis of a tile; where the layouts differ, it is a square that is turned in
    shared memory."""
    x, last, other_last = maps[0], not maps[0].is_contiguous(), not other.is_contiguous()
    block = min(64, next_power_of_2(x.shape[1]))
    if last != other_last:
        tile = dict(BLOCK_P=64, BLOCK_C=block, num_warps=8)
    elif other_last:
        tile = dict(BLOCK_P=32, BLOCK_C=block, num_warps=4)
    else:
        tile = dict(BLOCK_P=1024, BLOCK_C=1, num_warps=4)
    return dict(num_positions=x.numel() // x.shape[1], C=x.shape[1], HW=x.shape[2] * x.shape[3],
                MAPS=len(maps), LAST=last, **tile)


def tiles(form: dict[str, int]) -> tuple[int, int]:
    """Along the channels and along the positions."""
    return cdiv(form["C"], form["BLOCK_C"]), cdiv(form["num_positions"], form["BLOCK_P"])


def chunks(form: dict[str, int], num_maps: int = 1) -> tuple[int, int]:
    """How many chunks of how many positions keep all multiprocessors busy with `num_maps` maps."""
    across, along = tiles(form)
    length = cdiv(along, max(1, PROGRAMS // (across * num_maps)))
    return cdiv(along, length), length * form["BLOCK_P"]


def launch_statistics(maps: Sequence[Tensor], eps: float) -> Tensor:
    """Mean, unbiased variance and 1 / std of each map's channels, (3, maps, C)."""
    x, form = maps[0], constants(maps, maps[0])
    number, chunk = chunks(form, len(maps))
    partial = x.new_empty((number, len(maps), 2, x.shape[1]), dtype=torch.float32)
    statistics = x.new_empty((3, len(maps), x.shape[1]), dtype=torch.float32)
    grid = tiles(form)[0], number, len(maps)
    moments_kernel[grid](partial, *three(maps), chunk=chunk, **form)
    statistics_kernel[(cdiv(x.shape[1], COMBINE["BLOCK_C"]), len(maps))](
        statistics, partial, number, chunk, form["num_positions"], eps, x.shape[1],
        MAPS=len(maps), **COMBINE)
    return statistics


def launch_products(gradient: Tensor, maps: Sequence[Tensor],
                    statistics: Tensor) -> tuple[Tensor, Tensor]:
    """`gradients` and `means` of gradients_kernel."""
    channels, form = gradient.shape[1], constants(maps, gradient)
    number, chunk = chunks(form)
    partial = statistics.new_empty((number, 1 + len(maps), channels))
    gradients = statistics.new_empty((2, len(maps), channels))
    means = statistics.new_empty((1 + len(maps), channels))
    products_kernel[(tiles(form)[0], number)](
        partial, gradient, *three(maps), statistics, chunk=chunk,
        GRADIENT_LAST=not gradient.is_contiguous(), **form)
    gradients_kernel[(cdiv(channels, COMBINE["BLOCK_C"]), 1 + len(maps))](
        gradients, means, partial, statistics, number, form["num_positions"], channels,
        MAPS=len(maps), **COMBINE)
    return gradients, means


# All processes together, as nn.SyncBatchNorm

def gathered(statistics: Tensor, count: int, eps: float) -> Tensor:
    """The statistics (3, maps, C) of all processes' maps, which may differ in size."""
    mine = torch.cat([statistics[:2].flatten(), statistics.new_full((1,), count)])
    rows = mine.new_empty((dist.get_world_size(), len(mine)))
    dist.all_gather(list(rows.unbind()), mine)
    counts = rows[:, -1].view(-1, 1, 1)
    means, variances = rows[:, :-1].view(-1, *statistics[:2].shape).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    square = ((counts - 1) * variances + counts * (means - mean) ** 2).sum(0)
    return torch.stack([mean, square / (total - 1), (square / total + eps).rsqrt()])


def averaged(gradients: Tensor, count: int) -> Tensor:
    """`means` of launch_products over the positions of all processes."""
    of_weights, of_bias = gradients[0].flatten(), gradients[1, 0]
    sums = torch.cat([of_bias, of_weights, gradients.new_full((1,), count)])
    dist.all_reduce(sums)
    return (sums[:-1] / sums[-1]).view(-1, gradients.shape[-1])


# Operators

def _batch_norms(maps: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor],
                 eps: float, synced: bool) -> tuple[Tensor, Tensor]:
    with on_device_of(maps[0]):
        statistics = launch_statistics(maps, eps)
        if synced:
            statistics = gathered(statistics, maps[0][:, 0].numel(), eps)
        out = torch.empty_like(maps[0], memory_format=torch.channels_last)
        form, own = constants(maps, out), len(weights[0])
        normalize_kernel[(math.prod(tiles(form)),)](
            out, *three(maps), statistics, *three(weights), *three(biases), OWN=own, **form)
    return out, statistics


def _batch_norms_backward(gradient: Tensor, maps: Sequence[Tensor], weights: Sequence[Tensor],
                          statistics: Tensor, synced: bool) -> list[Tensor]:
    with on_device_of(gradient):
        gradients, means = launch_products(gradient, maps, statistics)
        if synced:
            means = averaged(gradients, gradient[:, 0].numel())
        outs, form = [torch.empty_like(x) for x in maps], constants(maps, gradient)
        input_gradients_kernel[(math.prod(tiles(form)),)](
            *three(outs), gradient, *three(maps), statistics, means, *three(weights),
            GRADIENT_LAST=not gradient.is_contiguous(), OWN=len(weights[0]), **form)
    return [gradients, *outs]


_operator = torch.library.custom_op(
    "fused::batch_norms", _batch_norms, mutates_args=(), schema="(Tensor[] maps, Tensor[] weights, "
    "Tensor[] biases, float eps, bool synced) -> (Tensor, Tensor)")
_backward_operator = torch.library.custom_op(
    "fused::batch_norms_backward", _batch_norms_backward, mutates_args=(), schema="(Tensor "
    "gradient, Tensor[] maps, Tensor[] weights, Tensor statistics, bool synced) -> Tensor[]")


@_operator.register_fake
def _(maps, weights, biases, eps, synced) -> tuple[Tensor, Tensor]:
    x = maps[0]
    return (torch.empty_like(x, memory_format=torch.channels_last),
            x.new_empty((3, len(maps), x.shape[1]), dtype=torch.float32))


@_backward_operator.register_fake
def _(gradient, maps, weights, statistics, synced) -> list[Tensor]:
    return [statistics.new_empty((2, *statistics.shape[1:])), *map(torch.empty_like, maps)]


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    maps, weights, _, _, ctx.synced = inputs
    ctx.set_materialize_grads(False)  # nothing goes back through the statistics
    ctx.save_for_backward(*maps, *weights, output[1])


def _backward(call: Callable, ctx, gradient: Tensor, _: Tensor) -> tuple:
    *saved, statistics = ctx.saved_tensors
    maps, weights = saved[:len(saved) // 2], saved[len(saved) // 2:]
    gradients, *of_maps = call(in_one_layout([gradient])[0], maps, weights, statistics, ctx.synced)
    of_weights, of_biases = gradients[:, :, :len(weights[0])].unbind()
    return of_maps, list(of_weights.unbind()), list(of_biases.unbind()), None, None


_fused = differentiable((_operator, _batch_norms), (_backward_operator, _batch_norms_backward),
                        _keep, _backward)


def in_one_layout(maps: Sequence[Tensor]) -> list[Tensor]:
    """All contiguous if the first is, else channels-last."""
    layout = torch.contiguous_format if maps[0].is_contiguous() else torch.channels_last
    return [x.contiguous(memory_format=layout) for x in maps]


def form_of(norm: nn.Module) -> tuple | None:
    """What the modules of one call must have in common; None for one that no kernel computes."""
    synced = type(norm) is nn.SyncBatchNorm
    if not synced and type(norm) is not nn.BatchNorm2d:
        return None
    if not norm.training or not norm.track_running_stats or norm.momentum is None:
        return None
    if norm.bias is None or norm.weight.dtype != torch.float32:
        return None
    return synced, norm.num_features, norm.eps, norm.momentum, synced and norm.process_group


def can_fuse(maps: Sequence[Tensor], norms: Sequence[nn.Module]) -> bool:
    """Whether the kernels take these maps and compute what these modules do."""
    x, form = maps[0], form_of(norms[0])
    if len(maps) > 3 or not has_kernels(x.device) or x.dim() != 4 or x.dtype not in DTYPES:
        return False
    if any((y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device) for y in maps[1:]):
        return False
    return (x.shape[0] * x.shape[2] * x.shape[3] > 1 and form is not None and not form[-1]
            and form[1] <= x.shape[1] and all(form_of(norm) == form for norm in norms[1:]))


def sum_of_batch_norms(maps: Sequence[Tensor], norms: Sequence[nn.Module]) -> Tensor:
    """sum(norm(x) for x, norm in zip(maps, norms)) of maps (N, C, H, W), in their dtype, with the
    modules' running statistics updated as they do it; differentiable once. `norms` are
    nn.BatchNorm2d, nn.SyncBatchNorm or nn.Identity; maps may carry channels of zeros behind theirs,
    which stay zeros."""
    if not can_fuse(maps, norms):
        return sum(batch_norm(norm, x) for x, norm in zip(maps, norms))
    synced = (isinstance(norms[0], nn.SyncBatchNorm) and dist.is_available()
              and dist.is_initialized() and dist.get_world_size() > 1)
    weights, biases = [norm.weight for norm in norms], [norm.bias for norm in norms]
    out, statistics = _fused(in_one_layout(maps), weights, biases, norms[0].eps, synced)
    with torch.no_grad():
        running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        found = statistics[:2].flatten(0, 1)[:, :norms[0].num_features].unbind()
        torch._foreach_lerp_(running, found, norms[0].momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    return out
