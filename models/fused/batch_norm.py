"""The sum of the BatchNorms of up to three maps, which ends the branches of SLaK's blocks, or, with
a shortcut and a ReLU, the layers and blocks of a ResNet, in Triton: one pass over all maps for the
statistics, one for the normalized sum, and two backward.

Three maps thus move 18 times the bytes of one in a training step: 3 + 4 forward, 4 + 7 backward.
One module after another moves 30 times. One map and its ReLU move 8 times, 1 + 2 and 2 + 3, instead
of 13; with a shortcut 11, 1 + 3 and 4 + 3, instead of 16. Between the passes a small launch adds up
what the programs found; no result depends on the order in which they run.

Maps (N, C, H, W), all contiguous or all channels-last, are bfloat16, float16 or float32; statistics
are float32. The sum is channels-last, as the layers after it read it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.fused import (
    FLOATS,
    cdiv,
    differentiable,
    has_kernels,
    is_recorded,
    multiprocessors,
    next_power_of_2,
    on_device_of,
    three,
)
from models.fused.batch_norm_kernels import (
    gradients_kernel,
    input_gradients_kernel,
    moments_kernel,
    normalize_kernel,
    products_kernel,
    statistics_kernel,
)
from models.layers import are_ordinary, batch_norm

# Tiles of channels-last maps, by kernel and number of maps: positions (of 16-bit maps; half as many
# of float32), channels, how many rows of a tile a thread adds up by itself, warps, and programs of
# a multiprocessor.
TILES = {
    ("moments", 1): (64, 64, 4, 4, 8),
    ("moments", 2): (64, 64, 4, 4, 7),
    ("moments", 3): (64, 64, 4, 4, 7),
    ("normalize", 1): (64, 64, 1, 4, 7),
    ("normalize", 2): (32, 64, 1, 4, 7),
    ("normalize", 3): (32, 64, 1, 4, 4),
    ("products", 1): (64, 64, 4, 4, 4),
    ("products", 2): (32, 64, 2, 4, 6),
    ("products", 3): (32, 64, 2, 4, 5),
    ("input gradients", 1): (64, 64, 1, 4, 5),
    ("input gradients", 2): (32, 64, 1, 4, 4),
    ("input gradients", 3): (32, 64, 1, 4, 3),
}
# Contiguous maps: 16 bytes along the positions. Where two layouts differ, a tile is a square that
# is turned in shared memory.
CONTIGUOUS = (1024, 1, 1, 4, 8)
TURNED = (64, 64, 1, 8, 4)
COMBINE = dict(BLOCK_C=8, num_warps=8)  # channels of the small kernels


# Launches

def constants(kernel: str, maps: Sequence[Tensor], other: Tensor) -> tuple[int, int, dict]:
    """Of a kernel for `maps` and `other`, channels-last unless contiguous: its programs, those that
    share the positions, and what it is called with."""
    x, last, other_last = maps[0], not maps[0].is_contiguous(), not other.is_contiguous()
    channels = x.shape[1]
    if last and other_last:
        rows, block, fold, warps, programs = TILES[kernel, len(maps)]
        narrow = min(block, next_power_of_2(channels))
        rows = rows * block // narrow * 2 // x.element_size()
        block = narrow
    else:
        rows, block, fold, warps, programs = CONTIGUOUS if last == other_last else TURNED
        block = min(block, next_power_of_2(channels))
    positions = x.numel() // channels
    tiles, across = cdiv(positions, rows), cdiv(channels, block)
    maps_apart = len(maps) if kernel == "moments" else 1
    along = programs * multiprocessors(x) // (across * maps_apart)
    along = min(tiles, max(1, along))
    pixels = 0 if last and other_last else x.shape[2] * x.shape[3]  # then not used
    form = dict(num_positions=positions, num_tiles=tiles, C=channels, HW=pixels, MAPS=len(maps),
                LAST=last, BLOCK_P=rows, BLOCK_C=block, num_warps=warps)
    if kernel in ("moments", "products"):
        form["FOLD"] = fold
    return across * along, along, form


def parts_at_once(programs: int) -> int:
    """How many of them one step of the small kernels adds up."""
    return 64 if programs <= 64 else 512


def launch_statistics(maps: Sequence[Tensor], eps: float, running: dict[str, Any] | None
                      ) -> Tensor:
    """Mean, unbiased variance and 1 / std of each map's channels, (3, maps, C). `running`, if any,
    is updated: lists of running means, of variances and of numbers of batches, and a momentum."""
    x, number = maps[0], len(maps)
    programs, along, form = constants("moments", maps, maps[0])
    partial = x.new_empty((along, number, 2, x.shape[1]), dtype=torch.float32)
    statistics = x.new_empty((3, number, x.shape[1]), dtype=torch.float32)
    moments_kernel[(programs, number)](partial, *three(maps), **form)
    means, variances, tracked, momentum = [[statistics]] * 3 + [0.0]
    if running is not None:
        means, variances = running["means"], running["variances"]
        tracked, momentum = running["tracked"], running["momentum"]
    statistics_kernel[(cdiv(x.shape[1], COMBINE["BLOCK_C"]), number)](
        statistics, partial, *three(means), *three(variances), *three(tracked), along,
        form["num_positions"], form["num_tiles"], eps, momentum, OWN=means[0].shape[0],
        C=x.shape[1], MAPS=number, UPDATES=running is not None, BLOCK_P=form["BLOCK_P"],
        BLOCK_T=parts_at_once(along), **COMBINE)
    return statistics


def launch_normalize(maps: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor],
                     shortcut: Tensor | None, statistics: Tensor, relu: bool) -> Tensor:
    out = torch.empty_like(maps[0], memory_format=torch.channels_last)
    programs, _, form = constants("normalize", maps, out)
    normalize_kernel[(programs,)](
        out, *three(maps), out if shortcut is None else shortcut, statistics, *three(weights),
        *three(biases), OWN=len(weights[0]), SHORTCUT=shortcut is not None, RELU=relu, **form)
    return out


def launch_products(gradient: Tensor, out: Tensor | None, maps: Sequence[Tensor],
                    statistics: Tensor, weight: Tensor, bias: Tensor | None, stores: bool
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """`gradients` and `means` of gradients_kernel, and that of the ReLU's input if `stores`."""
    channels, number = gradient.shape[1], len(maps)
    programs, along, form = constants("products", maps, gradient)
    partial = statistics.new_empty((along, 1 + number, channels))
    gradients = statistics.new_empty((2, number, channels))
    means = statistics.new_empty((1 + number, channels))
    cut = torch.empty_like(gradient) if stores else gradient
    products_kernel[(programs,)](
        partial, cut, gradient, gradient if out is None else out, *three(maps), statistics, weight,
        weight if bias is None else bias, OWN=len(weight),
        GRADIENT_LAST=not gradient.is_contiguous(), CUT=cut_by(out, bias), STORES=stores, **form)
    gradients_kernel[(cdiv(channels, COMBINE["BLOCK_C"]), 1 + number)](
        gradients, means, partial, statistics, along, form["num_positions"], C=channels,
        MAPS=number, BLOCK_T=parts_at_once(along), **COMBINE)
    return gradients, means, cut


def launch_input_gradients(gradient: Tensor, out: Tensor | None, maps: Sequence[Tensor],
                           statistics: Tensor, means: Tensor, weights: Sequence[Tensor],
                           bias: Tensor | None) -> list[Tensor]:
    results = [torch.empty_like(x) for x in maps]
    programs, _, form = constants("input gradients", maps, gradient)
    input_gradients_kernel[(programs,)](
        *three(results), gradient, gradient if out is None else out, *three(maps), statistics,
        means, *three(weights), weights[0] if bias is None else bias, OWN=len(weights[0]),
        GRADIENT_LAST=not gradient.is_contiguous(), CUT=cut_by(out, bias), **form)
    return results


def cut_by(out: Tensor | None, bias: Tensor | None) -> str:
    """CUT of the kernels."""
    return "" if out is None and bias is None else "map" if out is None else "out"


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
                 shortcut: Tensor | None, eps: float, relu: bool, synced: bool,
                 running: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    with on_device_of(maps[0]):
        statistics = launch_statistics(maps, eps, running)
        if synced:
            statistics = gathered(statistics, maps[0][:, 0].numel(), eps)
        return launch_normalize(maps, weights, biases, shortcut, statistics, relu), statistics


def _batch_norms_backward(gradient: Tensor, maps: Sequence[Tensor], weights: Sequence[Tensor],
                          bias: Tensor | None, out: Tensor | None, statistics: Tensor,
                          synced: bool, stores: bool) -> list[Tensor]:
    """`bias` or `out` where the result was cut by a ReLU; the gradient of the shortcut as well if
    `stores`, behind those of the maps."""
    with on_device_of(gradient):
        gradients, means, cut = launch_products(gradient, out, maps, statistics, weights[0], bias,
                                                stores)
        if synced:
            means = averaged(gradients, gradient[:, 0].numel())
        if stores:  # what is cut need not be cut again
            out = None
        outs = launch_input_gradients(cut, out, maps, statistics, means, weights, bias)
    return [gradients, *outs, *([cut] if stores else [])]


_operator = torch.library.custom_op(
    "fused::batch_norms", _batch_norms, mutates_args=(), schema="(Tensor[] maps, Tensor[] weights, "
    "Tensor[] biases, Tensor? shortcut, float eps, bool relu, bool synced) -> (Tensor, Tensor)")
_backward_operator = torch.library.custom_op(
    "fused::batch_norms_backward", _batch_norms_backward, mutates_args=(), schema="(Tensor "
    "gradient, Tensor[] maps, Tensor[] weights, Tensor? bias, Tensor? out, Tensor statistics, "
    "bool synced, bool stores) -> Tensor[]")


@_operator.register_fake
def _(maps, weights, biases, shortcut, eps, relu, synced) -> tuple[Tensor, Tensor]:
    x = maps[0]
    return (torch.empty_like(x, memory_format=torch.channels_last),
            x.new_empty((3, len(maps), x.shape[1]), dtype=torch.float32))


@_backward_operator.register_fake
def _(gradient, maps, weights, bias, out, statistics, synced, stores) -> list[Tensor]:
    return [statistics.new_empty((2, *statistics.shape[1:])), *map(torch.empty_like, maps),
            *([torch.empty_like(gradient)] if stores else [])]


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    maps, weights, biases, shortcut, _, relu, ctx.synced, *rest = inputs
    ctx.set_materialize_grads(False)  # nothing goes back through the statistics
    ctx.number, ctx.has_shortcut, ctx.relu = len(maps), shortcut is not None, relu
    ctx.nothing = [None] * (3 + len(rest))  # gradients of what is no tensor
    # The signs of the result follow from a single map; else the result itself tells them.
    ctx.is_single = len(maps) == 1 and shortcut is None
    signs = [biases[0] if ctx.is_single else output[0]] if relu else []
    ctx.save_for_backward(*maps, *weights, output[1], *signs)


def _backward(call: Callable, ctx, gradient: Tensor, _: Tensor) -> tuple:
    number, bias, out = ctx.number, None, None
    maps, weights = ctx.saved_tensors[:number], ctx.saved_tensors[number:2 * number]
    statistics = ctx.saved_tensors[2 * number]
    if ctx.relu and ctx.is_single:
        bias = ctx.saved_tensors[-1]
    elif ctx.relu:
        out = ctx.saved_tensors[-1]
        gradient = gradient.contiguous(memory_format=torch.channels_last)  # read beside `out`
    gradient, stores = in_one_layout([gradient])[0], ctx.has_shortcut and ctx.relu
    gradients, *found = call(gradient, maps, weights, bias, out, statistics, ctx.synced, stores)
    of_weights, of_biases = gradients[:, :, :len(weights[0])].unbind()
    of_shortcut = found[-1] if stores else gradient if ctx.has_shortcut else None
    return (found[:number], list(of_weights.unbind()), list(of_biases.unbind()), of_shortcut,
            *ctx.nothing)


_fused = differentiable((_operator, _batch_norms), (_backward_operator, _batch_norms_backward),
                        _keep, _backward)


def in_one_layout(maps: Sequence[Tensor]) -> list[Tensor]:
    """All contiguous if the first is, else channels-last."""
    layout = torch.contiguous_format if maps[0].is_contiguous() else torch.channels_last
    return [x.contiguous(memory_format=layout) for x in maps]


def form_of(norm: nn.Module) -> tuple | None:
    """What the modules of one call must have in common; None for one that no kernel computes."""
    synced = type(norm) is nn.SyncBatchNorm
    if not are_ordinary([norm], (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return None
    if not norm.training or not norm.track_running_stats or norm.momentum is None:
        return None
    if norm.bias is None or norm.weight.dtype != torch.float32:
        return None
    return synced, norm.num_features, norm.eps, norm.momentum, synced and norm.process_group


def can_fuse(maps: Sequence[Tensor], norms: Sequence[nn.Module],
             shortcut: Tensor | None = None) -> bool:
    """Whether the kernels take these maps and compute what these modules do."""
    form = form_of(norms[0])
    if form is None or form[-1] or any(form_of(norm) != form for norm in norms[1:]):
        return False
    x, others = maps[0], [*maps[1:], *([] if shortcut is None else [shortcut])]
    if len(maps) > 3 or x.dim() != 4 or x.dtype not in FLOATS or not has_kernels(x.device):
        return False
    if any((y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device) for y in others):
        return False
    return (x.shape[0] * x.shape[2] * x.shape[3] > 1 and form[1] <= x.shape[1]
            and not is_recorded())


def sum_of_batch_norms(maps: Sequence[Tensor], norms: Sequence[nn.Module], *,
                       shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
    """sum(norm(x) for x, norm in zip(maps, norms)) + shortcut, cut by a ReLU if `relu`, of maps
    (N, C, H, W), in their dtype, with the modules' running statistics updated as they do it;
    differentiable once. `norms` are nn.BatchNorm2d, nn.SyncBatchNorm or nn.Identity; maps may carry
    channels of zeros behind theirs, which stay zeros."""
    if not can_fuse(maps, norms, shortcut):
        return plain_sum(maps, norms, shortcut=shortcut, relu=relu)
    synced = (isinstance(norms[0], nn.SyncBatchNorm) and dist.is_available()
              and dist.is_initialized() and dist.get_world_size() > 1)
    running = dict(means=[norm.running_mean for norm in norms],
                   variances=[norm.running_var for norm in norms],
                   tracked=[norm.num_batches_tracked for norm in norms], momentum=norms[0].momentum)
    is_apart = synced or torch.compiler.is_compiling()  # else the kernels write them, too
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    out, statistics = _fused(
        in_one_layout(maps), [norm.weight for norm in norms], [norm.bias for norm in norms],
        shortcut, norms[0].eps, relu, synced, *([] if is_apart else [running]))
    if is_apart:
        with torch.no_grad():
            found = statistics[:2].flatten(0, 1)[:, :norms[0].num_features].unbind()
            torch._foreach_lerp_(running["means"] + running["variances"], found,
                                 running["momentum"])
            torch._foreach_add_(running["tracked"], 1)
    return out


def plain_sum(maps: Sequence[Tensor], norms: Sequence[nn.Module], *,
              shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
    """The same by ordinary layers, the ReLU in place."""
    terms = [batch_norm(norm, x) for x, norm in zip(maps, norms)]
    out = reduce(add, terms if shortcut is None else [*terms, shortcut])
    return F.relu(out, inplace=out is not maps[0]) if relu else out
